"""Softmax attention on Hopper GPUs: flash attention over block lists in Pallas Mosaic GPU.

    config       tile sizes
    plan         how a call is cut: widths, tiles, operands
    registers    what a kernel's registers hold
    elementwise  functions of positions, on tiles
    bits         masks that are read, not computed
    bias         biases that hold arrays, and their gradients
    schedule     block maps as lists that a kernel reads
    scores       q . k to exponents, on a tile
    launch       layouts, scratch, a thread block
    gradients    dZ of a tile
    forward, backward_q, backward_kv, backward_fused    the kernels

docs/kernels.md lists what was verified on which hardware.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from attention_jax.ops import derivatives
from attention_jax.ops.softmax.common import SoftmaxCall, kernel_refusal, platform
from attention_jax.ops.softmax.mosaic_gpu import plan as planning
from attention_jax.ops.softmax.mosaic_gpu.config import GROUP, WIDTHS, MosaicGPUConfig
from attention_jax.ops.tokens import select_valid

DEFAULT = MosaicGPUConfig()

_NO_FORWARD = derivatives.no_forward_mode("mosaic_gpu", "dot_product_attention", use="reference")
_NO_SECOND = (
    "impl='mosaic_gpu' of dot_product_attention has no second derivative: use impl='reference', or "
    "jax.jvp of jax.grad with impl='chunked'"
)
_OLDEST = (0, 11, 2)
_LN2 = math.log(2)
_LONGEST = 65_535 * GROUP
_forced = False


@contextlib.contextmanager
def any_platform() -> Iterator[None]:
    """Runs without asking for the GPU: for tests that interpret the kernels or compile them ahead of time."""
    global _forced
    before, _forced = _forced, True
    try:
        yield
    finally:
        _forced = before


def unsupported(call: SoftmaxCall, config: MosaicGPUConfig = DEFAULT) -> str | None:
    """Why this implementation cannot run the call, or None."""
    return _platform(call) or kernel_refusal(call) or _inputs(call, config)


def _platform(call: SoftmaxCall) -> str | None:
    version = jax.version.__version_info__
    if version < _OLDEST:
        need = ".".join(map(str, _OLDEST))
        return f"needs jax >= {need} (Python >= 3.12), this is {jax.__version__}"
    if _forced:
        return None
    if platform(call) != "gpu":
        return f"needs an NVIDIA Hopper GPU (sm_90), the call runs on a {platform(call)}"
    capability = getattr(jax.devices()[0], "compute_capability", "unknown")
    if capability != "9.0":
        return f"needs an NVIDIA Hopper GPU (sm_90), this one's compute capability is {capability}"
    return _toolchain(_cuda_version())


def _cuda_version() -> int | None:
    """The CUDA runtime's number, 13000 for 13.0; None where there is none."""
    from jax._src.lib import cuda_versions  # as jax's own kernel reads it; there is no public access

    return None if cuda_versions is None else cuda_versions.cuda_runtime_get_version()


def _toolchain(version: int | None) -> str | None:
    """Why no kernel is compiled with this CUDA, None where one is."""
    if version is not None and 12080 <= version < 12091:
        found = f"{version // 1000}.{version % 1000 // 10}.{version % 10}"
        return f"CUDA 12.8.0 to 12.9.0 miscompile masked scores, this is {found}: use 12.9.1 or 13"
    return None


def _inputs(call: SoftmaxCall, config: MosaicGPUConfig) -> str | None:
    from attention_jax.ops.softmax.mosaic_gpu.scores import scores_of

    _, T, S, _, _, H, M = call.sizes
    if T > _LONGEST or S > _LONGEST:
        return f"up to {_LONGEST:,} tokens, as many blocks as a grid has rows; these are {T:,} and {S:,}"
    if call.q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 and float16, the inputs are {call.q_BTNH.dtype}"
    if max(H, M) > WIDTHS[-1]:
        return f"heads up to {WIDTHS[-1]} wide, these are {H} (keys) and {M} (values)"
    found = scores_of(call)
    if isinstance(found, str):
        return found
    if found.learned and not config.deterministic:
        name = type(call.bias).__name__
        return f"the gradient of bias {name} is not summed in the fused backward; use deterministic=True"
    return None


