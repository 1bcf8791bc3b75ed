"""Where the default tile sizes leave too few registers for what is done to a score.

Every number here was measured: up to it the kernels compiled for sm_90 ahead of time spill nothing, beyond it
they spill (`python -m tests.aot_gpu`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from attention_jax.ops.softmax.mosaic_gpu.scores import Scores

NEVER = 2**31  # a limit that nothing exceeds


@dataclasses.dataclass(frozen=True)
class RegisterLimits:
    """The most that a kernel with given tile sizes does to a score without spilling."""

    #: Operations of a mask, where nothing else is done to a score.
    mask: int = NEVER
    #: Operations of a mask beside a softcap, a bias or dropout; -1: those alone are too much.
    mask_beside_more: int = NEVER
    #: Numbers that are read per token.
    vectors: int = NEVER
    #: Whether another combination spills.
    also: Callable[[Scores], bool] = lambda scores: False


def register_pressure(scores: Scores, limits: RegisterLimits) -> int:
    """How many of the limits are exceeded; 0: registers hold all that the scores need."""
    beside_more = scores.changed or scores.dropout is not None
    return (
        (scores.mask_operations > limits.mask)
        + (beside_more and scores.mask_operations > limits.mask_beside_more)
        + (scores.vectors > limits.vectors)
        + limits.also(scores)
    )


def _costly(scores: Scores) -> bool:
    """A softcap, or dropout beside a bias."""
    return scores.softcap is not None or (scores.dropout is not None and scores.bias is not None)


def _dropout_of_bits(scores: Scores) -> bool:
    """Dropout beside a mask that is read as bits."""
    return scores.bits and scores.dropout is not None


def _softcap_and_dropout(scores: Scores) -> bool:
    return scores.softcap is not None and scores.dropout is not None


def _long_mask(scores: Scores, operations: int = 12) -> bool:
    return scores.mask_operations > operations


def _forward_64(scores: Scores) -> bool:
    reads_and_changes = scores.changed and scores.vectors > 1
    softcap_and_more = scores.softcap is not None and (scores.bias is not None or scores.vectors > 0)
    return scores.bits or scores.dropout is not None or reads_and_changes or softcap_and_more


def _backward_q_wide(scores: Scores) -> bool:
    beside_more = scores.changed or scores.dropout is not None
    return _costly(scores) and (scores.bits or scores.learned or (_long_mask(scores) and beside_more))


_NO_LIMITS = RegisterLimits()
_FORWARD_THREE = RegisterLimits(
    mask=30, mask_beside_more=20, also=lambda scores: _long_mask(scores, 24) and scores.vectors > 2
)
_BACKWARD_KV = RegisterLimits(mask=24, mask_beside_more=12, also=_costly)
_FUSED_PAIR = RegisterLimits(mask=30, mask_beside_more=-1, vectors=2)

# By the larger padded width. Beyond these limits two warpgroups compute in place of three ...
FORWARD_THREE_WARPGROUPS = {64: _FORWARD_THREE, 96: _FORWARD_THREE}
BACKWARD_Q_THREE_WARPGROUPS = {
    64: RegisterLimits(mask=30, mask_beside_more=20, also=_softcap_and_dropout),
    96: RegisterLimits(
        mask=12, also=lambda scores: _softcap_and_dropout(scores) or scores.vectors + scores.bits > 2
    ),
}
# ... a block is half as large ...
FORWARD_WHOLE_BLOCK = {
    64: RegisterLimits(mask=12, also=_forward_64),
    96: _NO_LIMITS,
    128: RegisterLimits(mask=30, mask_beside_more=12),
    192: RegisterLimits(mask=30, mask_beside_more=12),
    256: RegisterLimits(
        mask=30, mask_beside_more=12, vectors=3,
        also=lambda scores: _costly(scores) or _dropout_of_bits(scores),
    ),
}  # fmt: skip
BACKWARD_Q_WHOLE_BLOCK = {
    64: _NO_LIMITS,
    96: RegisterLimits(mask=30),
    128: RegisterLimits(mask=30),
    192: RegisterLimits(mask=30, also=_backward_q_wide),
    256: RegisterLimits(mask=30, also=_backward_q_wide),
}
BACKWARD_KV_WHOLE_BLOCK = {
    64: RegisterLimits(mask=24),
    96: _BACKWARD_KV,
    128: _BACKWARD_KV,
    192: _BACKWARD_KV,
    256: RegisterLimits(
        mask=24, mask_beside_more=12, vectors=3,
        also=lambda scores: _costly(scores) or (scores.bits and scores.vectors > 0),
    ),
}  # fmt: skip
# ... and a thread block of the fused backward owns 64 keys in place of 128.
FUSED_128_KEYS = {64: _NO_LIMITS, 96: _FUSED_PAIR, 128: _FUSED_PAIR}


def dv_product_fits_early(scores: Scores, masked: bool) -> bool:
    """Whether the backward over keys may start P^T dO before dZ: P then stays in registers beside dZ."""
    simple = scores.softcap is None and scores.dropout is None
    return simple and not (masked and _long_mask(scores))
