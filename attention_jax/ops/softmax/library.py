"""cuDNN's fused attention, through `jax.nn.dot_product_attention`, where it computes the same function.

It runs full, causal and windowed masks of 16-bit inputs on NVIDIA GPUs. Everything else is refused by name:
a dense mask costs it eight times the time of none, a float32 bias beside 16-bit inputs gave NaN gradients,
and its dropout draws other bits.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from attention_jax.masks import Causal, Full, Mask, SlidingWindow
from attention_jax.ops import derivatives
from attention_jax.ops.softmax.common import SoftmaxCall, platform

_NO_FORWARD = derivatives.no_forward_mode("cudnn", "dot_product_attention", use="reference")


def unsupported(call: SoftmaxCall) -> str | None:
    """Why cuDNN cannot run the call, forward and backward, or None."""
    if platform(call) != "gpu":
        return f"needs an NVIDIA GPU, the call runs on a {platform(call)}"
    if call.q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 and float16, the inputs are {call.q_BTNH.dtype}"
    if call.lse:
        return "its log-sum-exp is rounded to 16 bits and passes no gradient"
    given = {
        "positions or segment ids": not call.arange_positions,
        "a dense mask": call.mask_BNTS is not None,
        "a bias": call.bias is not None,
        "sink logits": call.sink_logits_N is not None,
        "a softcap": call.softcap is not None,
        "dropout by position": call.dropout_rate > 0,
    }
    for what, is_given in given.items():
        if is_given:
            return f"does not compute {what}"
    options = _options(call.mask)
    if options is None:
        return f"has no mask {call.mask}; it has Full(), Causal() and SlidingWindow(w)"
    _, T, S, *_ = call.sizes
    if T != S and call.mask != Full():
        return f"aligns a mask of {T} queries and {S} keys otherwise"
    return _refusal(call, options)


def attend(call: SoftmaxCall) -> tuple[jax.Array, None]:
    """(out_BTNM in q's dtype, no log-sum-exp)."""
    options = _options(call.mask)
    assert options is not None
    call = derivatives.reverse_only(_NO_FORWARD, call)
    return _run(call, options, call.q_BTNH, call.k_BSKH, call.v_BSKM), None


def _options(mask: Mask) -> dict[str, Any] | None:
    if mask == Full():
        return {}
    if mask == Causal():
        return {"is_causal": True}
    if isinstance(mask, SlidingWindow) and mask.right == 0:
        # Without is_causal a window of (w - 1, 0) would see the future.
        return {"is_causal": True, "local_window_size": (mask.window - 1, 0)}
    return None


def _run(call: SoftmaxCall, options: dict[str, Any], q, k, v) -> jax.Array:
    return jax.nn.dot_product_attention(q, k, v, scale=call.scale, implementation="cudnn", **options)


def _refusal(call: SoftmaxCall, options: dict[str, Any]) -> str | None:
    """Why cuDNN refuses the shapes, those of the backward included, or None; nothing is computed."""

    def both(q, k, v):
        out, pullback = jax.vjp(functools.partial(_run, call, options), q, k, v)
        return pullback(out)

    try:
        jax.eval_shape(both, call.q_BTNH, call.k_BSKH, call.v_BSKM)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        return " ".join(str(error).split()) or type(error).__name__
    return None
