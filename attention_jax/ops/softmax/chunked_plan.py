"""How the blocked form cuts a call: its config, the tile sizes that follow, and the tiles to visit."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.ops.arguments import finite_number, positive_integer
from attention_jax.ops.softmax.blocks import (
    BlockCSR,
    BlockMap,
    Tokens,
    csr,
    padded_tokens,
    runtime_map,
    static_map,
)
from attention_jax.ops.softmax.common import SoftmaxCall


@dataclasses.dataclass(frozen=True)
class ChunkedConfig:
    """Tile sizes of "chunked"; the defaults were measured on 2 cores that share 1 MiB of L2 cache.

    Lengths are cut into equal tiles no larger than these, in multiples of 8.
    """

    #: Queries of a tile.
    query_tile: int = 256
    #: Keys of a tile, a multiple of key_unit or less than it.
    key_tile: int = 1024
    #: Keys of the units that partial tiles are cut to.
    key_unit: int = 256
    #: Tiles have twice the queries where they cover at most this many times as many pairs.
    max_waste: float = 1.15

    def __post_init__(self) -> None:
        for name in ("query_tile", "key_tile", "key_unit"):
            positive_integer(name, getattr(self, name))
        finite_number("max_waste", self.max_waste)
        if self.key_tile > self.key_unit and self.key_tile % self.key_unit:
            raise ValueError(f"key_tile {self.key_tile} is no multiple of key_unit {self.key_unit}")


@dataclasses.dataclass(frozen=True)
class Piece:
    """One kind of work: strips of queries against `units` key units, with or without mask code.

    The lists have a row per key tile; an item is strip * units per tile + first unit within the tile.
    """

    units: int
    masked: bool
    csr: BlockCSR


@dataclasses.dataclass(frozen=True)
class ChunkedPlan:
    """The call cut into tiles. Both sides are padded to whole tiles: T_pad, S_pad.

    Keys, values, the leaves of the bias and the dense mask of `call` have been padded, queries have not.
    """

    call: SoftmaxCall
    T: int
    S: int
    q_block: int
    k_unit: int
    units: int
    q: Tokens | None  # None where positions are implicit and every slot is valid
    k: Tokens | None
    pieces: tuple[Piece, ...]

    @property
    def key_tile(self) -> int:
        return self.k_unit * self.units

    @property
    def T_pad(self) -> int:
        return _round_up(self.T, self.q_block)

    @property
    def S_pad(self) -> int:
        return _round_up(self.S, self.key_tile)

    @property
    def key_tiles(self) -> tuple[jax.Array, jax.Array]:
        """The bounds of a loop over the key tiles."""
        return jnp.int32(0), jnp.int32(self.S_pad // self.key_tile)

    @property
    def G(self) -> int:
        """Query heads per kv head."""
        return self.call.q_BTNH.shape[2] // self.call.k_BSKH.shape[2]


def make_plan(call: SoftmaxCall, config: ChunkedConfig) -> ChunkedPlan:
    _, T, S, *_ = call.sizes
    q_block = _balanced(T, config.query_tile)
    # Short sequences take one kind of piece: there, compiling several costs more than they save.
    short = S <= 2 * config.key_unit
    k_unit = _balanced(S, min((1 + short) * config.key_unit, config.key_tile))
    units = min(max(1, config.key_tile // config.key_unit), -(-S // k_unit))
    if call.arange_positions:
        q_block, block_map = _strips(call, config, q_block, k_unit)
        q = k = None
    else:
        # Equal tiles, too: a ring and the new tokens behind it are padded by little.
        k_unit, units = (k_unit if short else _balanced(S, config.key_tile)), 1
        q = padded_tokens(call.q_positions_BT, call.q_segments_BT, T, _round_up(T, q_block))
        k = padded_tokens(call.k_positions_BS, call.k_segments_BS, S, _round_up(S, k_unit))
        block_map = runtime_map(call.mask, q, k, q_block, k_unit)
    if call.mask_BNTS is not None:
        block_map = BlockMap(block_map.any_kept, block_map.all_kept & False)
    pieces = tuple(p for p in _pieces(block_map.transpose, units) if not p.csr.empty)
    plan = ChunkedPlan(call, T, S, q_block, k_unit, units, q, k, pieces)
    return dataclasses.replace(plan, call=_padded(call, plan.T_pad, plan.S_pad))


def _strips(call: SoftmaxCall, config: ChunkedConfig, q_block: int, k_unit: int) -> tuple[int, BlockMap]:
    """The number of queries in a strip, this one or about twice as many, and its map."""
    _, T, S, *_ = call.sizes
    found = static_map(call.mask, T, S, q_block, k_unit)
    twice = _balanced(T, 2 * config.query_tile)
    if twice == q_block:
        return q_block, found
    wide = static_map(call.mask, T, S, twice, k_unit)
    if wide.any_kept.sum() * twice <= config.max_waste * found.any_kept.sum() * q_block:
        return twice, wide
    return q_block, found


def _balanced(length: int, most: int) -> int:
    """The block that cuts `length` into the fewest equal parts <= most, a multiple of 8."""
    return _round_up(-(-length // -(-length // most)), 8)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _pieces(by_key: BlockMap, units: int) -> list[Piece]:
    """The work of a map with key units as rows, as lists with key tiles as rows."""
    if units == 1:
        return [Piece(1, False, by_key.full), Piece(1, True, by_key.partial)]
    any_kept, all_kept = (_tiled(x, units) for x in (by_key.any_kept, by_key.all_kept))
    full = all_kept.all(-1)
    live = any_kept.any(-1) & ~full
    first = any_kept.argmax(-1)
    count = units - any_kept[..., ::-1].argmax(-1) - first
    names = np.arange(any_kept.shape[2]) * units + first
    found = [Piece(units, False, csr(full, names))]
    for width in range(1, units + 1):
        found.append(Piece(width, True, csr(live & (count == width), names)))
    return found


def _tiled(x: np.ndarray, units: int) -> np.ndarray:
    """[1, key units, strips] to [1, key tiles, strips, units]; missing units of the last tile are empty."""
    _, n, strips = x.shape
    x = np.pad(x, ((0, 0), (0, -n % units), (0, 0)))
    return x.reshape(1, -1, units, strips).swapaxes(2, 3)


def _padded(call: SoftmaxCall, T_pad: int, S_pad: int) -> SoftmaxCall:
    """Keys, values, per-query and per-key leaves of the bias and the dense mask in whole tiles."""

    def pad(x: jax.Array, query: int | None, key: int | None) -> jax.Array:
        widths = [(0, 0)] * x.ndim
        for axis, to in ((query, T_pad), (key, S_pad)):
            if axis is not None and x.shape[axis] != 1:
                widths[axis] = (0, to - x.shape[axis])
        return jnp.pad(x, widths)

    bias, mask = call.bias, call.mask_BNTS
    if bias is not None:
        leaves, treedef = jax.tree.flatten(bias)
        leaves = [pad(x, axes.query, axes.key) for x, axes in zip(leaves, bias.axes(), strict=True)]
        bias = jax.tree.unflatten(treedef, leaves)
    k_BSKH, v_BSKM = (
        jnp.pad(x, ((0, 0), (0, S_pad - x.shape[1]), (0, 0), (0, 0))) for x in (call.k_BSKH, call.v_BSKM)
    )
    mask = None if mask is None else pad(mask, 2, 3)
    return dataclasses.replace(call, k_BSKH=k_BSKH, v_BSKM=v_BSKM, bias=bias, mask_BNTS=mask)
