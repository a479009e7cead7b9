"""The whole chain on a Flax Linen model that nobody tuned it for."""

import pytest
from conftest import POLICIES
from linen_model import generation

from partition import profiles
from partition.equivalence import check
from partition.phases import Phase, tag
from partition.problem import pose
from partition.program import trace
from partition.stages import cut


@pytest.mark.parametrize("layers", ["unrolled", "scanned"])
@pytest.mark.parametrize("loop", ["scan", "while", "fori"])
def test_tags(layers: str, loop: str) -> None:
    fn, args = generation(layers=layers, loop=loop)
    phases = tag(trace(fn, *args))
    assert phases.token_loop is not None
    contractions = {p: sum(o.primitive == "dot_general" or o.loop is not None for o in phases.ops(p)) for p in Phase}
    assert contractions[Phase.PREFILL] == contractions[Phase.DECODE] > 0
    assert sum(c.kind == "cache" for c in phases.handoff) >= 2


@pytest.mark.parametrize(("layers", "loop", "policy"), [("unrolled", "scan", "phase_split"), ("scanned", "while", "alternating"), ("unrolled", "fori", "alternating")])
def test_runs_equal(layers: str, loop: str, policy: str) -> None:
    fn, args = generation(layers=layers, loop=loop)
    program = trace(fn, *args)
    problem = pose(tag(program), profiles.cluster("trn2_efa_4cs3"))
    assert check(cut(program, POLICIES[policy](problem)), *args).equal
