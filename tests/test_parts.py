"""The parts of small models of many kinds, against what their author says in scopes ("k_<part>"): experts, recurrences, blocked attention,
heads of every form, and how many layers they have."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import partition as pt
from partition.loops import CONTRACTIONS
from partition.phases import Phase, Phases

V, D, H, F, E, N = 64, 32, 4, 48, 4, 4  # vocabulary, width, heads, hidden, experts, states
PROMPT = np.random.default_rng(1).integers(0, V, (2, 6)).astype(np.int32)
scope = jax.named_scope


def weights(layers: int = 2, **extra: tuple[int, ...]) -> dict[str, Any]:
    rng = np.random.default_rng(0)

    def made(shape: tuple[int, ...]) -> np.ndarray:
        return (rng.standard_normal(shape) * 0.3).astype(np.float32)

    shapes = {"q": (D, D), "k": (D, D), "v": (D, D), "o": (D, D), "u": (D, F), "d": (F, D)} | extra
    return {"e": made((V, D)), "layers": [{n: made(s) for n, s in shapes.items()} for _ in range(layers)], "h": made((D, V))}


def norm(x: Any) -> Any:
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def attend(w: Any, x: Any, cache: Any, pos: Any, blocked: bool = False) -> Any:
    with scope("k_attention"):
        split = functools.partial(jnp.reshape, shape=(*x.shape[:2], H, D // H))
        q, k, v = (split(x @ w[n]) for n in "qkv")
        keys, values = (lax.dynamic_update_slice(c, n, (0, pos, 0, 0)) for c, n in zip(cache, (k, v), strict=True))
        seen = jnp.arange(keys.shape[1]) <= pos + jnp.arange(x.shape[1])[:, None]
        if not blocked:
            scores = jnp.where(seen[None, None], jnp.einsum("bthd,bshd->bhts", q, keys), -1e9)
            y = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), values)
        else:  # an online softmax over blocks of keys

            def block(carry: Any, i: Any) -> Any:
                most, total, y = carry
                part = [lax.dynamic_slice_in_dim(c, 4 * i, 4, 1) for c in (keys, values)]
                mask = lax.dynamic_slice_in_dim(seen, 4 * i, 4, 1)
                scores = jnp.where(mask[None, None], jnp.einsum("bthd,bshd->bhts", q, part[0]), -1e9)
                new = jnp.maximum(most, scores.max(-1))
                p, fade = jnp.exp(scores - new[..., None]), jnp.exp(most - new)
                return (new, total * fade + p.sum(-1), y * fade[..., None] + jnp.einsum("bhts,bshd->bhtd", p, part[1])), None

            start = (jnp.full(q.shape[:1] + (H, x.shape[1]), -1e9), jnp.zeros(q.shape[:1] + (H, x.shape[1])), jnp.zeros((q.shape[0], H, x.shape[1], D // H)))
            (_, total, y), _ = lax.scan(block, start, jnp.arange(keys.shape[1] // 4))
            y = (y / total[..., None]).swapaxes(1, 2)
        return y.reshape(x.shape) @ w["o"], (keys, values)


def mlp(w: Any, x: Any) -> Any:
    with scope("k_mlp"):
        return jax.nn.relu(x @ w["u"]) @ w["d"]


def forward(w: Any, tokens: Any, cache: Any, pos: Any, mlp: Any = mlp, mixer: Any = attend) -> Any:
    x, new = w["e"][tokens], []
    for layer, state in zip(w["layers"], cache, strict=True):
        y, state = mixer(layer, norm(x), state, pos)
        x = x + y
        x = x + mlp(layer, norm(x))
        new.append(state)
    with scope("k_head"):
        return norm(x) @ w["h"], new


def caches(batch: int, layers: int = 2) -> Any:
    return [tuple(jnp.zeros((batch, 12, H, D // H)) for _ in "kv") for _ in range(layers)]


def greedy(logits: Any) -> Any:
    return jnp.argmax(logits, -1).astype(jnp.int32)


def generate(w: Any, tokens: Any, forward: Any = forward, state: Any = caches, pick: Any = greedy) -> Any:
    logits, cache = forward(w, tokens, state(tokens.shape[0]), 0)

    def step(carry: Any, _: Any) -> Any:
        token, cache, pos = carry
        logits, cache = forward(w, token[:, None], cache, pos)
        token = pick(logits[:, -1])
        return (token, cache, pos + 1), token

    return lax.scan(step, (pick(logits[:, -1]), cache, jnp.int32(tokens.shape[1])), None, length=4)[1]


def hold(fn: Any, *args: Any, layers: dict[str, int]) -> Phases:
    """Trace, tag, and hold every contraction to its scope, and the layers to their number."""
    phases = pt.tag(pt.trace(fn, *args))
    found = phases.anatomy
    wrong = []
    for op in phases.program.graph.walk():
        said = re.findall(r"k_(\w+)", op.scope)
        if op.primitive in CONTRACTIONS and said and found.kind[op.id] != said[-1]:
            wrong.append(f"op {op.id} {op.scope} in {phases.of[op.id]}: {found.kind[op.id]}, {found.why[op.id]}")
    assert not wrong, "\n".join(wrong)
    assert dict(found.layers.counts) == layers
    return phases


TWO = {"top": 2, "body": 2}

# experts ------------------------------------------------------------------------------------------------------------------


def routed(w: Any, x: Any) -> Any:
    with scope("k_router"):
        return lax.top_k(jax.nn.softmax(x @ w["r"]), 2)


def dense(w: Any, x: Any) -> Any:
    share, which = routed(w, x)
    scale = (jax.nn.one_hot(which, E) * share[..., None]).sum(-2)
    with scope("k_experts"):
        return jnp.einsum("btef,efd,bte->btd", jax.nn.relu(jnp.einsum("btd,edf->btef", x, w["eu"])), w["ed"], scale)


def shared(w: Any, x: Any) -> Any:
    return dense(w, x) + mlp(w, x)


def capacity(w: Any, x: Any) -> Any:
    flat = x.reshape(-1, D)
    share, which = routed(w, flat)
    hot = jax.nn.one_hot(which, E)
    place = (jnp.cumsum(hot.reshape(-1, E), 0).reshape(*which.shape, E) * hot - 1).astype(int)
    with scope("k_experts"):
        combine = jnp.einsum("nkec,nk->nec", jax.nn.one_hot(place, 4) * hot[..., None], share)
        rows = jnp.einsum("nec,nd->ecd", (combine > 0).astype(x.dtype), flat)
        made = jnp.einsum("ecf,efd->ecd", jax.nn.relu(jnp.einsum("ecd,edf->ecf", rows, w["eu"])), w["ed"])
        return jnp.einsum("nec,ecd->nd", combine, made).reshape(x.shape)


def vmapped(w: Any, x: Any) -> Any:
    with scope("k_router"):
        logits = x @ w["r"]
    least = lax.top_k(logits, 2)[0][..., -1:]
    scale = jax.nn.softmax(jnp.where(logits >= least, logits, -1e9))
    with scope("k_experts"):
        made = jax.vmap(lambda u, d: jax.nn.relu(x @ u) @ d)(w["eu"], w["ed"])
        return jnp.einsum("ebtd,bte->btd", made, scale)


def looped(w: Any, x: Any) -> Any:
    share, which = routed(w, x)
    y = jnp.zeros_like(x)
    for e in range(E):
        with scope("k_experts"):
            made = jax.nn.relu(x @ w["eu"][e]) @ w["ed"][e]
        y = y + made * jnp.where(which == e, share, 0).sum(-1, keepdims=True)
    return y


def scanned(w: Any, x: Any) -> Any:
    share, which = routed(w, x)
    scale = (jax.nn.one_hot(which, E) * share[..., None]).sum(-2)

    def expert(y: Any, given: Any) -> Any:
        up, down, own = given
        with scope("k_experts"):
            return y + jax.nn.relu(x @ up) @ down * own[..., None], None

    return lax.scan(expert, jnp.zeros_like(x), (w["eu"], w["ed"], jnp.moveaxis(scale, -1, 0)))[0]


def gathered(w: Any, x: Any) -> Any:
    share, which = routed(w, x)
    with scope("k_experts"):
        hidden = jax.nn.relu(jnp.einsum("btd,btkdf->btkf", x, w["eu"][which]))
        return jnp.einsum("btkf,btkfd,btk->btd", hidden, w["ed"][which], share)


@pytest.mark.parametrize("experts", [dense, shared, capacity, vmapped, looped, scanned, gathered])
def test_experts(experts: Any) -> None:
    w = weights(r=(D, E), eu=(E, D, F), ed=(E, F, D))
    hold(functools.partial(generate, forward=functools.partial(forward, mlp=experts)), w, PROMPT, layers=TWO)


# recurrences --------------------------------------------------------------------------------------------------------------


def along(step: Any) -> Any:
    """A mixer that runs `step` along the sequence."""

    def mixer(w: Any, x: Any, state: Any, pos: Any) -> Any:
        with scope("k_recurrent"):
            if x.shape[1] == 1:
                state, y = step(w, state, x[:, 0])
                return y[:, None], state
            state, y = lax.scan(lambda s, x: step(w, s, x), state, x.swapaxes(0, 1))
            return y.swapaxes(0, 1), state

    return mixer


def lstm(w: Any, state: Any, x: Any) -> Any:
    h, c = state
    i, f, g, o = jnp.split(x @ w["i"] + h @ w["s"], 4, -1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (h, c), h


def gated(w: Any, state: Any, x: Any) -> Any:
    """RWKV's form: an elementwise state of keys and values, projections in and out."""
    a, b, last = state
    x, last = (x + last) / 2, x
    k, v = jnp.exp(x @ w["k"]), x @ w["v"]
    y = jax.nn.sigmoid(x @ w["q"]) * (a + k * v) / (b + k + 1e-6)
    return (0.9 * a + k * v, 0.9 * b + k, last), y @ w["o"]


