"""What the implementations of the delta rule share: the checked call.

Implementations import this module and never one another.
"""

from __future__ import annotations

import dataclasses

import jax

from attention_jax.ops.recurrences import runs_between

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeltaRuleCall:
    """One checked call of `delta_rule`; slots without a token hold 0 everywhere.

    q and k have Q and K heads, divisors of N. log_decay is None (no decay), [B, T, N, 1] (a decay per head)
    or [B, T, N, H]. The state is in the dtype that everything is computed in. `run_BT` (int32, or None)
    counts the documents before each slot's own, as in `decay_scan`: the state of another is not seen.
    """

    q_BTQH: jax.Array
    k_BTKH: jax.Array
    v_BTNM: jax.Array
    beta_BTN: jax.Array
    log_decay_BTNH: jax.Array | None
    state_BNHM: jax.Array
    run_BT: jax.Array | None
    scale: float = dataclasses.field(metadata=_STATIC)

    def between(self, start: int, stop: int, state_BNHM: jax.Array) -> DeltaRuleCall:
        """The call of the slots start .. stop - 1; the state is that after the slots in front of them."""
        names = ("q_BTQH", "k_BTKH", "v_BTNM", "beta_BTN", "log_decay_BTNH")
        per_slot = {name: x[:, start:stop] for name in names if (x := getattr(self, name)) is not None}
        run_BT = runs_between(self.run_BT, start, stop)
        return dataclasses.replace(self, **per_slot, state_BNHM=state_BNHM, run_BT=run_BT)

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """(B, T, N, H, M)."""
        B, T, N, M = self.v_BTNM.shape
        return B, T, N, self.q_BTQH.shape[3], M
