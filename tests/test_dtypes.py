"""Dtypes stay what they are under `jax_enable_x64`, strict promotion and without promotion of ranks.

Programs are traced, not compiled. Also: empty batches.
"""

import contextlib
import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from attention_jax.biases import T5, ALiBi
from attention_jax.caches import DEFAULT_CACHE, CacheOptions
from attention_jax.generation import DraftModel, NGram, decode, loop, speculative
from attention_jax.generation.arrays import pack
from attention_jax.generation.sampling import Sampling
from attention_jax.masks import BigBird, Causal, Dilated, Global, Longformer, Strided
from attention_jax.mixers import AttentionConfig, Context, CrossAttentionConfig, make_config
from attention_jax.model import EncoderConfig, ModelConfig, apply, init_params
from attention_jax.ops.decay_scan import decay_scan, decay_weights
from attention_jax.ops.delta_rule import delta_rule, delta_weights
from attention_jax.ops.selected import selected_attention, selected_weights
from attention_jax.ops.softmax import attention_weights, dot_product_attention
from attention_jax.positions import RoPE
from tests import marks
from tests.mixers import BIDIRECTIONAL, BIDIRECTIONAL_ONLY, CROSS, D_MODEL, MIXERS
from train.config.sections import OptimizerConfig
from train.optimizer import make_optimizer
from train.step import make_eval_step, make_fill_in, make_train_step

B, T, CAPACITY = 2, 11, 24
CAUSAL = MIXERS | {"cross": types.SimpleNamespace(config=CROSS, slow=False)}
ROWS = CAUSAL | BIDIRECTIONAL | BIDIRECTIONAL_ONLY


@contextlib.contextmanager
def strict():
    """64 bits are on, and no operation converts a dtype or adds an axis unless it is told to."""
    with (
        jax.enable_x64(True),
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
    ):
        yield


