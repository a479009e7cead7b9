"""Random programs under random placements: the cut program always compiles, runs and matches, whatever it does and wherever it is cut."""

import dataclasses

import jax
import numpy as np
import pytest
from random_programs import draw

from partition import profiles
from partition.equivalence import check
from partition.errors import PhaseError
from partition.hardware import Cluster
from partition.phases import tag
from partition.problem import pose
from partition.program import trace
from partition.stages import cut


def machines(rng: np.random.Generator) -> Cluster:
    """One to five meshes, all joined, that one, two or four host devices stand for."""
    whole = profiles.cluster("trn2_efa_4cs3")
    count = int(rng.integers(1, 6))
    meshes = tuple(dataclasses.replace(m, stand_in=int(rng.choice([1, 1, 2, 4]))) for m in whole.meshes[:count])
    links = {(e.src, e.dst): e for e in whole.edges}
    some = next(iter(links.values()))
    names = [m.name for m in meshes]
    edges = tuple(links.get((a, b), dataclasses.replace(some, src=a, dst=b)) for a in names for b in names if a != b)
    return dataclasses.replace(whole, meshes=meshes, edges=edges)


def hold(seed: int) -> str:
    """Draw, place, cut, run, check one case; says what it was. Raises where cut and uncut differ."""
    fn, args, exact = draw(seed)
    rng = np.random.default_rng(seed)
    program = trace(fn, *args)
    try:
        phases = tag(program)
    except PhaseError as error:  # a loop inside may choose from floats and feed that back as well: the caller has to say
        assert "feed a chosen token back" in error.what
        phases = tag(program, loop=max(op.id for op in program.graph.ops if op.loop is not None))
    problem = pose(phases, machines(rng), level="op" if rng.random() < 0.6 else "block", trips=4, sharding="tensor" if rng.random() < 0.7 else "search")
    mesh = rng.integers(0, len(problem.meshes), len(problem))
    placement = problem.placement(mesh if rng.random() < 0.7 else np.sort(mesh))
    narrow = {"float32": 2e-5 if exact else 6e-2, "bfloat16": 6e-2, "float16": 6e-2}
    verdict = check(cut(program, placement), *args, tolerance=narrow)
    assert verdict.equal
    return f"{len(verdict.boundaries)} boundaries"


@pytest.mark.parametrize("seed", range(25))
def test_a_random_program_is_the_same_when_cut(seed: int) -> None:
    hold(seed)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(20))
def test_many_random_programs_are_the_same_when_cut(block: int) -> None:
    for seed in range(1000 + 25 * block, 1025 + 25 * block):
        hold(seed)
    jax.clear_caches()
