"""The two compiled pieces of generation: a prefill, and a `lax.while_loop` over single tokens."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from attention_jax.generation.sampling import Sampling, sample
from attention_jax.mixers import Context
from attention_jax.model import ModelConfig, bind


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _prefill(config: ModelConfig, capacity: int, width: int, params, tokens_BT, positions_BT, source) -> dict:
    model, B = bind(config, params), tokens_BT.shape[0]
    memory = None
    if source is not None:
        memory = (model.encode(source[0], ctx=Context(positions_BT=source[1])), source[1])
    state = model.init_state(B, capacity, memory=memory)
    x_BTD, state = model.hidden(tokens_BT, state, ctx=Context(positions_BT=positions_BT))
    return {
        "state": state,
        "logits": model.logits(x_BTD[:, -1]),
        "position": positions_BT[:, -1] + 1,
        "step": jnp.int32(0),
        "out": jnp.full((B, width), -1, jnp.int32),
        "done": jnp.zeros((B,), bool),
        "bad": jnp.zeros((B,), bool),
    }


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def _decode(config: ModelConfig, sampling: Sampling, params, keys_B, carry: dict, eos, limit) -> dict:
    """Tokens until `limit` have been drawn or every row has met `eos`."""
    model = bind(config, params)

    def undone(c):
        return (c["step"] < limit) & jnp.any(c["done"] == False)  # noqa: E712

    def draw(c):
        keys = jax.vmap(jax.random.fold_in)(keys_B, c["position"])
        token_B = sample(c["logits"], sampling, keys)
        # A row of NaN or -inf has no largest logit; categorical and argmax would answer 0.
        bad_B = c["bad"] | ((jnp.isfinite(c["logits"].max(-1)) == False) & (c["done"] == False))  # noqa: E712
        done_B = c["done"] | (token_B == eos) | bad_B
        position_B = jnp.where(done_B, -1, c["position"])  # a finished row leaves its state unchanged
        x_BTD, state = model.hidden(
            jnp.where(done_B, 0, token_B)[:, None], c["state"], ctx=Context(positions_BT=position_B[:, None])
        )
        return {
            "state": state,
            "logits": model.logits(x_BTD[:, 0]),
            "position": c["position"] + 1,
            "step": c["step"] + 1,
            "out": jax.lax.dynamic_update_index_in_dim(
                c["out"], jnp.where(done_B, -1, token_B), c["step"], axis=1
            ),
            "done": done_B,
            "bad": bad_B,
        }

    return jax.lax.while_loop(undone, draw, carry)