def shape(*sizes, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def dtypes(tree):
    return jax.tree.map(lambda x: x.dtype.name, tree)


@functools.cache
def module(name: str, dtype):
    """(graphdef, parameters as shapes)."""
    config = ROWS[name].config
    init = nnx.initializers.normal(0.02)
    options = {"dtype": dtype, "kernel_init": init, "out_init": init, "causal": name in CAUSAL}
    with strict():
        return nnx.split(nnx.eval_shape(lambda: config.build(D_MODEL, nnx.Rngs(0), **options)))


def context(name: str, rows: int, tokens: int, packed: bool, dtype) -> dict:
    config = ROWS[name].config
    ids = shape(rows, tokens)
    given = {"positions_BT": ids} | ({"segment_ids_BT": ids} if packed and not config.mixes_whole_row else {})
    return given | ({"memory_BSD": shape(rows, 7, D_MODEL, dtype=dtype)} if name == "cross" else {})


def keeps_its_dtypes(name: str, dtype) -> None:
    config = ROWS[name].config
    graphdef, params = module(name, dtype)
    assert set(jax.tree.leaves(dtypes(params))) == {"float32"}
    x = shape(B, T, D_MODEL, dtype=dtype)

    def mix(params, x, state, ctx):
        return nnx.merge(graphdef, params).mix(x, state, ctx=Context(**ctx))

    def loss(params, x, ctx):
        y = mix(params, x, None, ctx).y
        return y.astype(jnp.float32).sum(), y

    with strict():
        ctx = context(name, B, T, True, dtype)
        gradients, y = jax.eval_shape(jax.grad(loss, (0, 1), has_aux=True), params, x, ctx)
        assert (y.dtype, gradients[1].dtype) == (dtype, dtype)
        assert dtypes(gradients[0]) == dtypes(params)
        if name in CAUSAL:
            ctx = context(name, B, T, False, dtype)
            for cache in (CacheOptions(dtype), CacheOptions(dtype, 3, "int8", 2)):
                state = jax.eval_shape(
                    lambda cache=cache: config.init_state(D_MODEL, B, CAPACITY, causal=True, cache=cache)
                )
                found = jax.eval_shape(mix, params, x, state, ctx)
                assert found.y.dtype == dtype and dtypes(found.state) == dtypes(state)
                rewound = jax.eval_shape(lambda state, n_B: state.rewind(n_B), found.state, shape(B))
                assert dtypes(rewound) == dtypes(state)


# One row per mechanism; the others have the same code.
_PLAIN = {"gqa-rope", "qk-l2-scale-sinks", "xpos", "cross"}

_SIBLINGS = {
    "linear-identity-norm",
    "cosformer",
    "differential",
    "forgetting",
    "deltanet",
    "gated-deltanet",
    "retention",
    "lightning",
    "linear-rope",
    "hedgehog",
    "gated",
}


@pytest.mark.parametrize(
    "name",
    marks.params(
        {name: marks.Row(name, slow=row.slow or (row.config.kind == "softmax" and name not in _PLAIN)
                         or name.endswith("-both") or name in _SIBLINGS) for name, row in ROWS.items()}
    ),
)  # fmt: skip
def test_a_bfloat16_mixer_keeps_its_dtypes(name):
    keeps_its_dtypes(name, jnp.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_a_float32_mixer_keeps_its_dtypes(name):
    keeps_its_dtypes(name, jnp.float32)


N, K, H = 4, 2, 6


def _attend(impl, **options):
    def run(q, k, ids, beta, sinks):
        given = {name: f(sinks) if callable(f) else f for name, f in options.items()}
        out, lse = dot_product_attention(
            q, k, k, impl=impl, q_positions=ids, k_positions=ids, segment_ids=ids, return_lse=True, **given
        )
        return out.astype(jnp.float32).sum() + lse.sum() + attention_weights(q, k, segment_ids=ids).sum()

    return run


def _select(impl):
    def run(q, k, ids, beta, sinks):
        blocks = jnp.broadcast_to(jnp.maximum(ids, 0)[:, :, None, None], (B, T, K, 2))
        options = {"block_size": 4, "segment_ids": ids, "q_positions": ids, "k_positions": ids}
        return (
            selected_attention(q, k, k, blocks, impl=impl, **options).astype(jnp.float32).sum()
            + selected_weights(q, k, blocks, **options).sum()
        )

    return run


def _recur(op, weights, impl, kind, **options):
    def run(q, k, ids, beta, sinks):
        log_decay = {
            "none": None, "constant": -jnp.abs(sinks), "token": -beta,
            "channel": -jnp.broadcast_to(beta[..., None], (B, T, N, H)),
        }[kind]  # fmt: skip
        options_ = options | {"log_decay": log_decay, "segment_ids": ids, "positions": ids}
        args = (q, k, q, beta) if op is delta_rule else (q, k, q)
        y, state = op(*args, return_state=True, impl=impl, **options_)
        w = weights(*(args[:2] if op is decay_scan else (q, k, beta)), **options_)
        return y.astype(jnp.float32).sum() + state.sum() + w.sum()

    return run


TABLE = T5().over(True)
_FAST = {("reference", "sinks"), ("chunked", "strided")}
OPS = {
    f"softmax {impl} {what}": marks.Row(_attend(impl, **options), slow=(impl, what) not in _FAST)
    for impl in ("reference", "chunked")
    for what, options in {
        "alibi": {"bias": ALiBi(N)},
        "t5": {"bias": lambda sinks: TABLE.of(jnp.broadcast_to(sinks[None], (32, N)))},
        "sinks": {
            "sink_logits_N": lambda sinks: sinks, "softcap": 2.0, "dropout_rate": 0.3, "mask": Causal(),
            "dropout_key": jax.random.PRNGKey(0),
        },
        "strided": {"mask": Strided(5) | Dilated(3, 4) | Global((0, 3, 9))},
        "bigbird": {"mask": BigBird(4, 3, 1, 2, 5)},
        "longformer": {"mask": Longformer(8, (0, 20))},
    }.items()
}  # fmt: skip
OPS |= {f"selected {impl}": marks.Row(_select(impl)) for impl in ("reference", "gathered")}
OPS |= {
    f"decay_scan {impl} {kind} {normalize}": marks.Row(
        _recur(decay_scan, decay_weights, impl, kind, normalize=normalize),
        slow=(kind, normalize) != ("constant", True),
    )
    for impl in ("recurrent", "chunked", "quadratic")
    for kind in ("none", "constant", "token", "channel")
    for normalize in (True, False)
}
OPS |= {
    f"delta_rule {impl} {kind}": marks.Row(
        _recur(delta_rule, delta_weights, impl, kind), slow=kind != "token"
    )
    for impl in ("recurrent", "chunked", "quadratic")
    for kind in ("none", "token", "channel")
}


@pytest.mark.parametrize("name", marks.params(OPS))
def test_an_op_converts_nothing_in_silence(name):
    q, k = (shape(B, T, n, H, dtype=jnp.bfloat16) for n in (N, K))
    given = (q, k, shape(B, T), shape(B, T, N, dtype=jnp.float32), shape(N, dtype=jnp.float32))
    with strict():
        gradient = jax.eval_shape(jax.grad(OPS[name].value, (0, 1, 3, 4)), *given)
    assert [x.dtype for x in gradient] == [jnp.bfloat16, jnp.bfloat16, jnp.float32, jnp.float32]


MODEL = ModelConfig(
    vocab_size=11, d_model=16, num_layers=2, mixers=(AttentionConfig(num_heads=2, rope=RoPE()),),
    mlp_width=24, dtype="bfloat16", dropout=0.1,
)  # fmt: skip
MODELS = {
    "decoder": marks.Row((MODEL, {"accumulation_steps": 2})),
    "scanned": marks.Row(
        (
            ModelConfig(
                vocab_size=11, d_model=16, num_layers=2, mixers=(AttentionConfig(num_heads=2),), mlp_width=24,
                scan_layers=True, remat="dots_saveable", norm="layernorm", use_bias=True, mlp="geglu",
                sinusoidal=True, tie_embeddings=False, logit_softcap=3.0,
            ),
            {"schedule": "wsd", "decay_steps": 5, "clip_norm": None},
        ),
        slow=True,
    ),
    "encoder": marks.Row(
        (
            ModelConfig(
                vocab_size=11, d_model=16, num_layers=2, mlp_width=24, max_positions=32, mlp="gelu",
                mixers=(AttentionConfig(num_heads=2), CrossAttentionConfig(num_heads=2)),
                encoder=EncoderConfig(num_layers=1, mixers=(AttentionConfig(num_heads=2),)),
            ),
            {"schedule": "constant"},
        ),
        slow=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", marks.params(MODELS))
def test_a_training_step_keeps_every_dtype(name):
    model, changes = MODELS[name].value
    optimizer = OptimizerConfig(**({"learning_rate": 1e-2, "warmup_steps": 1} | changes))
    batch = {key: shape(4, 8) for key in ("tokens", "targets", "positions", "segment_ids")}
    if model.encoder is not None:
        batch |= {"sources": shape(4, 6), "source_positions": shape(4, 6)}
    with strict():
        params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
        state = jax.eval_shape(make_optimizer(optimizer, 100).init, params)
        step = make_train_step(model, optimizer, 100)
        found = jax.eval_shape(step, params, state, batch, shape(), jax.random.key(0))
        scores = jax.eval_shape(make_eval_step(model, accuracy=True), params, batch)
        filled = jax.eval_shape(make_fill_in(model), params, batch)
    assert set(jax.tree.leaves(dtypes(params))) == {"float32"}
    assert dtypes(found[:2]) == dtypes((params, state))
    names = {"train/loss": "float32", "grad_norm": "float32", "learning_rate": "float32"}
    assert dtypes(found[2]) == names | {"tokens": "int32", "finite": "bool"}
    assert dtypes(scores) == ("float32", "int32", "int32") and filled.dtype == jnp.int32


def test_generation_keeps_every_dtype():
    """Of the carry, of every branch that a row may need, and of the log-probabilities."""
    sampling = Sampling(1.0, 3, 0.9, 0.1, 1.1, 0.1, 0.1, {3: 1.0}, 2, logprobs=2)
    arrays = pack([sampling, sampling], MODEL.vocab_size)
    with strict():
        params = jax.eval_shape(lambda: init_params(MODEL, jax.random.key(0)))
        carry = jax.eval_shape(
            lambda *x: loop._start(MODEL, 16, 8, DEFAULT_CACHE, x[0], None, *x[1:], None, None),
            params, shape(2, 16), shape(2), shape(),
        )  # fmt: skip
        keys = jax.random.split(jax.random.key(0), 2)
        found, drawn = jax.eval_shape(
            lambda *x: loop._advance(MODEL, None, *x),
            params, keys, arrays, carry, shape(2, dtype=bool), shape(),
        )  # fmt: skip
    assert dtypes(found) == dtypes(carry)
    assert dtypes(drawn) == loop.Drawn("int32", "float32", "int32", "float32")


def test_speculation_keeps_every_dtype():
    """Of the carry with past states, and of what each proposer carries."""
    mixers = (AttentionConfig(num_heads=2, rope=RoPE()), make_config("gated_deltanet", num_heads=2))
    config = dataclasses.replace(MODEL, mixers=mixers, num_layers=2, encoder=None)
    sampling = Sampling(1.0, 3, 0.9, 0.1, 1.1, 0.1, 0.1, {3: 1.0}, 2, logprobs=2)
    arrays = pack([sampling, sampling], config.vocab_size)
    with strict():
        params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
        carry = jax.eval_shape(
            lambda *x: loop._start(config, 16, 8, CacheOptions(spare=3), x[0], None, *x[1:], None, None),
            params, shape(2, 16), shape(2), shape(),
        )  # fmt: skip
        keys = jax.random.split(jax.random.key(0), 2)
        counts = speculative.Counts(shape(2), shape(2), shape(), shape())
        for proposer, own in ((NGram(3), shape(2, 2)), (DraftModel(config, params, 3), carry.state)):
            found, own_after, counted, drawn = jax.eval_shape(
                lambda *x: speculative._advance(config, None, *x),
                params, keys, arrays, proposer, carry, own, counts, shape(2, dtype=bool), shape(),
            )  # fmt: skip
            assert dtypes((found, own_after, counted)) == dtypes((carry, own, counts))
            assert dtypes(drawn) == loop.Drawn("int32", "float32", "int32", "float32")


# One row for each way in; all mixers share the check.
EMPTY = ("gqa-rope", "mla", "nsa-rope", "mamba2", "kda", "performer", "based", "nystromformer", "cross")


@pytest.mark.parametrize("sizes", [(0, 5), (2, 0)])
def test_an_empty_batch_is_refused_in_one_line(sizes):
    """By every mixer with and without a state, by the model and by prefill."""
    wrong = "must hold at least one row and one token"
    for name in EMPTY if sizes[0] else ("gqa-rope",):
        graphdef, params = module(name, jnp.bfloat16)
        x = shape(*sizes, D_MODEL, dtype=jnp.bfloat16)
        for stateful in (False, True) if name in CAUSAL else (False,):
            ctx = context(name, *sizes, False, jnp.bfloat16)
            state = ROWS[name].config.init_state(D_MODEL, sizes[0], CAPACITY) if stateful else None
            with pytest.raises(ValueError, match=wrong):
                jax.eval_shape(
                    lambda params, x, state, ctx, graphdef=graphdef: nnx.merge(graphdef, params).mix(
                        x, state, ctx=Context(**ctx)
                    ).y,
                    params, x, state, ctx,
                )  # fmt: skip
    params = jax.eval_shape(lambda: init_params(MODEL, jax.random.key(0)))
    for run in (apply, functools.partial(decode.prefill, capacity=8)):
        with pytest.raises(ValueError, match=wrong):
            jax.eval_shape(lambda params, tokens, run=run: run(MODEL, params, tokens), params, shape(*sizes))


@pytest.mark.parametrize("axis", range(2))
def test_an_op_refuses_empty_axes_in_one_line(axis):
    def cut(*sizes):
        return shape(*(0 if i == axis else n for i, n in enumerate(sizes)), dtype=jnp.float32)

    x = cut(B, T, N, H)
    calls = {
        "softmax": lambda: dot_product_attention(x, x, x),
        "decay_scan": lambda: decay_scan(x, x, x),
        "delta_rule": lambda: delta_rule(x, x, x, cut(B, T, N)),
        "selected": lambda: selected_attention(x, x, x, shape(*x.shape[:3], 1), block_size=2),
    }
    for call in calls.values():
        with pytest.raises(ValueError, match="q must be .* without empty axes, got"):
            call()