def delta(w: Any, s: Any, x: Any) -> Any:
    q, k, v = ((x @ w[n]).reshape(-1, H, D // H) for n in "qkv")
    s = s + jnp.einsum("bhd,bhe->bhde", k, v - jnp.einsum("bhd,bhde->bhe", k, s))
    return s, jnp.einsum("bhd,bhde->bhe", q, s).reshape(x.shape[0], -1) @ w["o"]


def griffin(w: Any, x: Any, state: Any, pos: Any) -> Any:
    """A gated linear recurrence, by an associative scan; no two activations are contracted."""
    with scope("k_recurrent"):
        u, gate = x @ w["q"], jax.nn.gelu(x @ w["k"])
        a, b = jax.nn.sigmoid(u @ w["v"]), u
        if x.shape[1] == 1:
            hidden = (a[:, 0] * state + b[:, 0])[:, None]
        else:
            fade, made = lax.associative_scan(lambda x, y: (x[0] * y[0], x[1] * y[0] + y[1]), (a, b), axis=1)
            hidden = fade * state[:, None] + made
        return (hidden * gate) @ w["o"], hidden[:, -1]


def selective(w: Any, x: Any, h: Any, pos: Any) -> Any:
    """Mamba's form: a scan along the sequence without a contraction, then one with the outputs' matrix."""
    with scope("k_recurrent"):
        u, z = jnp.split(x @ w["i"], 2, -1)
        left, right = jnp.split(u @ w["c"], 2, -1)
        dt = jax.nn.softplus(u @ w["q"])[..., None]
        a, b = jnp.exp(-dt * jnp.exp(w["a"])), dt * left[:, :, None] * u[..., None]

        def step(h: Any, given: Any) -> Any:
            h = given[0] * h + given[1]
            return h, h

        h, hidden = lax.scan(step, h, (a.swapaxes(0, 1), b.swapaxes(0, 1)))
        return (jnp.einsum("tbdn,btn->btd", hidden, right) * jax.nn.silu(z)) @ w["o"], h


def retention(w: Any, x: Any, s: Any, pos: Any) -> Any:
    with scope("k_recurrent"):
        q, k, v = ((x @ w[n]).reshape(*x.shape[:2], H, D // H) for n in "qkv")
        if x.shape[1] == 1:
            s = 0.9 * s + jnp.einsum("bhd,bhe->bhde", k[:, 0], v[:, 0])
            y = jnp.einsum("bhd,bhde->bhe", q[:, 0], s)[:, None]
        else:
            ago = jnp.arange(x.shape[1])[:, None] - jnp.arange(x.shape[1])
            scores = jnp.einsum("bthd,bshd->bhts", q, k) * jnp.where(ago >= 0, 0.9**ago, 0)
            y = jnp.einsum("bhts,bshd->bthd", scores, v)
            s = jnp.einsum("bshd,bshe,s->bhde", k, v, 0.9 ** ago[-1])
        return y.reshape(x.shape) @ w["o"], s


def states(*shapes: tuple[int, ...]) -> Any:
    """An initial state for each of two layers: an array, or a tuple of some."""

    def made(batch: int) -> Any:
        one = tuple(jnp.zeros((batch, *s)) for s in shapes)
        return [one[0] if len(one) == 1 else one] * 2

    return made


RECURRENT = {
    "lstm": (along(lstm), states((D,), (D,)), {"i": (D, 4 * D), "s": (D, 4 * D)}), "gated": (along(gated), states((D,), (D,), (D,)), {}),
    "delta": (along(delta), states((H, D // H, D // H)), {}), "griffin": (griffin, states((D,)), {}),
    "selective": (selective, states((D, N)), {"i": (D, 2 * D), "c": (D, 2 * N), "a": (D, N)}), "retention": (retention, states((H, D // H, D // H)), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrences(name: str) -> None:
    mixer, state, extra = RECURRENT[name]
    hold(functools.partial(generate, forward=functools.partial(forward, mixer=mixer), state=state), weights(**extra), PROMPT, layers=TWO)


def test_blocked_attention() -> None:
    hold(functools.partial(generate, forward=functools.partial(forward, mixer=functools.partial(attend, blocked=True))), weights(), PROMPT, layers=TWO)


# heads --------------------------------------------------------------------------------------------------------------------


def unrolled(w: Any, tokens: Any) -> Any:
    logits, cache = forward(w, tokens, caches(2), 0)
    out = [greedy(logits[:, -1])]
    for n in range(3):
        logits, cache = forward(w, out[-1][:, None], cache, tokens.shape[1] + n)
        out.append(greedy(logits[:, -1]))
    return jnp.stack(out)


def token_by_token(w: Any, tokens: Any) -> Any:
    """The prompt is read one token at a time, in a loop of its own."""

    def read(carry: Any, token: Any) -> Any:
        logits, cache = forward(w, token[:, None], carry[0], carry[1])
        return (cache, carry[1] + 1, logits[:, -1]), None

    (cache, pos, logits), _ = lax.scan(read, (caches(2), jnp.int32(0), jnp.zeros((2, V))), tokens.T)

    def step(carry: Any, _: Any) -> Any:
        token, cache, pos = carry
        logits, cache = forward(w, token[:, None], cache, pos)
        return (greedy(logits[:, -1]), cache, pos + 1), token

    return lax.scan(step, (greedy(logits), cache, pos), None, length=4)[1]


def guided(w: Any, tokens: Any) -> Any:
    """Classifier-free guidance: two passes a token, with and without the prompt."""

    def both(w: Any, tokens: Any, state: Any, pos: Any) -> Any:
        (a, first), (b, second) = forward(w, tokens, state[0], pos), forward(w, tokens * 0 if tokens.shape[1] > 1 else tokens, state[1], pos)
        return 2 * a - b, (first, second)

    return generate(w, tokens, both, lambda batch: (caches(batch), caches(batch)))


def turns(w: Any, tokens: Any) -> Any:
    """Two turns of a chat in one cache."""
    logits, cache = forward(w, tokens, caches(2), 0)
    out, pos = [], 6

    def step(carry: Any, _: Any) -> Any:
        token, cache, pos = carry
        logits, cache = forward(w, token[:, None], cache, pos)
        return (greedy(logits[:, -1]), cache, pos + 1), token

    for turn in range(2):
        (_, cache, _), written = lax.scan(step, (greedy(logits[:, -1]), cache, jnp.int32(pos)), None, length=2)
        out.append(written)
        if turn == 0:
            logits, cache = forward(w, tokens[:, :2], cache, pos + 2)
            pos += 4
    return jnp.concatenate(out)


def searched(logits: Any) -> Any:
    """A sampler with a loop inside."""
    return jax.vmap(lambda row: jnp.searchsorted(jnp.cumsum(jax.nn.softmax(row)), 0.4))(logits).astype(jnp.int32)


@pytest.mark.parametrize(
    "fn, layers", [(unrolled, {"top": 2}), (token_by_token, TWO), (guided, TWO), (turns, TWO), (functools.partial(generate, pick=searched), TWO)]
)
def test_heads(fn: Any, layers: Any) -> None:
    phases = hold(fn, weights(), PROMPT, layers=layers)
    assert phases.batch == 2
    if fn is turns:
        first, second = [op for op in phases.program.graph.ops if op.loop is not None]
        assert phases.loop == second.id and phases.of[first.id] is Phase.DECODE


def chunks_in_python(w: Any, tokens: Any) -> Any:
    """The prompt in two chunks, written one after the other."""
    _, cache = forward(w, tokens[:, :3], caches(2, 3), 0)
    logits, cache = forward(w, tokens[:, 3:], cache, 3)

    def step(carry: Any, _: Any) -> Any:
        token, cache, pos = carry
        logits, cache = forward(w, token[:, None], cache, pos)
        return (greedy(logits[:, -1]), cache, pos + 1), token

    return lax.scan(step, (greedy(logits[:, -1]), cache, jnp.int32(6)), None, length=4)[1]


def test_layers_of_chunks_in_python_are_those_of_the_model() -> None:
    phases = hold(chunks_in_python, weights(3), PROMPT, layers={"top": 3, "body": 3})
    assert len({bytes_ for n, bytes_ in phases.handoff_by_layer.items() if n is not None}) == 1


def counted(w: Any, tokens: Any, cache: Any, pos: Any, form: str = "fori") -> Any:
    """Layers by their number: a loop that takes the weights of each from a stack."""
    stack = jax.tree.map(lambda *x: jnp.stack([jnp.asarray(a) for a in x]), *w["layers"])
    keys, values = cache

    def layer(i: Any, carry: Any) -> Any:
        x, keys, values = carry
        own = jax.tree.map(lambda a: a[i] if form == "fori" else lax.dynamic_index_in_dim(a, i, keepdims=False), stack)
        y, (k, v) = attend(own, norm(x), (keys[i], values[i]), pos)
        x = x + y
        return x + mlp(own, norm(x)), keys.at[i].set(k), values.at[i].set(v)

    x = jnp.asarray(w["e"])[tokens]
    if form == "fori":
        x, keys, values = lax.fori_loop(0, 3, layer, (x, keys, values))
    else:
        (x, keys, values), _ = lax.scan(lambda c, i: (layer(i, c), None), (x, keys, values), jnp.arange(3))
    with scope("k_head"):
        return norm(x) @ w["h"], (keys, values)


@pytest.mark.parametrize("form", ["fori", "scan"])
def test_layers_by_number(form: str) -> None:
    state = lambda batch: tuple(jnp.zeros((3, batch, 12, H, D // H)) for _ in "kv")  # noqa: E731
    hold(functools.partial(generate, forward=functools.partial(counted, form=form), state=state), weights(3), PROMPT, layers={"top": 3, "body": 3})


def scaled(w: Any, tokens: Any, cache: Any, pos: Any) -> Any:
    """The stream is scaled as it is added to."""
    x, new = w["e"][tokens], []
    for layer, state in zip(w["layers"], cache, strict=True):
        y, state = attend(layer, norm(x), state, pos)
        x = layer["a"][0] * x + y
        x = layer["a"][1] * x + mlp(layer, norm(x))
        new.append(state)
    with scope("k_head"):
        return norm(x) @ w["h"], new


def test_a_stream_that_is_scaled() -> None:
    hold(functools.partial(generate, forward=scaled), weights(a=(2,)), PROMPT, layers=TWO)


def hybrid(pattern: str) -> Any:
    """Recurrences (m) and attention (a) without an MLP between them."""

    def forward(w: Any, tokens: Any, cache: Any, pos: Any) -> Any:
        x, new = w["e"][tokens], []
        for kind, layer, state in zip(pattern, w["layers"], cache, strict=True):
            y, state = (attend if kind == "a" else retention)(layer, norm(x), state, pos)
            x = x + y
            new.append(state)
        with scope("k_head"):
            return norm(x) @ w["h"], new

    def state(batch: int) -> Any:
        return [caches(batch, 1)[0] if kind == "a" else jnp.zeros((batch, H, D // H, D // H)) for kind in pattern]

    return functools.partial(generate, forward=forward, state=state)


@pytest.mark.parametrize("pattern", ["a", "ma", "am", "mma", "mamama", "mmamma", "mmmamm"])
def test_hybrids_without_mlps(pattern: str) -> None:
    n = len(pattern)
    phases = pt.tag(pt.trace(hybrid(pattern), weights(n), PROMPT))
    assert dict(phases.anatomy.layers.counts) == {"top": n, "body": n}


def seen(w: Any, image: Any, tokens: Any) -> Any:
    """A patch convolution and a projection stand before the text: stems, and no part of the first layer."""
    with scope("k_mlp"):
        patches = lax.conv_general_dilated(image, w["patch"], (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")).reshape(image.shape[0], -1, D) @ w["into"]

    def first(w: Any, tokens: Any, cache: Any, pos: Any) -> Any:
        x, new = (w["e"][tokens] if tokens.shape[1] == 1 else jnp.concatenate([patches, w["e"][tokens]], 1)), []
        for layer, state in zip(w["layers"], cache, strict=True):
            y, state = attend(layer, norm(x), state, pos)
            x = x + y
            x = x + mlp(layer, norm(x))
            new.append(state)
        with scope("k_head"):
            return norm(x) @ w["h"], new

    return generate(w, tokens, first, lambda batch: [tuple(jnp.zeros((batch, 16, H, D // H)) for _ in "kv")] * 2)


def test_stems_are_no_layers() -> None:
    w = weights() | {"patch": np.ones((2, 2, 1, D), np.float32), "into": np.ones((D, D), np.float32)}
    phases = pt.tag(pt.trace(seen, w, np.ones((2, 4, 4, 1), np.float32), PROMPT))
    kinds = {phases.anatomy.kind[o.id] for o in phases.program.graph.ops if "k_mlp" in o.scope and o.primitive in CONTRACTIONS}
    assert kinds == {"mlp"} and dict(phases.anatomy.layers.counts) == TWO
