"""The compiled loop over tokens reads weights and caches and does nothing else to them; prepared weights."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from attention_jax.caches import CacheOptions
from attention_jax.feed_forwards import ExpertsConfig
from attention_jax.generation import NGram, Sampling, loop, speculative
from attention_jax.generation.arrays import pack
from attention_jax.generation.decode import decode_step, prefill
from attention_jax.masks import SlidingWindow
from attention_jax.mixers import make_config
from attention_jax.model import (
    BlockConfig,
    ModelConfig,
    Prepared,
    apply,
    bind,
    init_params,
    prepare_for_decoding,
)
from attention_jax.positions import RoPE
from tests.hlo import loop_instructions

# No two of the widths are multiples of one another, so that a size names its array.
CAPACITY, HEADS = 701, {"num_heads": 4}
MODELS = {
    "mha": make_config("softmax", rope=RoPE(), **HEADS),
    "gqa, scanned": make_config("softmax", num_kv_heads=2, rope=RoPE(), **HEADS),
    "mqa": make_config("softmax", num_kv_heads=1, **HEADS),
    "mla": make_config("mla", latent_dim=30, head_dim=22, rotary_dim=8, **HEADS),
    "window": make_config("softmax", mask=SlidingWindow(97), **HEADS),
    "nsa": make_config("nsa", select_block=16, select_count=3, window=97, **HEADS),
    "linear": make_config("linear", **HEADS),
    "gated delta": make_config("gated_deltanet", **HEADS),
    "mamba2": make_config("mamba2", head_dim=44, state_dim=26),
}
# What may have an array of that size as its result: what computes nothing, and updates in place.
_HARMLESS = {"parameter", "get-tuple-element", "tuple", "while", "bitcast", "dynamic-update-slice"}


def _config(name: str, mixer) -> ModelConfig:
    return ModelConfig(
        vocab_size=211,
        d_model=88,
        num_layers=2,
        mixers=(mixer,),
        mlp_width=183,
        init_std=0.1,
        scan_layers="scanned" in name,
    )


def _loop(config: ModelConfig, weights, state):
    def step(_, state):
        return decode_step(config, weights, state, state.logits_BV.argmax(-1).astype(jnp.int32))

    return jax.lax.fori_loop(0, 7, step, state)


def _program(config: ModelConfig, weights) -> tuple[list, int]:
    """The instructions of the loop, and the size of the smallest kernel of a layer or array of a KV cache."""
    tokens = jnp.zeros((1, 5), jnp.int32)
    state = jax.eval_shape(lambda w: prefill(config, w, tokens, capacity=CAPACITY), weights)
    compiled = jax.jit(_loop, static_argnums=0, donate_argnums=2).lower(config, weights, state).compile()
    return loop_instructions(compiled.as_text()), _smallest(config, weights, state)


def _smallest(config: ModelConfig, weights, state) -> int:
    kernels = jax.tree.leaves(jax.eval_shape(lambda w: prepare_for_decoding(config, w), weights).weights)
    sizes = [x.size for x in kernels if x.ndim > 1 and min(x.shape) > 16 and config.d_model in x.shape]
    sizes += [x.size for x in jax.tree.leaves(state.caches) if x.ndim == 4 and x.shape[1] >= 97]
    return min(sizes)


def _touched(config: ModelConfig, weights) -> list[str]:
    """`_large` of the loop over `decode_step`."""
    return _large(*_program(config, weights))


def _large(instructions: list, smallest: int, queries: int = 1) -> list[str]:
    """The instructions that make an array as large as a weight or a whole cache.

    Scores apart, and what only a step with NaN or Inf runs.
    """
    updates = {x.size for x in instructions if x.opcode == "dynamic-update-slice"}
    return [
        x.text
        for x in instructions
        if x.size >= smallest
        and x.opcode not in _HARMLESS
        and not (x.opcode == "fusion" and x.size in updates)  # the fusion around an update
        and x.size != CAPACITY * HEADS["num_heads"] * queries
    ]


@pytest.mark.parametrize("name", MODELS)
def test_the_loop_neither_moves_nor_converts_weights_and_caches(name):
    config = _config(name, MODELS[name])
    weights = jax.eval_shape(lambda: prepare_for_decoding(config, init_params(config, jax.random.key(0))))
    states = {"linear", "gated delta", "mamba2"}  # a recurrent state is computed anew by every token
    found = [x for x in _touched(config, weights) if name not in states or _is_matrix(x, weights)]
    assert not found, found


@pytest.mark.parametrize("speculation", [None, NGram(2, longest=3)], ids=["plain", "speculative"])
def test_the_loop_of_generate_neither_moves_nor_converts_weights_and_caches(speculation):
    config, K = _config("mha", MODELS["mha"]), 0 if speculation is None else speculation.num_tokens
    weights = jax.eval_shape(lambda: prepare_for_decoding(config, init_params(config, jax.random.key(0))))
    tokens, one = jnp.zeros((1, CAPACITY), jnp.int32), jnp.ones((1,), jnp.int32)
    started = (None, tokens, one, jnp.int32(1), None, None)
    carry = jax.eval_shape(
        lambda w: loop._start(config, CAPACITY, 5, CacheOptions(spare=K), w, *started), weights
    )
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    arrays, ended, limit = pack([Sampling(0)], 211, eos=None, max_tokens=[9]), np.zeros(1, bool), np.int32(7)
    if speculation is None:
        program = loop._advance.lower(config, None, weights, keys, arrays, carry, ended, limit)
    else:
        own, counts = jnp.zeros((1, 2), jnp.int32), speculative.Counts(one, one, jnp.int32(0), jnp.int32(0))
        program = speculative._advance.lower(
            config, None, weights, keys, arrays, speculation, carry, own, counts, ended, limit
        )
    found = loop_instructions(program.compile().as_text())
    assert any(x.opcode == "dynamic-update-slice" for x in found)
    large = _large(found, _smallest(config, weights, carry.state), K + 1)
    assert not large, large


def _is_matrix(text: str, weights: Prepared) -> bool:
    shapes = {
        str(list(s)).replace(" ", "") for x in jax.tree.leaves(weights) for s in (x.shape, x.shape[::-1])
    }
    return any(shape in text.split(" = ")[1].split("(")[0] for shape in shapes if shape.count(","))


def test_the_loop_reads_only_the_chosen_experts():
    """One expert is copied at a time, never all of them; the rest is as for dense layers."""
    experts = ExpertsConfig(num_experts=6, width=183)
    blocks = (BlockConfig(MODELS["mha"], experts),)
    config = dataclasses.replace(
        _config("mha", MODELS["mha"]), mixers=ModelConfig.mixers, mlp_width=None, blocks=blocks
    )
    weights = jax.eval_shape(lambda: prepare_for_decoding(config, init_params(config, jax.random.key(0))))
    found = _touched(config, weights)
    one = [x for x in found if re.search(r" = f32\[(1,)?(88,183|183,88)\]", x)]
    assert one and found == one, found


def test_weights_that_are_not_prepared_are_moved():
    config = _config("mha", MODELS["mha"])
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    touched = _touched(config, params)
    assert all(any(f" {opcode}(" in x for x in touched) for opcode in ("slice", "transpose", "copy"))


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_prepared_weights_give_the_same_logits(dtype):
    """In the parallel form, in a prefill and token by token, with tied and untied heads, biases and norms."""
    mixers = (
        make_config("softmax", num_kv_heads=2, use_bias=True, rope=RoPE(), **HEADS),
        make_config("mla", latent_dim=8, head_dim=8, rotary_dim=4),
    )
    config = ModelConfig(
        vocab_size=31, d_model=32, num_layers=2, mixers=mixers, use_bias=True, dtype=dtype, init_std=0.1,
        tie_embeddings=dtype == "float32",
    )  # fmt: skip
    params = init_params(config, jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.01 * jax.random.normal(jax.random.key(x.size), x.shape), params)
    prepared = prepare_for_decoding(config, params)
    assert prepare_for_decoding(config, prepared) is prepared
    tokens = np.random.default_rng(0).integers(0, 31, (2, 12))

    @jax.jit
    def run(weights):
        state = prefill(config, weights, tokens[:, :9], capacity=16)

        def step(state, tokens_B):
            state = decode_step(config, weights, state, tokens_B)
            return state, state.logits_BV

        _, logits_TBV = jax.lax.scan(step, state, jnp.asarray(tokens[:, 9:].T))
        return apply(config, weights, tokens).logits, jnp.concatenate([state.logits_BV[None], logits_TBV])

    tolerance = {"float32": 1e-5, "bfloat16": 0.06}[dtype]
    (whole, steps), plain = run(prepared), run(params)
    assert_allclose(whole, plain[0], atol=tolerance)
    assert_allclose(steps, plain[1], atol=tolerance)
    assert_allclose(whole[:, 8:], steps.swapaxes(0, 1), atol=tolerance)


def test_prepared_weights_of_a_bfloat16_model_are_rounded_and_stored_for_the_platform():
    config = dataclasses.replace(_config("mha", MODELS["mha"]), dtype="bfloat16")
    params = init_params(config, jax.random.key(0))
    kernel = prepare_for_decoding(config, params).weights["stacks"]["blocks"][0]["mixer"]["out"]["kernel"]
    assert kernel.dtype == (jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    wanted = params["stacks"]["0"]["mixer"]["out"]["kernel"][0].T.astype(jnp.bfloat16)
    np.testing.assert_array_equal(kernel.astype(jnp.float32), wanted.astype(jnp.float32))


def test_prepared_weights_belong_to_one_configuration():
    config = _config("mqa", MODELS["mqa"])
    prepared = prepare_for_decoding(config, init_params(config, jax.random.key(0)))
    other = dataclasses.replace(config, mlp="geglu")
    with pytest.raises(
        ValueError, match=r"prepared for another configuration \(mlp differs\): call prepare_for"
    ):
        bind(other, prepared)