def attend(call: SoftmaxCall, config: MosaicGPUConfig = DEFAULT) -> tuple[jax.Array, jax.Array]:
    """(out_BTNM in q's dtype, lse_BTN in float32)."""
    return _attend(config, derivatives.reverse_only(_NO_FORWARD, call))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(config: MosaicGPUConfig, call: SoftmaxCall) -> tuple[jax.Array, jax.Array]:
    return _attend_fwd(config, call)[0]


def _attend_fwd(config: MosaicGPUConfig, call: SoftmaxCall):
    from attention_jax.ops.softmax.mosaic_gpu.forward import forward

    *_, M = call.sizes
    call = derivatives.none(_NO_SECOND, call)
    out_BTNM, lse_BNT = forward(planning.forward_plan(planning.clean(call), config.forward))
    out_BTNM = out_BTNM[..., :M]
    lse_BTN = (lse_BNT * _LN2).swapaxes(1, 2)
    return (out_BTNM, lse_BTN), (call, out_BTNM, lse_BNT)


def _attend_bwd(config: MosaicGPUConfig, residuals, cotangents):
    from attention_jax.ops.softmax.mosaic_gpu.backward_fused import gradients_fused
    from attention_jax.ops.softmax.mosaic_gpu.backward_kv import gradient_kv
    from attention_jax.ops.softmax.mosaic_gpu.backward_q import gradient_q

    (call, out_BTNM, lse_BNT), cotangents = derivatives.none(_NO_SECOND, (residuals, cotangents))
    _, T, _, _, _, H, M = call.sizes
    q_valid = call.q_valid_BT
    # An invalid query's output is constant; its lse is its sink where there is one.
    dout_BTNM, dlse_BTN = select_valid(cotangents[0], q_valid), cotangents[1]
    # A row without a key (lse = -inf) passes no gradient, and neither does padding: 2^(z - inf) is 0.
    padding = ((0, 0), (0, 0), (0, -T % (2 * GROUP)))
    lse_BNT = jnp.pad(lse_BNT, padding, constant_values=-jnp.inf)
    dead_BNT = lse_BNT == -jnp.inf
    lse_BNT = jnp.where(dead_BNT, jnp.inf, lse_BNT)
    delta_BTN = (out_BTNM.astype(jnp.float32) * dout_BTNM.astype(jnp.float32)).sum(-1) - dlse_BTN
    delta_BNT = jnp.pad(delta_BTN.swapaxes(1, 2), padding)
    delta_BNT = jnp.where(dead_BNT, 0.0, delta_BNT)

    cut = planning.clean(call)
    width = planning.padded_width(M) - M
    dout_BTNM = jnp.pad(dout_BTNM, ((0, 0), (0, 0), (0, 0), (0, width)))
    saved = (dout_BTNM, lse_BNT, delta_BNT)
    dbias = call.bias
    if config.deterministic:
        q_plan = planning.backward_q_plan(cut, config.backward_q)
        dq_BTNH, by_query = gradient_q(q_plan, *saved)
        dk_BSKH, dv_BSKM, by_key = gradient_kv(planning.backward_kv_plan(cut, config.backward_kv), *saved)
        if call.bias is not None:
            dbias = q_plan.scores.bias.gradient(call, by_query, by_key)
    else:
        dq_BTNH, dk_BSKH, dv_BSKM = gradients_fused(planning.fused_plan(cut, config.fused), *saved)
        dq_BTNH = dq_BTNH.astype(call.q_BTNH.dtype)
    dsinks_N = None
    if call.sink_logits_N is not None:
        sinks_N1 = call.sink_logits_N.astype(jnp.float32)[:, None] / _LN2
        dsinks_N = -(jnp.exp2(sinks_N1 - lse_BNT) * delta_BNT).sum((0, 2)).astype(call.sink_logits_N.dtype)
    # None stands for the zero cotangents of integer arrays.
    return (
        dataclasses.replace(
            call,
            q_BTNH=dq_BTNH[..., :H],
            k_BSKH=dk_BSKH[..., :H],
            v_BSKM=dv_BSKM[..., :M],
            bias=dbias,
            sink_logits_N=dsinks_N,
            q_positions_BT=None,
            k_positions_BS=None,
            q_segments_BT=None,
            k_segments_BS=None,
            mask_BNTS=None,
            dropout_words=None,
            first_row=None,
            first_head=None,
        ),
    )


_attend.defvjp(_attend_fwd, _attend_bwd)
