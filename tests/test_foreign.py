"""Models that others wrote, as they wrote them: traced, tagged, placed, cut, run and checked."""

from typing import Any

import foreign
import jax
import numpy as np
import pytest

import partition as pt
from partition.anatomy import Kind
from partition.graph import bodies
from partition.loops import CONTRACTIONS
from partition.phases import Phase

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs


def adapted(name: str) -> dict[str, Any]:
    """The adapter's callables; skips, with what to install, where the model's package is absent or does not import."""
    try:
        made: dict[str, Any] = getattr(foreign, name)()
    except (ImportError, AttributeError) as error:
        pytest.skip(f"{foreign.NEEDS[name]} is needed (pip install {foreign.NEEDS[name]}, see `make foreign`): {str(error).splitlines()[0]}")
    return made


@pytest.mark.parametrize("name", foreign.NEEDS)
def test_a_model_of_others_is_planned_and_runs_when_cut(name: str) -> None:
    made = adapted(name)
    if "generate" in made:
        fn, args = made["generate"]
        program = pt.trace(fn, *args)
    else:
        program = pt.trace(**made, new_tokens=5)
        args = program.args
    phases = pt.tag(program)
    inside = {o.id for body in bodies(phases.token_loop) for o in body.walk()}
    contractions = [o for o in program.graph.walk() if o.primitive in CONTRACTIONS]
    assert {phases.of[o.id] for o in contractions if o.id in inside} == {Phase.DECODE}
    assert {phases.of[o.id] for o in contractions if o.id not in inside} == {Phase.PREFILL}
    assert phases.batch == foreign.B and len(phases.handoff) >= 4  # keys and values of two layers
    assert foreign.LAYERS[name] in (None, phases.anatomy.layers.counts["body"])
    kinds = {phases.anatomy.kind[o.id] for o in contractions}
    assert {Kind.ATTENTION, Kind.HEAD} <= kinds
    plan = pt.plan(program, cluster="trn2_efa_cs3", trips=5)
    assert pt.check(plan.stages, *args).equal
    if "prefill" in made:
        first, rest = pt.uncut(program)(*args)["tokens"]
        np.testing.assert_array_equal(np.concatenate([np.asarray(first)[None], rest])[..., -1], written_by_hand(made, 5))


def written_by_hand(made: dict[str, Any], new_tokens: int) -> np.ndarray:
    """The tokens [new_tokens, B] of a loop in Python over the model's own two functions."""
    (prefill, args), (decode, (weights, *_)) = made["prefill"], made["decode"]
    prefill, decode = jax.jit(prefill), jax.jit(decode)
    logits, state = prefill(*args)
    tokens = []
    for n in range(new_tokens):
        tokens.append(np.asarray(logits).reshape(foreign.B, -1, logits.shape[-1])[:, -1].argmax(-1))
        logits, state = decode(weights, tokens[-1][:, None].astype(np.int32), state, np.int32(foreign.L + n))
    return np.stack(tokens)
