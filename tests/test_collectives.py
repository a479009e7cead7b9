"""Alpha-beta times against hand arithmetic, and their monotony."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partition.collectives import collective, steps, transfer
from partition.evaluation import Slot, evaluate
from partition.hardware import Edge, Kind, Link, Quantity
from tests.conftest import posed

KINDS = ["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]
quick = settings(max_examples=60, deadline=None, derandomize=True)


def q(value: float) -> Quantity:
    return Quantity(value=value, kind=Kind.ASSUMED, source="test")


def link(alpha: float = 10e-6, beta: float = 100e9) -> Link:
    return Link(name="l", title="L", alpha=q(alpha), beta=q(beta), price=q(0.0))


@pytest.mark.parametrize(("kind", "seconds"), [(k, 25e-6 if k == "all_reduce" else 17.5e-6) for k in KINDS])
def test_formula(kind: str, seconds: float) -> None:
    # 1 MB over 4 devices at 100 GB/s after 10 us: a ring sends 3/4 of it (7.5 us), an all-reduce twice that
    assert collective(kind, 1e6, 4, link()) == pytest.approx(seconds)


def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather() -> None:
    parts = [collective(kind, 3e7, 8, link(alpha=0.0)) for kind in ("reduce_scatter", "all_gather")]
    assert collective("all_reduce", 3e7, 8, link(alpha=0.0)) == pytest.approx(sum(parts))


@pytest.mark.parametrize("kind", KINDS)
def test_one_device_waits_for_nobody(kind: str) -> None:
    assert collective(kind, 1e6, 1, link()) == collective(kind, 1e6, 1, None) == 0.0


def test_an_unknown_kind_is_no_free_kind() -> None:
    with pytest.raises(KeyError):
        collective("all_shuffle", 1e6, 4, link())


def test_transfer_takes_the_narrower_of_link_and_ingest() -> None:
    wide, narrow = Edge(src="a", dst="b", link=link()), Edge(src="a", dst="b", link=link(), ingest=q(50e9))
    assert transfer(1e6, wide) == pytest.approx(10e-6 + 1e6 / 100e9)
    assert transfer(1e6, narrow) == pytest.approx(10e-6 + 1e6 / 50e9)
    assert transfer(1e6, Edge(src="a", dst="b", link=link(), ingest=q(500e9))) == transfer(1e6, wide)
    assert transfer(0.0, wide) == pytest.approx(10e-6)


@quick
@given(st.sampled_from(KINDS), st.floats(0, 1e12), st.integers(2, 64), st.floats(0, 1e-3), st.floats(1e6, 1e12), st.floats(1, 100))
def test_monotonic(kind: str, nbytes: float, n: int, alpha: float, beta: float, more: float) -> None:
    base = collective(kind, nbytes, n, link(alpha, beta))
    assert base >= alpha
    assert collective(kind, nbytes, n, link(alpha, beta * more)) <= base  # more bandwidth is never slower
    assert collective(kind, nbytes * more, n, link(alpha, beta)) >= base
    assert collective(kind, nbytes, n + 1, link(alpha, beta)) >= base
    edge = Edge(src="a", dst="b", link=link(alpha, beta), ingest=q(beta / 2))
    wider = Edge(src="a", dst="b", link=link(alpha, beta), ingest=q(beta / 2 * more))
    assert transfer(nbytes, wider) <= transfer(nbytes, edge)


def test_steps_are_those_of_the_size_and_the_topology() -> None:
    """32 devices: below 1 MB none beyond the first, to 56 MB log2 32 - 1, above as many as the way round."""
    base = dataclasses.replace(link(), hop=q(1e-6), mesh_below=q(1e6), ring_above=q(56e6))
    for topology, around in {"ring": 30.0, "torus": 2 * (32**0.5 - 1) - 1, "tree": 4.0, "all_to_all": 0.0}.items():
        fabric = dataclasses.replace(base, topology=topology)
        assert [steps(n, 32, fabric) for n in (1e5, 1e7, 1e9)] == pytest.approx([0.0, 4.0, around])
        assert collective("all_reduce", 1e7, 32, fabric) == pytest.approx(collective("all_reduce", 1e7, 32, link()) + 8e-6)


def test_small_transfers_use_few_ports_and_the_first_is_cold() -> None:
    striped = dataclasses.replace(link(), ports=q(16.0), stripe=q(2e6), cold=q(4.0))
    edge = Edge(src="a", dst="b", link=striped)
    assert transfer(1e6, edge) == pytest.approx(10e-6 + 16 * 1e6 / 100e9)  # one of 16 ports
    assert transfer(64e6, edge) == pytest.approx(10e-6 + 64e6 / 100e9)
    assert transfer(64e6, edge, cold=True) == pytest.approx(4.0 + transfer(64e6, edge))


def test_blocks_and_gateways_take_their_time() -> None:
    blocks = dataclasses.replace(link(), block=q(65536.0), block_time=q(0.76e-6))
    edge = Edge(src="a", dst="b", link=blocks, gateway=q(50e-6))
    assert transfer(65536 * 1000, edge) == pytest.approx(60e-6 + 65536 * 1000 / 100e9 + 1000 * 0.76e-6)
    assert edge.alpha == pytest.approx(60e-6)


def test_a_sender_has_its_ports_once() -> None:
    """Four wafers take in what is there at once: no faster together than the sender's ports, which are those of one wafer or of four."""
    problem, _ = posed("trn2_efa_4cs3")
    assert problem.wire[0, 1] == pytest.approx(347e9) and problem.wire[0, 1] > problem.beta[0, 1] > 0
    late = [n for n in range(len(problem)) if problem.region[n] != "top"]
    mesh = np.zeros(len(problem), int)
    mesh[late] = 1 + np.arange(len(late)) % 4
    sent = {}
    for ports in (1.0, 4.0):
        made = dataclasses.replace(problem, seconds=problem.seconds * 0, alpha=problem.alpha * 0, wire=problem.beta * ports)
        slots: list[Slot] = []
        evaluate(made, made.placement(mesh), record=slots)
        leaving = [s for s in slots if s.to is not None and s.mesh == 0 and s.trip < 0]
        assert len({s.to for s in leaving}) > 1
        moved = sum(made.flows[s.flow].nbytes for s in leaving if s.flow is not None)
        sent[ports] = max(s.end for s in leaving)
        assert sent[ports] >= moved / made.wire[0, 1] * (1 - 1e-9)
    assert sent[4.0] < sent[1.0]
