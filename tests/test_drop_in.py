"""The drop-in functions compute the same as those of JAX and Flax, and reject unsupported arguments."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from numpy.testing import assert_allclose, assert_array_equal

from attention_jax import drop_in
from attention_jax.ops.softmax import ChunkedConfig
from tests.covering import pairwise


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: widths as in JAX's own tests of its function, lengths and options as each case says."""

    dtype: str = "float32"
    groups: int = 1
    vmap: bool = False
    lengths: tuple[int, int] = (24, 24)
    mask: str | None = None
    bias: str | None = None
    causal: bool = False
    window: Any = None
    padding: str | None = None
    scale: Any = None
    implementation: str | None = None

    def __str__(self) -> str:
        given = [f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return ", ".join(f"{f.name} {getattr(self, f.name)}" for f in given) or "plain"


B, N, H = 2, 4, 32
SHAPES = {
    "BNTS": lambda T, S: (B, N, T, S), "1NTS": lambda T, S: (1, N, T, S), "11TS": lambda T, S: (1, 1, T, S),
    "B11S": lambda T, S: (B, 1, 1, S), "BN1S": lambda T, S: (B, N, 1, S), "B1T1": lambda T, S: (B, 1, T, 1),
    "NTS": lambda T, S: (N, T, S), "11S": lambda T, S: (1, 1, S), "TS": lambda T, S: (T, S),
}  # fmt: skip
FACTORS = {
    "dtype": ["float32", "bfloat16", "float16"],
    "groups": [1, 2, 4],
    "vmap": [False, True],
    "lengths": [(24, 24), (9, 30), (30, 9), (1, 24)],
    "mask": [None, "BNTS", "11TS", "B11S", "BN1S", "NTS", "11S"],
    "bias": [None, "1NTS", "BNTS", "int 11TS", "B11S", "B1T1", "TS"],
    "causal": [False, True],
    "window": [None, 3, (3, 2), (3, 0), (0, 2)],
    "padding": [None, "both", "keys", "queries"],
    "scale": [None, 0.3, "traced"],
    "implementation": [None, "xla"],
}
# The cases of JAX's own tests: groups with and without vmap, then each kind of mask.
OWN = [
    *(Case(*row) for row in itertools.product(("bfloat16", "float16"), (1, 2, 4), (False, True))),
    Case("bfloat16", bias="1NTS"), Case("bfloat16", causal=True), Case("bfloat16", padding="both"),
    Case("bfloat16", mask="causal"), Case("bfloat16", causal=True, padding="both"),
    Case("bfloat16", mask="causal", padding="both"), Case("bfloat16", bias="1NTS", causal=True),
    Case("bfloat16", causal=True, window=(3, 2)), Case("bfloat16", window=(3, 0)),
    Case("bfloat16", bias="BNTS", mask="11S"), Case("bfloat16", bias="BNTS", mask="11S", vmap=True),
]  # fmt: skip
COVERING = [Case(**row) for row in pairwise(FACTORS, seed=1, tries=20)]


def arrays(case: Case) -> tuple[dict[str, Any], np.ndarray]:
    """The arguments of a case, and what is seen, boolean [B, N, T, S], from its definition."""
    rng, (T, S), K = np.random.default_rng(0), case.lengths, N // case.groups
    shapes = {"query": (B, T, N, H), "key": (B, S, K, H), "value": (B, S, K, H)}
    given = {name: jnp.asarray(rng.normal(size=x), case.dtype) for name, x in shapes.items()}
    seen = np.ones((B, N, T, S), bool)
    t, s = np.arange(T)[:, None], np.arange(S)
    if case.mask is not None:
        shape = (1, 1, T, S) if case.mask == "causal" else SHAPES[case.mask](T, S)
        mask = np.broadcast_to(s <= t, shape) if case.mask == "causal" else rng.random(shape) < 0.7
        given["mask"] = jnp.asarray(_of_a_row(mask, case.vmap))
        seen &= np.asarray(given["mask"])
    if case.bias is not None:
        shape = SHAPES[case.bias.removeprefix("int ")](T, S)
        bias = rng.integers(-2, 3, size=shape) if "int" in case.bias else rng.normal(size=shape)
        given["bias"] = jnp.asarray(_of_a_row(bias, case.vmap), "int32" if "int" in case.bias else case.dtype)
    if case.causal:
        seen &= s <= t
    if case.window is not None:
        left, right = (case.window, case.window) if isinstance(case.window, int) else case.window
        seen &= (s >= t - left) & (s <= t + right)
    if case.padding in ("both", "queries"):
        given["query_seq_lengths"] = jnp.array([T // 2, T], jnp.int32)
        seen &= np.arange(T)[:, None] < np.array([T // 2, T])[:, None, None, None]
    if case.padding in ("both", "keys"):
        given["key_value_seq_lengths"] = jnp.array([S, S // 3], jnp.int32)
        seen &= s < np.array([S, S // 3])[:, None, None, None]
    if case.scale == "traced":
        given["scale"] = jnp.float32(0.4)
    return given, seen


def _of_a_row(x: np.ndarray, vmap: bool) -> np.ndarray:
    """A batched array serves all rows of a vmapped call alike."""
    return x[:1] if vmap and x.ndim == 4 else x


def call(function: Any, case: Case, given: dict[str, Any]) -> Any:
    options = {"is_causal": case.causal, "local_window_size": case.window, "return_residual": True}
    if isinstance(case.scale, float):
        options["scale"] = case.scale
    if not case.vmap:
        return function(**given, **options)
    given = {name: x[:, None] if "lengths" in name else x for name, x in given.items()}
    axes = {name: None if name in ("mask", "bias", "scale") else 0 for name in given}
    return jax.vmap(lambda given: function(**given, **options), in_axes=(axes,))(given)


# Errors in units of the dtype's eps: parts of the gradients of scale and bias are rounded and cancel over
# thousands of products; sums in float32 are taken in another order.
EPS = {"scale": 128, "bias": 12}
EPS_FLOAT32 = {"scale": 256, "bias": 64}


def check(case: Case) -> None:
    given, seen = arrays(case)
    some_BTN = seen.any(-1).swapaxes(1, 2)
    learned = {name: x for name, x in given.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    rng = np.random.default_rng(1)
    # A row without a key is where the two differ: no gradient comes from there.
    dout = jnp.asarray(rng.normal(size=given["query"].shape) * some_BTN[..., None], "float32")

    def run(function, learned, dtype, **options):
        @jax.jit
        def both(learned):
            def out(learned):
                found, residual = call(functools.partial(function, **options), case, given | learned)
                return found, residual

            found, pull, residual = jax.vjp(out, learned, has_aux=True)
            return found, residual, pull(dout.astype(found.dtype))[0]

        found, residual, gradients = both(jax.tree.map(lambda x: x.astype(dtype), learned))
        return jax.tree.map(
            lambda x: np.asarray(x, np.float64), {"out": found, "residual": residual, **gradients}
        )

    ours = run(drop_in.dot_product_attention, learned, case.dtype, implementation=case.implementation)
    # What JAX's function makes of the same inputs in float32.
    exact = run(jax.nn.dot_product_attention, learned, "float32", implementation="xla")
    assert_array_equal(ours["out"][~some_BTN], 0)
    assert_array_equal(ours["residual"][~some_BTN], -np.inf)
    eps = float(jnp.finfo(case.dtype).eps)
    for name, x in exact.items():
        y = ours[name]
        if name in ("out", "residual"):
            some = some_BTN.reshape(some_BTN.shape + (1,) * (x.ndim - 3))
            x, y = np.where(some, x, 0), np.where(some, y, 0)
        assert np.isfinite(y).all(), name
        factor = EPS_FLOAT32.get(name, 32) if case.dtype == "float32" else EPS.get(name, 4)
        allowed = factor * eps * max(1, np.abs(x).max())
        assert np.abs(x - y).max() <= allowed, (name, np.abs(x - y).max(), allowed)


@pytest.mark.parametrize("case", OWN, ids=str)
def test_the_cases_of_jax_itself(case):
    check(case)


@pytest.mark.parametrize(
    "case",
    [c if i % 3 == 0 else pytest.param(c, marks=pytest.mark.slow) for i, c in enumerate(COVERING)],
    ids=str,
)
def test_every_pair_of_arguments(case):
    check(case)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (drop_in.dot_product_attention, jax.nn.dot_product_attention),
        (drop_in.nnx_attention_fn, nnx.dot_product_attention),
        (drop_in.linen_attention_fn, linen.dot_product_attention),
    ],
)
def test_signatures_are_those_of_the_installed_versions(ours, theirs):
    ours, theirs = (
        [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]
        for f in (ours, theirs)
    )
    assert ours == theirs


def test_a_single_row_of_any_rank():
    given, _ = arrays(Case())
    row = {name: x[0] for name, x in given.items()}
    out, residual = drop_in.dot_product_attention(**row, return_residual=True)
    assert out.shape == (24, N, H) and residual.shape == (24, N)
    assert_allclose(out, drop_in.dot_product_attention(**given)[0], atol=2e-6)
    one_query = row | {"query": row["query"][3]}
    assert_allclose(drop_in.dot_product_attention(**one_query), out[3], atol=1e-6)
    assert jax.nn.dot_product_attention(**one_query).shape == (N, H)


def test_values_of_another_width():
    given, _ = arrays(Case())
    narrow = given | {"value": given["value"][..., :5]}
    assert_allclose(
        drop_in.dot_product_attention(**narrow), drop_in.dot_product_attention(**given)[..., :5], atol=1e-6
    )


def test_hidden_keys_are_never_read():
    given, _ = arrays(Case(padding="keys"))
    clean = drop_in.dot_product_attention(**given, is_causal=True)
    hidden = (jnp.arange(24) >= given["key_value_seq_lengths"][:, None])[..., None, None]
    poisoned = given | {name: jnp.where(hidden, jnp.nan, given[name]) for name in ("key", "value")}
    assert_array_equal(drop_in.dot_product_attention(**poisoned, is_causal=True), clean)
    poisoned["mask"] = ~hidden[:, :, 0, 0][:, None, None]
    del poisoned["key_value_seq_lengths"]
    assert_array_equal(drop_in.dot_product_attention(**poisoned, is_causal=True), clean)


def test_a_row_without_keys_is_zero_where_jax_takes_the_mean():
    given, _ = arrays(Case())
    given["mask"] = jnp.zeros((1, 1, 24, 24), bool).at[:, :, 5:].set(True)
    out = drop_in.dot_product_attention(**given)
    assert_array_equal(out[:, :5], 0)
    mean = jnp.broadcast_to(given["value"].mean(1, keepdims=True), out[:, :5].shape)
    assert_allclose(jax.nn.dot_product_attention(**given)[:, :5], mean, atol=1e-5)


def test_key_masks_and_lengths_cost_no_array_of_pairs():
    T = 1 << 14
    x = jax.ShapeDtypeStruct((1, T, 1, 8), "float32")
    mask, lengths = jax.ShapeDtypeStruct((1, 1, 1, T), "bool"), jax.ShapeDtypeStruct((1,), "int32")

    def loss(x, mask, lengths):
        return drop_in.dot_product_attention(
            x, x, x, mask=mask, is_causal=True, key_value_seq_lengths=lengths, query_seq_lengths=lengths
        ).sum()

    text = jax.jit(jax.grad(loss)).lower(x, mask, lengths).as_text()
    assert f"{T}x{T}" not in text and f"x{T}x8x" in text


REFUSED = {
    "implementation": ({"implementation": "triton"}, "must be None or one of xla, .* 'triton'"),
    "mask of floats": ({"mask": np.ones((1, 1, 24, 24))}, "mask must be boolean, got float"),
    "mask shape": ({"mask": np.ones((3, 1, 24, 24), bool)}, r"mask \(3, 1, 24, 24\) does not broadcast to"),
    "bias shape": ({"bias": np.ones((24, 7))}, r"bias \(1, 1, 24, 7\) does not broadcast to"),
    "window": ({"local_window_size": -1}, "local_window_size must be an int >= 0, a pair .* got -1"),
    "window of three": ({"local_window_size": (1, 2, 3)}, r"must be .* got \(1, 2, 3\)"),
    "lengths": ({"query_seq_lengths": np.ones(3, np.int32)}, r"query_seq_lengths must be integers \[2\]"),
    "float lengths": ({"key_value_seq_lengths": np.ones(2)}, "key_value_seq_lengths must be .* got float"),
    "scale": ({"scale": np.ones(2)}, r"scale must be one number, got an array of shape \(2,\)"),
    "axes": ({"query": np.ones((1, 2, 24, N, H))}, "query must have at most 4 axes"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_mistakes_are_named(name):
    changes, words = REFUSED[name]
    given, _ = arrays(Case())
    with pytest.raises(ValueError, match=words):
        drop_in.dot_product_attention(**(given | changes))
    if name == "scale":
        with pytest.raises(ValueError, match=words):
            jax.jit(lambda scale: drop_in.dot_product_attention(**given, scale=scale))(np.ones(2))


def test_cudnn_is_refused_where_it_does_not_run():
    given, _ = arrays(Case())
    with pytest.raises(NotImplementedError, match="impl='cudnn' cannot run this call"):
        drop_in.dot_product_attention(**given, implementation="cudnn", mask=np.ones((2, 1, 24, 24), bool))


def modules(kind: str, attention_fn: Any, **options):
    """(apply(params, x, dropout key, **arguments of the call), params) of a module of width 16."""
    if kind == "nnx":
        layer = nnx.MultiHeadAttention(
            N, 16, attention_fn=attention_fn, decode=False, rngs=nnx.Rngs(params=0, dropout=1), **options
        )
        graph, params, rest = nnx.split(layer, nnx.Param, ...)

        def apply(params, x, key=None, **given):
            rngs = {} if key is None else {"rngs": nnx.Rngs(dropout=key)}
            return nnx.merge(graph, params, rest)(x, **given, **rngs)

        return apply, params
    layer = linen.MultiHeadDotProductAttention(N, attention_fn=attention_fn, **options)
    params = layer.init(jax.random.key(0), jnp.ones((1, 2, 16)), deterministic=True)

    def apply(params, x, key=None, **given):
        return layer.apply(params, x, rngs=None if key is None else {"dropout": key}, **given)

    return apply, params


OURS = {"nnx": drop_in.nnx_attention_fn, "linen": drop_in.linen_attention_fn}
THEIRS = {"nnx": nnx.dot_product_attention, "linen": linen.dot_product_attention}
FLAX = pytest.mark.parametrize("kind", OURS)


def both(kind: str, x: jax.Array, *, options: dict | None = None, **given) -> None:
    """Outputs and gradients of the module with our function and with Flax's own."""
    found = []
    for functions in (OURS, THEIRS):
        apply, params = modules(kind, functions[kind], **(options or {}))

        def loss(params, x, apply=apply):
            y = apply(params, x, **given)
            return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum(), y

        grads, y = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x)
        found.append(jax.tree.leaves((y, grads)))
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
        dtype = (options or {}).get("dtype", theirs.dtype)
        tolerance = float(jnp.finfo(dtype).eps) * (32 if dtype == jnp.float32 else 4)
        limit = tolerance * max(1, float(jnp.abs(theirs).max()))
        assert_allclose(np.float64(ours), np.float64(theirs), atol=limit, rtol=0)


@FLAX
def test_flax_modules_compute_the_same(kind):
    x = jax.random.normal(jax.random.key(2), (2, 12, 16))
    causal = linen.make_causal_mask(x[..., 0])
    both(kind, x)
    both(kind, x, mask=causal)
    padding = jnp.arange(12) < jnp.array([7, 12])[:, None]
    both(kind, x, mask=linen.combine_masks(causal, linen.make_attention_mask(padding | True, padding)))
    both(kind, x, options={"normalize_qk": True, "dtype": jnp.bfloat16, "precision": "highest"})


@FLAX
def test_flax_modules_with_any_number_of_batch_axes(kind):
    x = jax.random.normal(jax.random.key(2), (2, 3, 5, 16))
    mask = linen.make_causal_mask(x[..., 0])
    assert mask.shape == (2, 3, 1, 5, 5)
    both(kind, x, mask=mask)
    both(kind, x[0, 0], mask=mask[0, 0])
    if kind == "linen":  # NNX gives its own function masks of full batch axes only
        both(kind, x, mask=mask[:1, :1])


def test_nnx_is_causal_and_grouped_heads():
    x = jax.random.normal(jax.random.key(2), (2, 12, 16))
    both("nnx", x, is_causal=True, options={"num_kv_heads": 2})
    given, _ = arrays(Case(groups=2, bias="1NTS", mask="BNTS"))
    args = [given[name] for name in ("query", "key", "value", "bias", "mask")]
    for is_causal in (False, True):
        ours = drop_in.nnx_attention_fn(*args, is_causal=is_causal)
        theirs = nnx.dot_product_attention(*args, is_causal=is_causal)
        some = np.asarray(ours != 0)
        assert some.mean() > 0.9
        assert_allclose(np.where(some, ours, 0), np.where(some, theirs, 0), atol=4e-6)


def test_nnx_decodes():
    x = jax.random.normal(jax.random.key(2), (2, 6, 16))
    full, steps = {}, {}
    for name, function in (("ours", OURS["nnx"]), ("theirs", THEIRS["nnx"])):
        layer = nnx.MultiHeadAttention(N, 16, attention_fn=function, rngs=nnx.Rngs(0), decode=False)
        full[name] = layer(x, mask=nnx.make_causal_mask(x[..., 0]))
        layer.init_cache((2, 8, 16))
        tokens = [layer(x[:, t : t + 1], decode=True) for t in range(6)]
        steps[name] = jnp.concatenate(tokens, axis=1)
    assert_allclose(steps["ours"], full["ours"], atol=2e-6)
    assert_allclose(steps["ours"], steps["theirs"], atol=2e-6)


def test_linen_decodes():
    x = jax.random.normal(jax.random.key(2), (2, 6, 16))
    layer = linen.MultiHeadDotProductAttention(N, attention_fn=drop_in.linen_attention_fn)
    params = layer.init(jax.random.key(0), x)
    full = layer.apply(params, x, mask=linen.make_causal_mask(x[..., 0]))
    cached = layer.clone(decode=True)
    cache = cached.init(jax.random.key(0), jnp.zeros((2, 8, 16)))["cache"]
    for t in range(6):
        variables = {"params": params["params"], "cache": cache}
        y, changed = cached.apply(variables, x[:, t : t + 1], mutable=["cache"])
        cache = changed["cache"]
        assert_allclose(y, full[:, t : t + 1], atol=2e-6)


def test_nnx_sows_weights():
    x = jax.random.normal(jax.random.key(2), (2, 3, 5, 16))
    found = []
    for function in (OURS["nnx"], THEIRS["nnx"]):
        layer = nnx.MultiHeadAttention(
            N,
            16,
            attention_fn=function,
            dropout_rate=0.5,
            broadcast_dropout=False,
            decode=False,
            rngs=nnx.Rngs(0),
        )
        run = nnx.capture(layer, nnx.Intermediate)
        _, sown = run(x, mask=nnx.make_causal_mask(x[..., 0]), sow_weights=True, deterministic=False)
        found.append(jax.tree.leaves(sown)[0])
    assert found[0].shape == (2, 3, N, 5, 5)
    assert_allclose(*found, atol=1e-6)


def test_linen_sows_weights():
    x = jax.random.normal(jax.random.key(2), (2, 3, 5, 16))
    found = []
    for function in (OURS["linen"], THEIRS["linen"]):
        apply, params = modules("linen", function)
        mask = linen.make_causal_mask(x[..., 0])
        _, sown = apply(params, x, mask=mask, sow_weights=True, mutable=["intermediates"])
        found.append(sown["intermediates"]["attention_weights"][0])
    assert found[0].shape == (2, 3, N, 5, 5)
    assert_allclose(*found, atol=1e-6)


@FLAX
def test_dropout_in_flax_modules(kind):
    x = jnp.tile(jax.random.normal(jax.random.key(2), (1, 12, 16)), (2, 1, 1))
    apply, params = modules(kind, OURS[kind], dropout_rate=0.4, broadcast_dropout=False)
    plain, plain_params = modules(kind, OURS[kind])
    exact = plain(plain_params, x)
    assert_array_equal(apply(params, x, deterministic=True), exact)
    first, again, other = (apply(params, x, jax.random.key(i), deterministic=False) for i in (3, 3, 4))
    assert_array_equal(first, again)
    assert jnp.abs(first - other).max() > 0.01 and jnp.abs(first - exact).max() > 0.01
    assert jnp.abs(first[0] - first[1]).max() > 0.01  # each row has bits of its own


@FLAX
def test_dropout_keeps_the_mean_and_has_the_variance_of_independent_bits(kind):
    rate, count = 0.4, 800
    given, _ = arrays(Case(lengths=(5, 24)))
    q, k, v = (given[name] for name in ("query", "key", "value"))

    def draw(key):
        return OURS[kind](q, k, v, dropout_rng=key, dropout_rate=rate, broadcast_dropout=False)

    drawn = np.asarray(jax.lax.map(jax.jit(draw), jax.random.split(jax.random.key(0), count)), np.float64)
    weights = np.asarray(jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(H)), np.float64)
    mean = np.einsum("bnts,bsnh->btnh", weights, v)
    variance = np.einsum("bnts,bsnh->btnh", weights**2, np.square(v, dtype=np.float64)) * rate / (1 - rate)
    off = (drawn.mean(0) - mean) / np.sqrt(variance / count)
    assert abs(off.mean()) < 0.2 and 0.9 < off.std() < 1.1 and np.abs(off).max() < 5
    assert_allclose(drawn.var(0).mean(), variance.mean(), rtol=0.05)


@FLAX
def test_what_flax_modules_ask_for_and_is_not_there_is_named(kind):
    x = jnp.ones((1, 3, 16))
    apply, params = modules(kind, OURS[kind], dropout_rate=0.4)
    with pytest.raises(NotImplementedError, match="broadcast_dropout=True .* pass broadcast_dropout=False"):
        apply(params, x, jax.random.key(0), deterministic=False)
    with pytest.raises(ValueError, match="dropout_rate=0.4 with deterministic=False needs a dropout_rng"):
        OURS[kind](*[jnp.ones((3, N, 4))] * 3, dropout_rate=0.4, broadcast_dropout=False)
    with pytest.raises(ValueError, match=r"does not broadcast to batch axes \[2\]"):
        OURS[kind](*[jnp.ones((2, 3, N, 4))] * 3, mask=jnp.ones((3, 1, 3, 3)))
    with pytest.raises(ValueError, match="batch axes of query"):
        OURS[kind](jnp.ones((2, 3, N, 4)), *[jnp.ones((3, 3, N, 4))] * 2)
    if kind == "linen":
        for name in ("einsum_dot_general", "qk_attn_weights_einsum", "attn_weights_value_einsum"):
            with pytest.raises(NotImplementedError, match=f"{name} is not supported"):
                OURS[kind](x, x, x, **{name: jnp.einsum})


def test_an_implementation_may_be_a_config():
    q = jnp.asarray(np.random.default_rng(0).standard_normal((1, 6, 2, 8), np.float32))
    expected = drop_in.dot_product_attention(q, q, q, implementation="chunked")
    out = drop_in.dot_product_attention(q, q, q, implementation=ChunkedConfig())
    assert_array_equal(out, expected)
    with pytest.raises(ValueError, match=r"unknown impl \['xla'\]; there are"):
        drop_in.dot_product_attention(q, q, q, implementation=["xla"])
