"""Softmax attention on a TPU: Pallas kernels over live blocks, forward and backward.

    x_s = log2(e) (softcap(q . k_s scale) + bias_s),  m' = max(m, max_s x_s),
    l' = l 2^(m-m') + sum_s 2^(x_s-m'),  a' = a 2^(m-m') + sum_s 2^(x_s-m') v_s,
    out = a / l,  lse = (m + log2 l) / log2(e)

over the key blocks that a query block sees (Milakov & Gimelshein 2018, arXiv 1805.02867; Dao et al. 2022,
arXiv 2205.14135; block lists as in JAX's splash attention). The grid has one step per live block
(`steps`); full blocks run no mask code, partial ones run `mask.keep` inside the kernel
(`scores`).

The backward is one kernel with five matrix products per block. Scores are transposed, [keys, queries], so
that what belongs to a query (lse, delta) lies along the lanes and P and dS feed dV and dK as they are. The
query blocks of all heads of a group pass by one key block after another; dQ gathers in VMEM for all of them,
transposed, and each query block is written when its last key block has passed. Where dQ does not fit,
the queries come in parts, and partial sums of dK and dV are added afterwards.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from attention_jax.ops import derivatives
from attention_jax.ops.softmax.common import SoftmaxCall, kernel_refusal, platform
from attention_jax.ops.softmax.mosaic_tpu import plan, steps
from attention_jax.ops.softmax.mosaic_tpu.backward import backward
from attention_jax.ops.softmax.mosaic_tpu.bias import bias_refusal, mask_refusal
from attention_jax.ops.softmax.mosaic_tpu.config import WIDEST, MosaicTPUConfig
from attention_jax.ops.softmax.mosaic_tpu.forward import forward
from attention_jax.ops.softmax.mosaic_tpu.plan import forced

__all__ = ["MosaicTPUConfig", "attend", "forced", "unsupported"]

DEFAULT = MosaicTPUConfig()

_NO_FORWARD = derivatives.no_forward_mode("mosaic_tpu", "dot_product_attention", use="reference")
_NO_SECOND = (
    "impl='mosaic_tpu' of dot_product_attention has no second derivative: use impl='reference', or "
    "jax.jvp of jax.grad with impl='chunked'"
)

_MAX_DENSE = 2**28  # entries of a dense mask made from a Mask object


def unsupported(call: SoftmaxCall, config: MosaicTPUConfig = DEFAULT) -> str | None:
    """Why the kernels cannot run the call, forward or backward; None where they can."""
    if plan.only_on_tpu() and platform(call) != "tpu":
        return f"needs a TPU, the call runs on a {platform(call)}"
    if why_not := kernel_refusal(call):
        return why_not
    if plan.vmem(config) is None:
        return f"{plan.chip()}; blocks are chosen for TPU v5e, v5p and v6e"
    _, T, S, _, _, H, M = call.sizes
    if call.q_BTNH.dtype not in (jnp.float32, jnp.bfloat16):
        return f"{call.q_BTNH.dtype}; a TPU multiplies bfloat16 and float32"
    if max(H, M) > WIDEST:
        return f"heads {max(H, M)} wide; the kernels hold at most {WIDEST}"
    why_not = mask_refusal(call.mask)
    if why_not and not call.arange_positions:
        return f"{call.mask} needs {why_not} in a kernel, and positions are given"
    if why_not and T * S > _MAX_DENSE:
        return f"{call.mask} needs {why_not} in a kernel, and is no array beyond {_MAX_DENSE} entries"
    if call.bias is not None and (refused := bias_refusal(call.bias)):
        return refused
    return _too_long(call, config)


def _too_long(call: SoftmaxCall, config: MosaicTPUConfig) -> str | None:
    """Why block lists do not fit scalar memory, or dQ a bounded number of parts; None where they do."""
    for is_backward in (False, True):
        geometry = plan.TPUGeometry.of(call, config, is_backward)
        if geometry.parts > steps.MAX_PARTS:
            return (
                f"dQ of {geometry.G} heads x {geometry.T_pad} queries needs {geometry.parts} sweeps over the "
                f"keys; the limit is {steps.MAX_PARTS}"
            )
        rows = 1 if call.arange_positions else call.sizes[0]
        block_map = plan.static_map(call, geometry) if call.arange_positions else geometry.all_blocks
        if is_backward:
            lists, length = 4, steps.backward_length(block_map, geometry.G, geometry.parts)
        else:
            lists, length = 3, steps.forward_length(block_map)
        size = rows * length * lists * 4
        if size > steps.SCALAR_BYTES:
            return f"block lists of {size} bytes; scalar memory has room for {steps.SCALAR_BYTES}"
    return None


def attend(call: SoftmaxCall, config: MosaicTPUConfig = DEFAULT) -> tuple[jax.Array, jax.Array]:
    """(out_BTNM in q's dtype, lse_BTN in float32)."""
    return _attend(config, derivatives.reverse_only(_NO_FORWARD, call))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(config: MosaicTPUConfig, call: SoftmaxCall) -> tuple[jax.Array, jax.Array]:
    return forward(config, call)


def _attend_fwd(config: MosaicTPUConfig, call: SoftmaxCall):
    call = derivatives.none(_NO_SECOND, call)
    out_BTNM, lse_BTN = forward(config, call)
    return (out_BTNM, lse_BTN), (call, out_BTNM, lse_BTN)


def _attend_bwd(config: MosaicTPUConfig, residuals, cotangents):
    return (backward(config, *derivatives.none(_NO_SECOND, (*residuals, *cotangents))),)


_attend.defvjp(_attend_fwd, _attend_bwd)
