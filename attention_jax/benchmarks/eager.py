"""Calls outside of `jax.jit`, as in a notebook: what the host does counts beside the arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attention_jax.benchmarks.timing import cpu_clock, interleave, table

KINDS = ("softmax", "mla", "gla", "kda", "gated_deltanet", "performer", "nsa")
SIZES = ((2, 128), (2, 256), (1, 1024))
_PEER = "nnx"
_WIDTH = 256


def eager(args) -> list[dict[str, Any]]:
    """CPU milliseconds of mixers and of `flax.nnx.MultiHeadAttention`: a causal forward, a decoding step.

    CPU time of all threads of the process, because wall time grows with what else a machine does.
    """
    if _WIDTH // 2 % args.heads:  # gla's keys have half the model's width
        raise ValueError(f"--heads must divide {_WIDTH // 2}, half the width of the model, got {args.heads}")
    rows = []
    for B, T in [(args.batch, T) for T in args.lengths] or SIZES:
        both = {_PEER: _nnx(B, T, args.heads)} | {kind: _mixer(kind, B, T, args.heads) for kind in KINDS}
        for i, what in enumerate(("forward", "decoding step")):
            calls = {name: pair[i] for name, pair in both.items()}
            times = interleave(calls, args.rounds, clock=cpu_clock)
            rows += table(f"B={B} T={T} {what}", times, _PEER)
    return rows


def _inputs(B: int, T: int) -> Any:
    import jax

    return jax.random.normal(jax.random.key(0), (B, T, _WIDTH))


def _mixer(kind: str, B: int, T: int, heads: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """y [B, T, D] of whole rows, and y [B, 1, D] of their last token after a state of those before it."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from attention_jax.mixers import Context, make_config

    mixer = make_config(kind, num_heads=heads).build(_WIDTH, nnx.Rngs(0), causal=True)
    x, state = _inputs(B, T), mixer.init_state(B, T)
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    if T > 1:
        state = mixer.mix(x[:, :-1], state, ctx=Context(positions_BT=positions[:, :-1])).state
    last, before = x[:, -1:], positions[:, -1:] - 1

    def step():
        ctx = Context(positions_BT=before + 1)  # counts on in every step, as the other layer does inside
        return jax.block_until_ready(mixer.mix(last, state, ctx=ctx)).y

    return lambda: jax.block_until_ready(mixer(x)), step


def _nnx(B: int, T: int, heads: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The same of Flax's layer, without biases as ours are; its mask is made beforehand."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    layer = nnx.MultiHeadAttention(heads, _WIDTH, use_bias=False, decode=False, rngs=nnx.Rngs(0))
    x, mask = _inputs(B, T), nnx.make_causal_mask(jnp.ones((B, T)))
    layer.init_cache(x.shape)
    layer.cached_key.set_value(layer.key(x))
    layer.cached_value.set_value(layer.value(x))
    last, place = x[:, -1:], jnp.array(T - 1, jnp.int32)

    def step():
        layer.cache_index.set_value(place)  # each call moves it on by one
        return jax.block_until_ready((layer(last, decode=True), layer.cached_key[...]))[0]

    return lambda: jax.block_until_ready(layer(x, mask=mask)), step
