"""torch's attention: scaled_dot_product_attention, cuDNN's on a GPU, and FlexAttention."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np

from attention_jax.benchmarks.case import Case
from attention_jax.benchmarks.timing import event_time

_ABSENT = "torch is not installed (extra `parity`)"


def sdpa(case: Case, backward: bool) -> Any:
    """scaled_dot_product_attention: its fused form on a CPU, cuDNN's on a GPU."""
    if importlib.util.find_spec("torch") is None:
        return _ABSENT
    import torch

    on_gpu, plain = torch.cuda.is_available(), case.causal or case.full
    if on_gpu and not plain:
        return "takes no such mask without a dense array"
    if not plain and case.dense_too_large:
        return f"only as a dense mask: {case.dense_too_large}"
    arrays = _inputs(torch, case, backward)
    kept = None if plain else torch.from_numpy(case.dense().copy())
    attend = functools.partial(
        torch.nn.functional.scaled_dot_product_attention,
        attn_mask=kept,
        is_causal=case.causal,
        enable_gqa=case.K != case.N,
    )

    def forward(q, k, v):
        if not on_gpu:
            return attend(q, k, v)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
            return attend(q, k, v)

    return _call(torch, forward, arrays, backward)


def flex(case: Case, backward: bool) -> Any:
    """FlexAttention, compiled for the shape; the block mask is made beforehand."""
    if importlib.util.find_spec("torch") is None:
        return _ABSENT
    import torch

    if not torch.cuda.is_available() and backward:
        return "has no backward on a CPU"
    from torch.nn.attention import flex_attention as flex

    arrays = _inputs(torch, case, backward)
    blocks, note = None, None
    if not case.full:
        mask_mod, note = rule(case.mask, case.T, arrays[0].device)
        blocks = flex.create_block_mask(mask_mod, None, None, case.T, case.T, device=arrays[0].device)
    # After eight shapes of one function torch compiles no more, and runs it unfused.
    torch.compiler.reset()
    compiled = torch.compile(flex.flex_attention, dynamic=False, mode="max-autotune-no-cudagraphs")
    attend = functools.partial(compiled, block_mask=blocks, enable_gqa=case.K != case.N)
    call = _call(torch, attend, arrays, backward)
    call.note = note
    return call


def rule(mask: Any, T: int, device: Any) -> tuple[Callable, str | None]:
    """(mask_mod, note): a mask of T positions as FlexAttention takes it.

    A mask's own `keep` runs on torch's scalars. What indexes an array or hashes does not: random blocks
    become a table of pairs of blocks, and what else refuses one of pairs of tokens, which the note says.
    """
    import torch

    tables: list[str] = []

    def looked_up(mask: Any, block: int) -> Callable:
        at = np.arange(0, T, block)
        kept = np.array(np.broadcast_to(mask.keep(at[:, None], at[None]), (at.size, at.size)))
        table = torch.from_numpy(kept).to(device)
        tables.append(f"{type(mask).__name__} as a table of {at.size} x {at.size}")
        return lambda b, h, q, k: table[q // block, k // block]

    found = _walk(mask, looked_up)
    return found, "; ".join(tables) or None


def _walk(mask: Any, looked_up: Callable[[Any, int], Callable]) -> Callable:
    from torch.nn.attention import flex_attention as flex

    from attention_jax.masks import RandomBlocks
    from attention_jax.masks.algebra import And, Not, Or, Recipe

    if isinstance(mask, Recipe):
        return _walk(mask.expression, looked_up)
    if isinstance(mask, (And, Or)):
        join = flex.and_masks if isinstance(mask, And) else flex.or_masks
        return join(*(_walk(member, looked_up) for member in mask.masks))
    if isinstance(mask, Not):
        inner = _walk(mask.mask, looked_up)
        return lambda b, h, q, k: inner(b, h, q, k) == False  # noqa: E712
    if isinstance(mask, RandomBlocks):
        return looked_up(mask, mask.block)

    def keep(b, h, q, k):
        return mask.keep(q, k)

    try:  # as FlexAttention evaluates it
        flex.create_mask(keep, None, None, 2, 2, device="cpu")
    except Exception:  # a predicate may do anything with torch's tensors
        return looked_up(mask, 1)
    return keep


def _inputs(torch: Any, case: Case, backward: bool) -> list[Any]:
    """q, k, v [B, N or K, T, H]: on a CPU the values of the other contestants, on a GPU drawn there."""
    dtype = getattr(torch, case.dtype)
    if torch.cuda.is_available():
        torch.manual_seed(0)
        shapes = [(case.B, n, case.T, case.H) for n in (case.N, case.K, case.K)]
        arrays = [torch.randn(shape, device="cuda", dtype=dtype) for shape in shapes]
    else:
        values = (np.array(x, np.float32).transpose(0, 2, 1, 3).copy() for x in case.inputs)
        arrays = [torch.from_numpy(x).to(dtype) for x in values]
    return [x.requires_grad_(backward) for x in arrays]


def _call(torch: Any, forward: Callable, arrays: list[Any], backward: bool) -> Callable[[], Any]:
    d = torch.randn_like(arrays[0])

    def queue():
        out = forward(*arrays)
        return torch.autograd.grad(out, arrays, d) if backward else out

    def call():
        result = queue()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return result

    call.device_time = functools.partial(event_time, torch, queue)
    return call
