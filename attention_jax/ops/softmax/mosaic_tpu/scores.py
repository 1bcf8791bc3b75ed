"""What happens to a block of scores inside the TPU kernels: softcap, bias, mask, dropout.

The same code serves scores [queries, keys] in the forward and their transpose in the backward: everything is
elementwise on arrays that broadcast against the block. What varies by query, by key or by head comes as an
`Operand` that the kernel's pipeline cuts into blocks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from attention_jax.ops.softmax.common import SoftmaxCall, dropout_keeps, dropout_rows
from attention_jax.ops.softmax.mosaic_tpu.bias import Split
from attention_jax.ops.tokens import positions_or_arange, valid_tokens

LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Operand:
    """An array that broadcasts to [B, N, T, S], stored so that its longest axis lies along the lanes.

    array: [B or 1, N or 1, T, S] ([.., S, T] where transposed), or [.., 1, T], [.., 1, S], [.., 1, 1].
    """

    array: jax.Array
    by_query: bool
    by_key: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def spec(self, q_block: int, k_block: int, transposed: bool, where: Callable) -> pl.BlockSpec:
        """The block of a step; where(*grid indices, *lists) is (b, n, kv head, query and key block)."""
        swapped = transposed and self.by_query and self.by_key

        def index(*at):
            b, n, _, i, j = where(*at)
            batch = b if self.shape[0] > 1 else 0
            head = n if self.shape[1] > 1 else 0
            if self.by_query and self.by_key:
                return (batch, head, j, i) if swapped else (batch, head, i, j)
            return batch, head, 0, i if self.by_query else j if self.by_key else 0

        if self.by_query and self.by_key:
            block = (k_block, q_block) if swapped else (q_block, k_block)
        else:
            block = (1, q_block if self.by_query else k_block if self.by_key else 1)
        return pl.BlockSpec((None, None, *block), index)

    def load(self, ref: Any, transposed: bool) -> jax.Array:
        """The block as an array that broadcasts against the scores."""
        down = self.by_key if transposed else self.by_query
        if self.by_query and self.by_key or not down:
            return ref[...]
        return jnp.expand_dims(ref[0], -1)


def operand(
    x_BNTS: jax.Array, T_pad: int, S_pad: int, transposed: bool, fill: Any = 0, queries: bool = False
) -> Operand:
    """Pads what runs over queries or keys to whole blocks and lays it out.

    queries: it runs over queries even where there is one; padding then differs from the real one.
    """
    T, S = x_BNTS.shape[2:]
    by_query, by_key = T > 1 or queries, S > 1
    pads = [(0, T_pad - T if by_query else 0), (0, S_pad - S if by_key else 0)]
    x = jnp.pad(x_BNTS, [(0, 0), (0, 0), *pads], constant_values=fill)
    if by_query and by_key:
        x = x.swapaxes(2, 3) if transposed else x
    elif by_query:
        x = x.swapaxes(2, 3)
    return Operand(x, by_query, by_key)


def make_operands(
    call: SoftmaxCall,
    split: Split | None,
    mask_BNTS: jax.Array | None,
    T_pad: int,
    S_pad: int,
    transposed: bool,
) -> dict[str, Operand]:
    """What the blocks of a call read beside q, k and v, by name."""
    B, T, S, N, *_ = call.sizes
    found: dict[str, Any] = {}
    if not call.arange_positions:
        for name, positions, segments, length, other in (
            ("q", call.q_positions_BT, call.q_segments_BT, T, -1),
            ("k", call.k_positions_BS, call.k_segments_BS, S, -2),
        ):
            valid = valid_tokens(positions, segments)
            segments = jnp.zeros((1, length), jnp.int32) if segments is None else segments
            # Slots without a token belong to a segment that the other side does not have.
            segments = segments if valid is None else jnp.where(valid, segments, other)
            found[f"{name}_pos"] = (positions_or_arange(positions, length), other)
            found[f"{name}_seg"] = (segments, other)
        found = {
            name: operand(
                x[:, None, :, None] if name[0] == "q" else x[:, None, None], T_pad, S_pad, transposed, fill
            )
            for name, (x, fill) in found.items()
        }
    if mask_BNTS is not None:
        two_sided = mask_BNTS.shape[2] > 1 and mask_BNTS.shape[3] > 1
        mask_BNTS = mask_BNTS.astype(jnp.int8 if two_sided else jnp.int32)
        found["mask"] = operand(mask_BNTS, T_pad, S_pad, transposed)
    if call.dropout_rate > 0:
        rows = dropout_rows(
            call.dropout_words, jnp.arange(B), jnp.arange(N), positions_or_arange(call.q_positions_BT, T)
        )
        found["dropout"] = operand(rows[..., None], T_pad, S_pad, transposed)
    if split is not None:
        q_pos, k_pos = (
            positions_or_arange(call.q_positions_BT, T),
            positions_or_arange(call.k_positions_BS, S),
        )
        for i, x in enumerate(split.outside(call.bias, N, q_pos, k_pos)):
            found[f"bias{i}"] = operand(x, T_pad, S_pad, transposed)
    return found


@dataclasses.dataclass(frozen=True)
class TPUTile:
    """A block of scores in a kernel. Arrays are 2D and broadcast against it, whichever way it lies.

    i, j: its query block within the sequence and its key block, traced scalars.
    """

    call: SoftmaxCall
    split: Split | None
    has_mask: bool
    operands: dict[str, Operand]
    refs: dict[str, Any]
    blocks: tuple[int, int]
    i: jax.Array
    j: jax.Array
    S_pad: int
    transposed: bool

    def _load(self, name: str) -> jax.Array:
        return self.operands[name].load(self.refs[name], self.transposed)

    def _positions(self) -> tuple[jax.Array, jax.Array]:
        if "q_pos" in self.refs:
            return self._load("q_pos"), self._load("k_pos")
        q_axis = 1 if self.transposed else 0

        def count(block: jax.Array, size: int, axis: int) -> jax.Array:
            shape = (size, 1) if axis == 0 else (1, size)
            return block * size + lax.broadcasted_iota(jnp.int32, shape, axis)

        return count(self.i, self.blocks[0], q_axis), count(self.j, self.blocks[1], 1 - q_axis)

    def exponents(self, products: jax.Array, masked: bool):
        """From q . k: (base-2 exponents, -inf where hidden; tanh of the softcap or None)."""
        call = self.call
        tanh = None
        if call.softcap is None:
            x = products * (call.scale * LOG2E)
        else:
            tanh = jnp.tanh(products * (call.scale / call.softcap))
            x = tanh * (call.softcap * LOG2E)
        if self.split is not None:
            x = x + self.bias(self.bias_inputs()) * LOG2E
        if masked:
            x = jnp.where(self._kept(x.shape), x, -jnp.inf)
        return x, tanh

    def _kept(self, shape: tuple[int, int]) -> jax.Array:
        q_pos, k_pos = self._positions()
        if not self.has_mask:
            parts = []
        else:
            parts = [self.call.mask.keep(q_pos, k_pos)]
        if "q_seg" in self.refs:
            parts.append(self._load("q_seg") == self._load("k_seg"))
        elif self.S_pad != self.call.sizes[2]:
            parts.append(k_pos < self.call.sizes[2])
        if "mask" in self.refs:
            parts.append(self._load("mask").astype(jnp.int32) != 0)
        kept = jnp.broadcast_to(parts[0], shape) if parts else jnp.ones(shape, bool)
        for part in parts[1:]:
            kept = kept & part
        return kept

    def bias_inputs(self) -> list[jax.Array]:
        return [self._load(f"bias{i}") for i in range(len(self.split.cut))]

    def bias(self, inputs: list[jax.Array]) -> jax.Array:
        """The bias of the block from its inputs."""
        return self.split.inside(inputs, *self._positions())

    def survives(self) -> jax.Array | None:
        """True where dropout leaves an entry; None without dropout."""
        if "dropout" not in self.refs:
            return None
        _, k_pos = self._positions()
        return dropout_keeps(self._load("dropout"), k_pos, self.call.dropout_rate)
