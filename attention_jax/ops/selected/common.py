"""What the implementations of selected attention share: the checked call and chunks of queries.

Implementations import this module and never one another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SelectedCall:
    """One checked call of `selected_attention`.

    Positions are int32 [B, T] and [B, S], negative wherever position or segment say that a slot holds no
    token. Segments are int32 of the same shapes, or both None: one document a row.
    """

    q_BTNH: jax.Array
    k_BSKH: jax.Array
    v_BSKM: jax.Array
    block_indices_BTKn: jax.Array
    q_positions_BT: jax.Array
    k_positions_BS: jax.Array
    q_segments_BT: jax.Array | None
    k_segments_BS: jax.Array | None
    block_size: int = dataclasses.field(metadata=_STATIC)
    scale: float = dataclasses.field(metadata=_STATIC)

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int, int]:
        """(B, T, S, N, K, H, M)."""
        B, T, N, H = self.q_BTNH.shape
        _, S, K, M = self.v_BSKM.shape
        return B, T, S, N, K, H, M


# Elements of the largest temporary of a chunk: 16 MiB in float32.
CHUNK_ELEMENTS = 2**22


def chunk_length(T: int, elements_per_query: int, elements: int = CHUNK_ELEMENTS) -> int:
    """How many queries to take at once for a temporary of at most `elements`."""
    return max(1, min(T, elements // elements_per_query))


def cut(rows: Any, length: int) -> Any:
    """Every leaf [B, T, ...] as [chunks, B, length, ...], the last chunk filled up with zeros."""

    def one(x: jax.Array) -> jax.Array:
        B, T = x.shape[:2]
        chunks = -(-T // length)
        x = jnp.pad(x, [(0, 0), (0, chunks * length - T)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, chunks, length, *x.shape[2:]), 1, 0)

    return jax.tree.map(one, rows)


def join(pieces: Any, T: int) -> Any:
    """The inverse of `cut`: every leaf [chunks, B, length, ...] as [B, T, ...]."""

    def one(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :T]

    return jax.tree.map(one, pieces)


def over_chunks(body: Callable[[Any], Any], rows: Any, T: int, length: int) -> Any:
    """body(rows) on `length` queries at a time, one chunk after another; leaves are [B, T, ...]."""
    return body(rows) if length >= T else join(jax.lax.map(body, cut(rows, length)), T)
