"""Other numbers in a cluster: by name, with units, and at the ends of their bands."""

import math

import pytest

from partition import profiles
from partition.errors import PartitionError
from partition.hardware import Kind
from partition.overrides import quantities


@pytest.mark.parametrize(
    "name, value, get, wanted",
    [
        ("cs3.price", "20 $/h", lambda c: float(c.mesh("cs3").device.price), 20 / 3600), ("cs3.price", 0.5, lambda c: float(c.mesh("cs3").device.price), 0.5),
        ("trn2.memory.bandwidth", "3 TB/s", lambda c: float(c.mesh("trn2").device.memory.bandwidth), 3e12),
        ("trn2.peak.bfloat16", "600 TFLOP/s", lambda c: float(c.mesh("trn2").device.peak["bfloat16"]), 6e14),
        ("neuronlink_v3.alpha", "10 us", lambda c: float(c.mesh("trn2").fabric.alpha), 1e-5), ("trn2.count", "8", lambda c: c.mesh("trn2").count, 8),
        ("efa_v3.beta", "200 GB/s", lambda c: float(c.edges[0].link.beta), 2e11), ("efa_v3.ingest", "100 GB/s", lambda c: c.edges[0].beta, 1e11),
    ],
)  # fmt: skip
def test_a_number_by_its_name(name: str, value: str | float, get: object, wanted: float) -> None:
    before = profiles.cluster("trn2_efa_cs3")
    after = before.replace({name: value})
    assert get(after) == pytest.approx(wanted) and get(before) != get(after)  # type: ignore[operator]
    for other, _, q in quantities(after):
        if other == name:
            assert q.kind is Kind.ASSUMED and q.source == "set by the caller" and q.low is None
        else:
            assert q == {n: x for n, _, x in quantities(before)}[other]


@pytest.mark.parametrize(
    "name, value, says",
    [
        ("cs3.prize", 1, "did you mean 'cs3.price'"), ("cs3.price", "20 GB", "is no price"), ("cs3.memory.usable", "120 %", "above 0, a share at most 1"),
        ("cs3.count", "4", "has no fabric"), ("trn2.count", "none", "no number of devices"), ("efa_v3.beta", math.nan, "is no bandwidth"),
        ("efa_v3.beta", 0, "is no bandwidth"), ("cs3.price", -1, "is no price"), ("efa_v3.alpha", "fast", "is no time"),
    ],
)  # fmt: skip
def test_what_is_no_number_of_a_cluster(name: str, value: str | float, says: str) -> None:
    with pytest.raises(PartitionError, match=says):
        profiles.cluster("trn2_efa_cs3").replace({name: value})


def test_ends_of_bands() -> None:
    cluster = profiles.cluster("trn2_efa_cs3")
    ends = {n: (q.low, q.high) for n, _, q in quantities(cluster) if q.low is not None}
    dimension = {n: d for n, d, _ in quantities(cluster)}
    assert len(ends) >= 12 and all(low <= high for low, high in ends.values())  # type: ignore[operator]
    better, worse = ({n: float(q) for n, _, q in quantities(cluster.at(worse=w))} for w in (False, True))
    for name, (low, high) in ends.items():
        slower = dimension[name] in ("time", "price", "power", "cycles")
        if name.endswith(("capacity", "usable")):
            assert better[name] == worse[name]
        else:
            assert (better[name], worse[name]) == ((low, high) if slower else (high, low)), name


def test_every_assumed_or_derived_number_of_the_package_has_a_band_but_free_links() -> None:
    for name in profiles.names("cluster"):
        for number, _, q in quantities(profiles.cluster(name)):
            if q.kind in (Kind.ASSUMED, Kind.DERIVED) and q.low is None:
                assert number.endswith(("swarm.price", "region.lanes", "contraction_latency", "systolic.step")), f"{name}: {number}"


def test_prices_and_bandwidths_by_keyword_take_units_too() -> None:
    base = profiles.cluster("trn2_efa_cs3")
    assert float(base.replace(price={"cs3": "36 $/h"}).mesh("cs3").device.price) == 0.01
    assert next(float(e.link.beta) for e in base.replace(beta={"efa_v3": "50 GB/s"}).edges) == 50e9
    for wrong in ({"price": {"cs3": "90"}}, {"beta": {"efa_v3": "fast"}}):
        with pytest.raises(PartitionError, match=r"is no (price|bandwidth)"):
            base.replace(**wrong)  # type: ignore[arg-type]
    with pytest.raises(PartitionError, match="says nothing by name"):
        base.replace(5)  # type: ignore[arg-type]
