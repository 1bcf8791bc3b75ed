"""What every implementation of `decay_scan` shares: the checked call.

Implementations import this module and never one another.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from attention_jax.ops.recurrences import runs_between

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecayScanCall:
    """One checked call of `decay_scan`: arrays are pytree leaves, the rest is static.

    Heads of q, k, v and log_decay divide N, the heads of the state. Slots without a token are already 0 in
    q, k, v and log_decay, so that they neither add to the state nor decay it. `run_BT` (int32 [1 or B, T],
    or None) counts the documents before each slot's own: where it differs from a state's, nothing of that
    state is seen. `log_decay` is None, [N], [B, T, N] or [B, T, N, H], in `state_BNHM`'s dtype. `normalize`:
    the last columns of v and of the state are those of the denominator, by which the caller divides.
    """

    q_BTNH: jax.Array
    k_BTNH: jax.Array
    v_BTNM: jax.Array
    log_decay: jax.Array | None
    state_BNHM: jax.Array
    run_BT: jax.Array | None
    scale: float = dataclasses.field(metadata=_STATIC)
    out_dtype: Any = dataclasses.field(metadata=_STATIC)
    normalize: bool = dataclasses.field(metadata=_STATIC)

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """(B, T, N, H, M)."""
        B, N, H, M = self.state_BNHM.shape
        return B, self.q_BTNH.shape[1], N, H, M

    def between(self, start: int, stop: int, state_BNHM: jax.Array) -> DecayScanCall:
        """The call of the slots start .. stop - 1; the state is that after the slots in front of them."""
        per_slot = {name: getattr(self, name)[:, start:stop] for name in ("q_BTNH", "k_BTNH", "v_BTNM")}
        if self.log_decay is not None and self.log_decay.ndim > 1:
            per_slot["log_decay"] = self.log_decay[:, start:stop]
        run_BT = runs_between(self.run_BT, start, stop)
        return dataclasses.replace(self, **per_slot, state_BNHM=state_BNHM, run_BT=run_BT)

    @property
    def dtype(self) -> Any:
        """Of the state and of every sum: float32, or float64 where q, k or v is."""
        return self.state_BNHM.dtype
