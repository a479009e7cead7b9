"""Random programs under random placements: the cut program always compiles, runs and matches, whatever it does and wherever it is cut."""

import collections
import dataclasses
from typing import Any

import fuzz
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_programs import COLS, JUMPING, ROWS, SMOOTH, draw

from partition import profiles
from partition.dispatch import transfers
from partition.equivalence import check
from partition.errors import PhaseError
from partition.graph import Graph
from partition.hardware import Cluster
from partition.phases import tag
from partition.problem import pose
from partition.program import trace
from partition.stages import LoopPlan, Stages, cut


def machines(rng: np.random.Generator) -> Cluster:
    """One to five meshes, all joined, that one to four host devices stand for."""
    whole = profiles.cluster("trn2_efa_4cs3")
    count = int(rng.integers(1, 6))
    meshes = tuple(dataclasses.replace(m, stand_in=int(rng.choice([1, 2, 3, 4]))) for m in whole.meshes[:count])
    links = {(e.src, e.dst): e for e in whole.edges}
    some = next(iter(links.values()))
    names = [m.name for m in meshes]
    edges = tuple(links.get((a, b), dataclasses.replace(some, src=a, dst=b)) for a in names for b in names if a != b)
    return dataclasses.replace(whole, meshes=meshes, edges=edges)


def contents(graph: Graph) -> set[str]:
    """The primitives of a graph, bodies included, and the forms of its loops."""
    found: set[str] = set()
    for op in graph.walk():
        found.add(f"primitive {op.primitive}")
        if op.loop is not None:
            found.add(f"loop {op.loop.kind}" + (" reverse" if op.loop.reverse else ""))
            found |= contents(op.loop.body) | (contents(op.loop.cond) if op.loop.cond is not None else set())
        for body in op.bodies:
            found |= contents(body)
    return found


def cuts(stages: Stages) -> set[str]:
    """What of a program was cut, and where to."""
    found = {f"form {len({s.mesh for s in stages.all})} meshes"}
    for step in stages.steps:
        if isinstance(step, LoopPlan):
            found.add(f"cut token loop over {len({s.mesh for s in step.body})} meshes" + (", with a condition" if step.cond is not None else "") + (", stacked results" if any(r[2] for r in step.results) else ""))
        elif any(op.loop is not None and span is not None for op, span in step.items):
            found.add("cut scan of layers by ranges")
        elif any(op.loop is not None for op, _ in step.items):
            found.add("cut loop within one stage")
    found |= {"cut value to several meshes" for v, n in collections.Counter((t.value, t.src) for t in transfers(stages)).items() if n > 1}
    found |= {"cut donation" for s in stages.all if s.donated}
    return found


def drawn(seed: int, covered: set[str] | None = None) -> tuple[Stages, tuple[Any, ...], bool]:
    """(the stages of a case, its arguments, whether its floats decide nothing)."""
    fn, args, exact = draw(seed)
    rng = np.random.default_rng(seed)
    program = trace(fn, *args)
    try:
        phases = tag(program)
    except PhaseError as error:  # a loop inside may choose from floats and feed that back as well: the caller has to say
        assert "inside another loop" in error.what
        phases = tag(program, loop=max((op.id for op in program.graph.ops if op.loop is not None), default="none"))
    if covered is not None:
        covered |= contents(program.graph)
    problem = pose(phases, machines(rng), level="op" if rng.random() < 0.6 else "block", trips=4, sharding="tensor" if rng.random() < 0.7 else "search")
    mesh = rng.integers(0, len(problem.meshes), len(problem))
    placement = problem.placement(mesh if rng.random() < 0.7 else np.sort(mesh))
    stages = cut(program, placement)
    if covered is not None:
        covered |= cuts(stages)
    return stages, args, exact


def hold(seed: int, covered: set[str] | None = None) -> str:
    """Draw, place, cut, run, check one case; says what it was. Raises where cut and uncut differ."""
    stages, args, exact = drawn(seed, covered)
    loose = None if exact else {"float32": 6e-2, "bfloat16": 6e-2, "float16": 6e-2}  # where floats decide, a last bit may decide otherwise
    verdict = check(stages, *args, tolerance=loose)
    assert verdict.equal
    return f"{len(verdict.boundaries)} boundaries"


@pytest.mark.parametrize("first", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(25, 200, 25))])
def test_random_programs_are_the_same_when_cut(first: int) -> None:
    covered, failed = fuzz.block(first, 25)
    assert not failed, "\n".join(failed)
    assert covered["form 1 meshes"] and covered["cut donation"] and covered["cut value to several meshes"] and any(name.startswith("cut token loop over") for name in covered)


def test_two_hundred_cases_are_of_every_form() -> None:
    """What each case is made of, without running it: all loops and most primitives; which cuts the first cases have, `make fuzz` and the runs above tell."""
    loops, primitives = set(), set()
    for seed in range(200):
        fn, args, _ = draw(seed)
        found = contents(trace(fn, *args).graph)
        loops |= {name for name in found if name.startswith("loop")}
        primitives |= {name.split(" ", 1)[1] for name in found if name.startswith("primitive")}
    assert loops == {"loop scan", "loop scan reverse", "loop while"}
    assert len(fuzz.uncovered(primitives)) <= 40  # of ten thousand cases, none is uncovered: make fuzz


def test_every_primitive_with_a_rule_is_drawn() -> None:
    """What `rare` may draw, and what models draw anyway, are all primitives with a rule but those that are told."""
    x = np.linspace(-1, 1, ROWS * COLS, dtype=np.float32).reshape(ROWS, COLS)
    key = jax.random.key(0)
    made = [trace(lambda w, v, f=f: f(v), x, x) for f in SMOOTH.values()] + [trace(lambda w, k, f=f: f(w, (w * 8).astype(jnp.int32), k), x, key) for f in JUMPING.values()]
    seen = {name.split(" ", 1)[1] for program in made for name in contents(program.graph) if name.startswith("primitive")}
    for seed in range(60):
        fn, args, _ = draw(seed)
        seen |= {name.split(" ", 1)[1] for name in contents(trace(fn, *args).graph) if name.startswith("primitive")}
    assert not fuzz.uncovered(seen), fuzz.uncovered(seen)
