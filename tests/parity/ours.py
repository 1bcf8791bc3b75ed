"""Every call of attention_jax that the comparisons make: a mixer built, run, differentiated and decoded.

Parameters are a flat dict of NumPy arrays by path, such as "q/kernel".
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attention_jax.masks import Causal
from attention_jax.mixers import Context
from attention_jax.ops.decay_scan import decay_scan
from attention_jax.ops.delta_rule import delta_rule
from attention_jax.ops.selected import choose_blocks, selected_attention
from attention_jax.ops.softmax import dot_product_attention

# The option of a config that adds sink logits, and where they stand among the parameters.
SINK_LOGITS, SINK_LOGITS_PATH = {"sink_logits": True}, "sink_logits"

_OPS = {
    "decay_scan": decay_scan,
    "delta_rule": delta_rule,
    "selected_attention": selected_attention,
    "dot_product_attention": dot_product_attention,
}

# A prefill, single tokens, then two more pieces: what a stream of 24 tokens is decoded in.
PIECES = (9, 1, 1, 1, 1, 1, 5, 5)


def _whole(mixer, x_BTD):
    """The output of the parallel form."""
    return mixer(x_BTD)


def _appended(mixer, x_BTD, state, positions_BT):
    """The output of new tokens and the state with them appended."""
    return mixer.mix(x_BTD, state, ctx=Context(positions_BT=positions_BT))[:2]


class Mixer:
    """A mixer of the library as pure functions of its parameters."""

    def __init__(self, config: Any, d_model: int, *, causal: bool):
        module = config.build(d_model, nnx.Rngs(0), causal=causal)
        self._graphdef, self._state = nnx.split(module)
        self.start = {path: np.asarray(x) for path, x in _flatten(nnx.to_pure_dict(self._state)).items()}
        self._differentiated = jax.jit(self._forward_and_gradients)
        self._step = jax.jit(lambda params, *new: _appended(self._module(params), *new))

    def _module(self, params: dict[str, jax.Array]):
        tree = jax.tree_util.tree_map_with_path(lambda path, _: params[_name(path)], _pure(self._state))
        state = jax.tree.map(lambda x: x, self._state)
        nnx.replace_by_pure_dict(state, tree)
        return nnx.merge(self._graphdef, state)

    def _forward_and_gradients(self, params, x_BTD, cotangent_BTD):
        y_BTD, pull = jax.vjp(lambda params, x: _whole(self._module(params), x), params, x_BTD)
        return y_BTD, *pull(cotangent_BTD)

    def forward_and_gradients(self, params: dict[str, np.ndarray], x_BTD, cotangent_BTD):
        """(y, the gradients of sum(y * cotangent) by parameter, that of x)."""
        y_BTD, grads, dx_BTD = self._differentiated(params, x_BTD, cotangent_BTD)
        return np.asarray(y_BTD), {path: np.asarray(g) for path, g in grads.items()}, np.asarray(dx_BTD)

    def decoded(self, params: dict[str, np.ndarray], x_BTD: np.ndarray) -> np.ndarray:
        """The outputs of the same tokens, given piece by piece to a state."""
        B, T, _ = x_BTD.shape
        assert sum(PIECES) == T
        state = self._module(params).init_state(B, T)
        outputs, start = [], 0
        for length in PIECES:
            positions_BT = jnp.broadcast_to(jnp.arange(start, start + length), (B, length))
            y_BTD, state = self._step(params, x_BTD[:, start : start + length], state, positions_BT)
            outputs.append(np.asarray(y_BTD))
            start += length
        return np.concatenate(outputs, axis=1)


def _pure(state: nnx.State) -> dict:
    return nnx.to_pure_dict(state)


def _name(path: tuple) -> str:
    return "/".join(str(key.key) for key in path)


def _flatten(tree: dict) -> dict[str, Any]:
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def op(name: str, arguments: dict[str, Any], cotangents: list[np.ndarray], **options):
    """(the outputs of an op, the gradients of sum(outputs * cotangents) by argument)."""

    @jax.jit
    def run(arguments, cotangents):
        def call(arguments):
            out = _OPS[name](**arguments, **options)
            return out if isinstance(out, tuple) else (out,)

        outputs, pull = jax.vjp(call, arguments)
        return outputs, pull(tuple(cotangents))[0]

    outputs, grads = run(arguments, list(cotangents))
    return [np.asarray(y) for y in outputs], {key: np.asarray(g) for key, g in grads.items()}


def chosen_blocks(q_BTNH, k_BCKH, *, block: int, count: int) -> np.ndarray:
    """NSA's blocks of each query [B, T, K, count] where compressed and selected blocks are the same."""
    (B, T, _, H), C = q_BTNH.shape, k_BCKH.shape[1]
    ends_BC = np.broadcast_to(np.arange(block - 1, C * block, block), (B, C))
    positions_BT = np.broadcast_to(np.arange(T), (B, T))
    _, lse_BTN = dot_product_attention(
        q_BTNH, k_BCKH, k_BCKH, mask=Causal(), k_positions=ends_BC, return_lse=True
    )
    return np.asarray(choose_blocks(
        q_BTNH, k_BCKH, lse_BTN, scale=H**-0.5, compress_block=block, compress_stride=block,
        select_block=block, select_count=count, num_blocks=C, q_positions=positions_BT, k_positions=ends_BC,
    ))  # fmt: skip
