"""Every mode and order of differentiation of every op and implementation is right, or refused in one line."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attention_jax.biases import ALiBi
from attention_jax.layers import ShortConvolution
from attention_jax.masks import Causal
from attention_jax.mixers import Context
from attention_jax.ops.decay_scan import decay_scan
from attention_jax.ops.delta_rule import delta_rule
from attention_jax.ops.delta_rule.chunked import _unit_lower_inverse
from attention_jax.ops.selected import selected_attention
from attention_jax.ops.softmax import dot_product_attention
from tests import marks
from tests.mixers import D_MODEL, MIXERS

B, T, N, K, H = 1, 7, 2, 1, 3
# Two documents, slots without a token in front, between and at the end.
SEGMENTS = np.int32([[-1, 0, 0, 0, -1, 1, 1]])
POSITIONS = np.int32([[-1, 0, 1, 2, -1, 0, 1]])
# The third query sees no key, not even its own.
HIDDEN = (np.arange(T) != 2)[:, None]
BLOCKS = np.tile(np.int32([0, 1]), (B, T, K, 1))


@dataclasses.dataclass(frozen=True)
class Op:
    """An op of arrays (q, k, v, gate [B, T, N]) with everything that it differentiates.

    refused: by mode, words of the message. twin: the implementation it must agree with; None: float64 finite
    differences. slow: not in `make test`.
    """

    run: Callable
    refused: dict[str, str] = dataclasses.field(default_factory=dict)
    twin: Callable | None = None
    slow: bool = False


def _softmax(impl, q, k, v, gate):
    out, lse = dot_product_attention(
        q, k, v, mask=Causal(), mask_BNTS=HIDDEN, bias=ALiBi(N), softcap=2.0, sink_logits_N=gate[0, 0],
        segment_ids=SEGMENTS, q_positions=POSITIONS, k_positions=POSITIONS, return_lse=True, impl=impl,
    )  # fmt: skip
    return out + jnp.where(jnp.isfinite(lse), lse, 0.0)[..., None]


def _selected(impl, q, k, v, gate):
    ids = {"segment_ids": SEGMENTS, "q_positions": POSITIONS, "k_positions": POSITIONS}
    return selected_attention(q, k, v, BLOCKS, block_size=2, impl=impl, **ids) * gate[..., None]


def _decay(impl, decay, q, k, v, gate):
    log_decay = {
        "none": lambda: None,
        "constant": lambda: -jnp.exp(gate[0, 0]),
        "token": lambda: -jnp.exp(gate),
        "channel": lambda: -jnp.exp(gate[..., None] + q),
    }[decay]()
    chunk = {"chunk_size": 4} if impl == "chunked" else {}
    ids = {"segment_ids": SEGMENTS, "positions": POSITIONS}
    return decay_scan(q, k, v, log_decay=log_decay, impl=impl, **ids, **chunk)


def _delta(impl, decay, q, k, v, gate):
    log_decay = {
        "none": lambda: None,
        "token": lambda: -jnp.exp(gate),
        "channel": lambda: -jnp.exp(gate[..., None] + q),
    }[decay]()
    chunk = {"chunk_size": 4} if impl == "chunked" else {}
    ids = {"segment_ids": SEGMENTS, "positions": POSITIONS}
    values = jnp.repeat(v, N // K, axis=2)
    return delta_rule(q, k, values, jax.nn.sigmoid(gate), log_decay=log_decay, impl=impl, **ids, **chunk)


FORWARD = ("jvp", "linearize", "grad of jvp")
NO_FORWARD = dict.fromkeys(FORWARD, "no forward-mode derivative")
_dense = {
    "softmax": functools.partial(_softmax, "reference"),
    "selected": functools.partial(_selected, "reference"),
}
OPS = {
    "softmax reference": Op(_dense["softmax"], twin=functools.partial(_softmax, "chunked"), slow=True),
    "softmax chunked": Op(
        functools.partial(_softmax, "chunked"),
        NO_FORWARD | {"grad of grad": "the gradient of impl='chunked' .* has no reverse-mode derivative"},
        twin=_dense["softmax"],
        slow=True,
    ),
    "selected reference": Op(_dense["selected"], twin=functools.partial(_selected, "gathered"), slow=True),
    "selected gathered": Op(
        functools.partial(_selected, "gathered"), NO_FORWARD, twin=_dense["selected"], slow=True
    ),
}
for _decays, _run, _name in (
    (("none", "constant", "token", "channel"), _decay, "decay_scan"),
    (("none", "token", "channel"), _delta, "delta_rule"),
):
    for _impl in ("recurrent", "chunked", "quadratic"):
        for _kind in _decays:
            OPS[f"{_name} {_impl} {_kind}"] = Op(
                functools.partial(_run, _impl, _kind),
                NO_FORWARD if (_name, _impl) == ("decay_scan", "chunked") else {},
                slow=True,
            )


def arrays(dtype):
    rng = np.random.default_rng(0)
    shapes = ((B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N))
    return tuple(
        [jnp.asarray(0.7 * rng.normal(size=shape), dtype) for shape in shapes] for _ in ("point", "direction")
    )


def modes(run: Callable) -> dict[str, Callable]:
    """By name: a function of (point, direction). All but "grad" are a derivative along the direction."""

    def loss(x):
        return jnp.sum(jnp.sin(run(*x)))

    def along(gradient, direction):
        return sum(jnp.vdot(a, b) for a, b in zip(gradient, direction, strict=True))

    return {
        "grad": lambda x, dx: jax.grad(loss)(x),
        "jvp": lambda x, dx: jax.jvp(loss, (x,), (dx,))[1],
        "linearize": lambda x, dx: jax.linearize(loss, x)[1](dx),
        "jvp of grad": lambda x, dx: jax.jvp(jax.grad(loss), (x,), (dx,))[1],
        "grad of grad": lambda x, dx: jax.grad(lambda x: along(jax.grad(loss)(x), dx))(x),
        "grad of jvp": lambda x, dx: jax.grad(lambda x: jax.jvp(loss, (x,), (dx,))[1])(x),
        "vmap of grad": lambda x, dx: jax.tree.map(
            lambda y: y[0], jax.vmap(jax.grad(loss))([y[None] for y in x])
        ),
        "loss": lambda x, dx: loss(x),
    }


@pytest.mark.parametrize("name", marks.params(OPS))
def test_what_works_is_right(name):
    """Against float64 finite differences, or float32 against another implementation, all in one program.

    Rows hold empty slots and a query without a key, and `jax_debug_nans` finds no NaN.
    """
    op = OPS[name]
    with jax.enable_x64(op.twin is None), jax.debug_nans(True):
        point, direction = arrays(jnp.float32 if op.twin else jnp.float64)
        wanted = {mode: f for mode, f in modes(op.run).items() if mode not in op.refused}
        program = jax.jit(lambda x, dx: {mode: f(x, dx) for mode, f in wanted.items()})
        found = jax.tree.map(np.asarray, program(point, direction))
        if op.twin is None:
            step, tolerance = 1e-5, {"rtol": 1e-7, "atol": 1e-7}
            sides = [program([a + s * b for a, b in zip(point, direction, strict=True)], direction)
                     for s in (step, -step)]  # fmt: skip
            first, second = (
                jax.tree.map(lambda a, b: np.asarray(a - b) / (2 * step), *(x[key] for x in sides))
                for key in ("loss", "grad")
            )
        else:
            tolerance = {"rtol": 2e-4, "atol": 2e-5}
            dense = modes(op.twin)
            twin = jax.jit(lambda x, dx: (dense["grad"](x, dx), dense["jvp of grad"](x, dx)))
            gradient, second = twin(point, direction)
            for a, b in zip(found["grad"], gradient, strict=True):
                np.testing.assert_allclose(a, b, **tolerance)
            first = sum(np.vdot(a, b) for a, b in zip(gradient, direction, strict=True))
    slope = sum(np.vdot(a, b) for a, b in zip(found["grad"], direction, strict=True))
    np.testing.assert_allclose(slope, first, **tolerance)
    for mode, value in found.items():
        if mode in ("jvp", "linearize"):
            np.testing.assert_allclose(value, first, err_msg=mode, **tolerance)
        elif mode == "vmap of grad":
            jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), value, found["grad"])
        elif " of " in mode:
            for a, b in zip(value, second, strict=True):
                np.testing.assert_allclose(a, b, err_msg=mode, **tolerance)


REFUSALS = {
    f"{name}, {mode}": marks.Row((name, mode), slow=name.endswith(("none", "constant", "channel")))
    for name, op in OPS.items()
    for mode in op.refused
}


@pytest.mark.parametrize("row", marks.params(REFUSALS))
def test_what_does_not_work_is_refused_in_one_line(row):
    """Behind a `jax.jit`, where JAX itself would complain only when it compiles."""
    name, mode = REFUSALS[row].value
    op = OPS[name]
    with pytest.raises(NotImplementedError, match=op.refused[mode]) as caught:
        jax.jit(modes(jax.jit(op.run))[mode]).lower(*arrays(jnp.float32))
    assert "\n" not in str(caught.value) and "use impl=" in str(caught.value)


_OTHERS = ("mamba2", "deltanet", "kda", "nsa-rope", "gla")


@pytest.mark.parametrize(
    "name", ["mamba2", "gated-deltanet", *(pytest.param(x, marks=pytest.mark.slow) for x in _OTHERS)]
)
def test_second_derivatives_of_mixers_with_packed_rows(name):
    """The gradient of a mixer is differentiated in forward and in reverse mode without an error."""
    config = MIXERS[name].config
    graphdef, params = nnx.split(nnx.eval_shape(lambda: config.build(D_MODEL, nnx.Rngs(0), causal=True)))
    ids = jax.ShapeDtypeStruct((2, 9), jnp.int32)
    x = jax.ShapeDtypeStruct((2, 9, D_MODEL), jnp.float32)

    def loss(x, params, ids):
        ctx = Context(positions_BT=ids, segment_ids_BT=ids)
        return jnp.sum(nnx.merge(graphdef, params).mix(x, None, ctx=ctx).y ** 2)

    def second(x, params, ids):
        gradient = functools.partial(jax.grad(loss), params=params, ids=ids)
        return jax.jvp(gradient, (x,), (x,))[1], jax.grad(lambda x: jnp.sum(gradient(x) ** 2))(x)

    assert [y.shape for y in jax.eval_shape(second, x, params, ids)] == [x.shape, x.shape]


def test_the_short_convolution_in_every_mode():
    """Against the same convolution of each document alone, whose rows need no permutation."""
    convolution = ShortConvolution(3, 3, activation="silu", rngs=nnx.Rngs(0))
    at = [np.flatnonzero(SEGMENTS[0] == s) for s in (0, 1)]

    def packed(x):
        return convolution(x, valid_BT=SEGMENTS >= 0, segment_ids_BT=SEGMENTS)[0]

    def alone(x):
        y = jnp.zeros_like(x)
        for slots in at:
            y = y.at[:, slots].set(convolution(x[:, slots])[0])
        return y

    rng = np.random.default_rng(1)
    x, dx = (jnp.asarray(rng.normal(size=(B, T, 3)), jnp.float32) for _ in range(2))

    @jax.jit
    def both(x, dx):
        return [
            {mode: modes(run)[mode]([x], [dx]) for mode in ("grad", "jvp", "jvp of grad", "grad of grad")}
            for run in (packed, alone)
        ]

    found, wanted = both(x, dx)
    for mode in found:
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5, err_msg=mode),
            found[mode],
            wanted[mode],
        )


def test_the_inverse_of_the_delta_rule_in_every_mode():
    """The one part of "chunked" with a derivative of its own, against the inverse that JAX differentiates."""
    rng = np.random.default_rng(2)
    x, dx = (jnp.asarray(rng.normal(size=(4, 4)), jnp.float32) for _ in range(2))

    def inverses(x):
        lower = jnp.tril(x, -1)
        return _unit_lower_inverse(2, lower), jnp.linalg.inv(jnp.eye(4) + lower)

    @jax.jit
    def both(x, dx):
        names = ("grad", "jvp", "jvp of grad", "grad of grad")
        return [{m: modes(lambda x, i=i: inverses(x)[i])[m]([x], [dx]) for m in names} for i in (0, 1)]

    found, wanted = both(x, dx)
    for mode in found:
        for a, b in zip(jax.tree.leaves(found[mode]), jax.tree.leaves(wanted[mode]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4, err_msg=mode)
