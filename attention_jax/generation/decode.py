"""Decoding with a state: `prefill`, `decode_step`, and the compiled loop of `generate`.

state = prefill(config, params, tokens_BT, positions_BT, capacity=2048)
token_B = state.logits_BV.argmax(-1)
state = decode_step(config, params, state, token_B)
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.caches import DEFAULT_CACHE, CacheOptions
from attention_jax.generation.sampling import Sampling, sample
from attention_jax.mixers import Context
from attention_jax.model import ModelConfig, bind, init_state


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """The state of decoding between two tokens.

    caches: the states of all layers. positions_B: int32, the position of the next token of each row.
    logits_BV: float32, the logits of that token.
    """

    caches: Any
    positions_B: jax.Array
    logits_BV: jax.Array


def prefill(
    config: ModelConfig,
    params: dict,
    tokens_BT: jax.Array,
    positions_BT: jax.Array | None = None,
    *,
    capacity: int,
    memory_BSD: jax.Array | None = None,
    memory_positions_BS: jax.Array | None = None,
    cache: CacheOptions = DEFAULT_CACHE,
) -> DecodeState:
    """The state after the prompts.

    Args:
      tokens_BT: prompts, left-padded if their lengths differ.
      positions_BT: their positions, -1 for padding; 0, 1, 2, ... by default.
      capacity: the largest position + 1 that the caches support.
      memory_BSD, memory_positions_BS: the memory of `cross` mixers, from `encode`; their caches keep it.
      cache: how the states are stored.

    A pure function: call it under `jax.jit` with config and capacity static. Raises: ValueError for more
    tokens than the capacity, for positions of another shape or padded on the right, for a model without a
    state, and for a token id outside the vocabulary (traced ids give NaN logits).
    """
    tokens_BT = tokens_BT if isinstance(tokens_BT, jax.Array) else np.asarray(tokens_BT)
    shape = tokens_BT.shape
    if len(shape) != 2 or not jnp.issubdtype(tokens_BT.dtype, jnp.integer):
        raise ValueError(f"tokens_BT must be integers [B, T], got {tokens_BT.dtype} {list(shape)}")
    if 0 in shape:
        raise ValueError(f"tokens must hold at least one row and one token, got {list(shape)}: skip the call")
    B, T = shape
    if T > capacity:
        raise ValueError(f"{T} tokens do not fit a cache of capacity {capacity}")
    positions_BT = _positions(positions_BT, B, T)
    ctx = Context(positions_BT, memory_BSD=memory_BSD, memory_positions_BS=memory_positions_BS)
    caches = init_state(config, B, capacity, cache=cache)
    logits_B1V, caches, _ = bind(config, params).run(tokens_BT, caches, ctx=ctx, last_only=True)
    return DecodeState(caches, positions_BT[:, -1] + 1, logits_B1V[:, 0])


def _positions(positions_BT: Any, B: int, T: int) -> jax.Array:
    """The positions of prompts as int32 [B, T]; ValueError for other shapes and for padding on the right."""
    if positions_BT is None:
        return jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    traced = isinstance(positions_BT, jax.core.Tracer)
    positions_BT = positions_BT if traced else np.asarray(positions_BT)
    shape = positions_BT.shape
    if shape not in ((T,), (1, T), (B, T)) or not jnp.issubdtype(positions_BT.dtype, jnp.integer):
        raise ValueError(f"positions_BT must be integers [{B}, {T}], got {positions_BT.dtype} {shape}")
    if not traced and ((positions_BT[..., -1:] < 0) & (positions_BT >= 0)).any():
        raise ValueError("prompts must be left-padded: a row of positions_BT ends in padding (-1)")
    return jnp.broadcast_to(jnp.asarray(positions_BT, jnp.int32), (B, T))


def decode_step(
    config: ModelConfig,
    params: dict,
    state: DecodeState,
    tokens_B: jax.Array,
    active_B: jax.Array | None = None,
) -> DecodeState:
    """The state after one more token of each row.

    active_B: boolean; the caches and the position of an inactive row do not change, and its logits are
    undefined. A token at a position past the capacity gives NaN logits.
    """
    positions_B = state.positions_B
    if jnp.shape(tokens_B) != positions_B.shape or not jnp.issubdtype(jnp.result_type(tokens_B), jnp.integer):
        shape, dtype = list(jnp.shape(tokens_B)), jnp.result_type(tokens_B)
        raise ValueError(f"tokens_B must be integers {list(positions_B.shape)}, got {dtype} {shape}")
    if active_B is not None:
        positions_B = jnp.where(active_B, positions_B, -1)
        tokens_B = jnp.where(active_B, tokens_B, 0)
    ctx = Context(positions_BT=positions_B[:, None])
    logits_B1V, caches, _ = bind(config, params).run(tokens_B[:, None], state.caches, ctx=ctx)
    step_B = 1 if active_B is None else active_B.astype(jnp.int32)
    return DecodeState(caches, state.positions_B + step_B, logits_B1V[:, 0])


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _prefill(config: ModelConfig, capacity: int, width: int, params, tokens_BT, positions_BT, source) -> dict:
    """The initial carry of `_decode`: a `DecodeState` and buffers for `width` new tokens per row."""
    memory, B = {}, tokens_BT.shape[0]
    if source is not None:
        memory_BSD = bind(config, params).encode(source[0], ctx=Context(positions_BT=source[1]))
        memory = {"memory_BSD": memory_BSD, "memory_positions_BS": source[1]}
    return {
        "decode": prefill(config, params, tokens_BT, positions_BT, capacity=capacity, **memory),
        "step": jnp.int32(0),
        "out": jnp.full((B, width), -1, jnp.int32),
        "done": jnp.zeros((B,), bool),
        "bad": jnp.zeros((B,), bool),
    }


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def _decode(config: ModelConfig, sampling: Sampling, params, keys_B, carry: dict, eos, limit) -> dict:
    """The carry after sampling until step `limit`, or until every row has sampled `eos`."""

    def unfinished(c):
        return (c["step"] < limit) & jnp.any(c["done"] == False)  # noqa: E712

    def draw(c):
        state = c["decode"]
        keys = jax.vmap(jax.random.fold_in)(keys_B, state.positions_B)
        token_B = sample(state.logits_BV, sampling, keys)
        bad_B = c["bad"] | ((token_B < 0) & (c["done"] == False))  # noqa: E712
        done_B = c["done"] | (token_B == eos) | bad_B
        # The states of finished rows do not change.
        state = decode_step(config, params, state, token_B, done_B == False)  # noqa: E712
        return {
            "decode": state,
            "step": c["step"] + 1,
            "out": jax.lax.dynamic_update_index_in_dim(
                c["out"], jnp.where(done_B, -1, token_B), c["step"], axis=1
            ),
            "done": done_B,
            "bad": bad_B,
        }

    return jax.lax.while_loop(unfinished, draw, carry)
