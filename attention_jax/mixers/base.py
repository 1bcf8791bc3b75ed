"""What every sequence mixer is: `mixer(x_BTD, state=None, *, ctx) -> (y_BTD, state)`.

`state=None` is the parallel form over the whole row. With a state the call appends: the T new tokens
attend to what the state holds and to one another, whatever T is (prefill, prefill in pieces, decode).
Invalid tokens (position or segment < 0) leave every state unchanged and give 0.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What a layer may know about its tokens beside their features.

    positions_BT: int32; None is 0, 1, 2, ... (only without a state). < 0 holds no token.
    segment_ids_BT: int32 document ids; None is one document a row. < 0 holds no token. Positions restart
      in every document. Only for the parallel form: a cached stream holds one document a row.
    memory_BSD, memory_positions_BS: what cross-attention reads; positions default to 0, 1, 2, ...
    dropout_key: None switches every dropout off.
    """

    positions_BT: jax.Array | None = None
    segment_ids_BT: jax.Array | None = None
    memory_BSD: jax.Array | None = None
    memory_positions_BS: jax.Array | None = None
    dropout_key: jax.Array | None = None

    def fold_key(self, data: Any) -> Context:
        """The same context with `data` folded into the dropout key."""
        if self.dropout_key is None:
            return self
        return dataclasses.replace(self, dropout_key=jax.random.fold_in(self.dropout_key, data))


class Mixer(Protocol):
    """A module that mixes along the sequence."""

    def __call__(self, x_BTD: jax.Array, state: Any = None, *, ctx: Context) -> tuple[jax.Array, Any]: ...

    def init_state(self, batch: int, capacity: int, *, memory: Any = None, dtype: Any = None) -> Any:
        """An empty state for `capacity` tokens a row."""
        ...
