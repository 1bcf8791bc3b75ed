"""How a call is cut for the kernels: widths, tiles within registers and shared memory, lists, operands."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.ops.softmax.common import SoftmaxCall
from attention_jax.ops.softmax.mosaic_gpu.bits import WORD, mask_bits
from attention_jax.ops.softmax.mosaic_gpu.elementwise import K, Q
from attention_jax.ops.softmax.mosaic_gpu.schedule import Schedule, Side, block_map, schedule, sides
from attention_jax.ops.softmax.mosaic_gpu.scores import GROUP, SEVERAL, Scores, scores_of
from attention_jax.ops.tokens import select_valid

WIDTHS = (64, 96, 128, 192, 256)  # head widths the kernels know; others are padded with zeros

# Operations of a mask beyond which a whole block spills, as ahead-of-time compilation for sm_90 shows.
MANY = 30
MANY_OF_THREE = 20  # where three warpgroups share the registers, and more is done to a score
MANY_BY_KEY = 24  # where both sums, dK and dV, stay in registers
FEW = 3  # vectors per token that a whole block holds at a width of 256


@dataclasses.dataclass(frozen=True)
class HopperTileSizes:
    """Tile sizes of one kernel: keys (of the backward over keys: queries) per step, steps in flight.

    warpgroups: those that compute, each with rows of its own. The backward over keys takes two.
    """

    block: int
    stages: int
    warpgroups: int = 2

    @property
    def rows(self) -> int:
        """Of a thread block whose warpgroups own 64 each."""
        return self.warpgroups * GROUP

    def smaller(self) -> HopperTileSizes:
        """With blocks of half the size, as many tokens in flight; a block of 32 stays."""
        if self.block <= WORD:
            return self
        return dataclasses.replace(self, block=self.block // 2, stages=self.stages * 2)

    def of_two(self) -> HopperTileSizes:
        """For two warpgroups."""
        return dataclasses.replace(self, warpgroups=2)


SHARED = 232_448  # bytes of shared memory of a thread block on sm_90
REDUCTION = 2048  # of them what jax takes where a kernel sums rows

# By the larger of the padded widths of keys and values. `scripts/tune.py` times the alternatives.
FORWARD = {
    64: HopperTileSizes(128, 4, warpgroups=3),
    96: HopperTileSizes(64, 4, warpgroups=3),
    128: HopperTileSizes(128, 2),
    192: HopperTileSizes(64, 3),
    256: HopperTileSizes(64, 2),
}


# The backward over queries (dQ): keys per step. The backward over keys (dK, dV): queries per step.
BACKWARD_Q = {
    64: HopperTileSizes(64, 4, warpgroups=3),
    96: HopperTileSizes(64, 3, warpgroups=3),
    128: HopperTileSizes(64, 3),
    192: HopperTileSizes(64, 2),
    256: HopperTileSizes(32, 3),
}
BACKWARD_K = {
    64: HopperTileSizes(64, 3),
    96: HopperTileSizes(64, 2),
    128: HopperTileSizes(64, 2),
    192: HopperTileSizes(64, 2),
    256: HopperTileSizes(64, 2),
}
# The backward in one kernel (dQ, dK, dV): queries per step, the 64 rows of its product for dQ.
FUSED = {
    64: HopperTileSizes(64, 3),
    96: HopperTileSizes(64, 2),
    128: HopperTileSizes(64, 2),
    192: HopperTileSizes(64, 2),
    256: HopperTileSizes(64, 2),
}


def padded_width(width: int) -> int:
    return next(w for w in WIDTHS if w >= width)


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


@dataclasses.dataclass(frozen=True)
class HopperPlan:
    """A call with padded widths and invalid tokens selected to 0, its recipe of scores and its tiles."""

    call: SoftmaxCall
    scores: Scores
    tiles: HopperTileSizes
    schedule: Schedule
    q: Side
    k: Side
    key_rows: int  # keys of a thread block of the backward over keys
    bias: list[jax.Array]  # what the bias reads per (batch row, head), [B, N]
    bits: jax.Array | np.ndarray | None  # int32 [b, n, words, own tokens], see `bits.py`
    swept: int  # tokens per step, of which a word holds 32

    @property
    def words(self) -> int:
        """Vectors of bits that a step reads; 0 where the kernel computes the mask."""
        return 0 if self.bits is None else self.swept // WORD

    def copies(self, side: Side) -> int:
        """Copies that a step waits for beside its tiles: the vectors of the side it sweeps, and bits."""
        return len(side.vectors) + (self.words > 0)

    @property
    def head_by_head(self) -> bool:
        """Keys differ by query head: a thread block that owns keys works off one head after another."""
        return bool(self.k.by_head)

    @property
    def groups(self) -> int:
        """Query heads per kv head."""
        return self.call.sizes[3] // self.call.sizes[4]

    def operands(self, **more: Any) -> dict[str, Any]:
        """What every kernel reads, as a pytree."""
        B, _, _, N, *_ = self.call.sizes
        lists = {"rows": self.schedule.rows, "items": self.schedule.items}
        found = self.scores.operands(B, N, self.q, self.k) | {"bias": self.bias} | lists
        found |= {"bits": self.bits} | more
        return jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, found)


def forward_plan(call: SoftmaxCall, tiles: HopperTileSizes | None = None) -> HopperPlan:
    """Rows of 64 queries a warpgroup over blocks of keys."""
    scores = _scores(call)
    *_, H, M = call.sizes
    if tiles is None:
        tiles = _forward_tiles(scores, max(H, M))
        tiles = _fitting(tiles, call, scores, _forward_bytes)
    return _plan(call, scores, tiles, tiles.rows, tiles.block, by_key=False)


def _forward_tiles(scores: Scores, width: int) -> HopperTileSizes:
    """`FORWARD`, with smaller blocks or fewer warpgroups where registers must hold what the scores need."""
    tiles = FORWARD[padded_width(width)]
    long, crowded = scores.mask_operations > MANY, scores.crowded
    if width > 192:
        crowded |= scores.heavy or scores.drawn or scores.vectors > FEW
    if width > 96:
        return tiles.smaller() if long or crowded else tiles
    crowded &= scores.mask_operations > MANY_OF_THREE
    crowded |= scores.mask_operations > MANY_BY_KEY and scores.vectors > 2
    if long or crowded:
        tiles = tiles.of_two()
    much = scores.mask_operations > SEVERAL or scores.bits or scores.dropout is not None
    much |= scores.changed and scores.vectors > 1
    much |= scores.softcap is not None and (scores.bias is not None or scores.vectors > 0)
    return tiles.smaller() if much and tiles.block > 64 else tiles


def backward_q_plan(call: SoftmaxCall, tiles: HopperTileSizes | None = None) -> HopperPlan:
    """Rows of 64 queries a warpgroup over blocks of keys."""
    scores = _scores(call)
    *_, H, M = call.sizes
    heavy = max(H, M) > 128 and scores.heavy and (scores.bits or scores.crowded or scores.learned)
    heavy |= max(H, M) > 64 and scores.mask_operations > MANY
    two = scores.mask_operations > (MANY_OF_THREE if scores.crowded else MANY)
    two |= scores.softcap is not None and scores.dropout is not None
    two |= max(H, M) > 64 and (scores.mask_operations > SEVERAL or scores.vectors + scores.bits > 2)
    if tiles is None:
        tiles = BACKWARD_Q[padded_width(max(H, M))]
        tiles = tiles.of_two() if two else tiles
        tiles = _fitting(tiles.smaller() if heavy else tiles, call, scores, _backward_q_bytes)
    return _plan(call, scores, tiles, tiles.rows, tiles.block, by_key=False)


def backward_k_plan(call: SoftmaxCall, tiles: HopperTileSizes | None = None) -> HopperPlan:
    """Rows of keys over blocks of queries: 2 x 64 while registers hold the sums of dK and dV, else 64."""
    *_, H, M = call.sizes
    scores = _scores(call)
    heavy = scores.mask_operations > MANY_BY_KEY or (max(H, M) > 64 and (scores.heavy or scores.crowded))
    heavy |= max(H, M) > 192 and scores.vectors > (0 if scores.bits else FEW)
    if tiles is None:
        tiles = BACKWARD_K[padded_width(max(H, M))]
        tiles = _fitting(tiles.smaller() if heavy else tiles, call, scores, _backward_k_bytes)
    return _plan(call, scores, tiles, tiles.block, 2 * GROUP if max(H, M) <= 128 else GROUP, by_key=True)


def fused_plan(call: SoftmaxCall, tiles: HopperTileSizes | None = None) -> HopperPlan:
    """Rows of keys over blocks of queries: 2 x 64 while registers hold both sums and the scores, else 64."""
    *_, H, M = call.sizes
    scores = _scores(call)
    heavy = (
        scores.changed or scores.dropout is not None or scores.mask_operations > MANY or scores.vectors > 2
    )
    relay = max(H, M) > 128 or (max(H, M) > 64 and heavy)
    tiles = tiles or FUSED[padded_width(max(H, M))]  # any call fits: `scores.vectors` is bounded
    return _plan(call, scores, tiles, tiles.block, GROUP if relay else 2 * GROUP, by_key=True)


def _fitting(
    tiles: HopperTileSizes, call: SoftmaxCall, scores: Scores, shared: Callable[..., int]
) -> HopperTileSizes:
    """Tiles that fit shared memory: one block less in flight, a halved one if possible, until they do."""
    *_, H, M = call.sizes
    while shared(H, M, tiles, scores) > SHARED:
        tiles = tiles.smaller()
        tiles = dataclasses.replace(tiles, stages=tiles.stages - 1)
        assert tiles.stages > 0, (H, M, scores.vectors)
    return tiles


def _forward_bytes(H: int, M: int, tiles: HopperTileSizes, scores: Scores) -> int:
    own = tiles.rows * (H + (M if H != M else 0)) * 2
    return own + _buffer(tiles.rows * 4) + REDUCTION + _swept_bytes(H + M, tiles, scores, tiles.rows)


def _backward_q_bytes(H: int, M: int, tiles: HopperTileSizes, scores: Scores) -> int:
    bias = _bias_bytes(scores.bias.by_query if scores.bias else [], tiles.rows)
    return tiles.rows * (H + M) * 2 + bias + _swept_bytes(H + M, tiles, scores, tiles.rows)


def _backward_k_bytes(H: int, M: int, tiles: HopperTileSizes, scores: Scores) -> int:
    rows = 2 * GROUP if max(H, M) <= 128 else GROUP
    lse_and_delta = 2 * _buffer(tiles.stages * tiles.block * 4)
    bias = _bias_bytes(scores.bias.by_key if scores.bias else [], rows)
    return rows * (H + M) * 2 + lse_and_delta + bias + _swept_bytes(H + M, tiles, scores, rows)


def _bias_bytes(pulls: list, rows: int) -> int:
    """What sums for a bias take."""
    return len(pulls) * _buffer(rows * 4) + (REDUCTION if pulls else 0)


def _swept_bytes(widths: int, tiles: HopperTileSizes, scores: Scores, rows: int) -> int:
    """What of the swept side is in flight, with its vectors and bits, and barriers."""
    tokens = tiles.stages * tiles.block
    bits = _buffer(tokens // WORD * rows * 4) if scores.bits else 0
    return tokens * widths * 2 + scores.vectors * _buffer(tokens * 4) + bits + 1024


def _buffer(size: int) -> int:
    return round_up(size, 1024)


def _scores(call: SoftmaxCall) -> Scores:
    scores = scores_of(call)
    assert isinstance(scores, Scores), scores
    return scores


def _plan(
    call: SoftmaxCall, scores: Scores, tiles: HopperTileSizes, q_block: int, k_block: int, by_key: bool
) -> HopperPlan:
    _, T, S, *_ = call.sizes
    blocks = block_map(call, q_block, k_block)
    T_pad, S_pad = round_up(T, q_block), round_up(S, k_block)
    q, k = sides(call, T_pad, S_pad)
    if scores.keep.looked:
        q = _looked_up(scores, q, Q, call.q_positions_BT, T_pad)
        k = _looked_up(scores, k, K, call.k_positions_BS, S_pad)
    bias = []
    if scores.bias is not None:
        bias, of_q, of_k = scores.bias.read(call)
        q, k = _by_head(q, of_q, T_pad), _by_head(k, of_k, S_pad)
    bits, swept = None, q_block if by_key else k_block
    if scores.bits:
        bits = mask_bits(call, scores.table, by_key, *((S_pad, T_pad) if by_key else (T_pad, S_pad)))
    lists = schedule(blocks.transpose if by_key else blocks)
    return HopperPlan(call, scores, tiles, lists, q, k, k_block, bias, bits, swept)


def _by_head(side: Side, found: list[jax.Array], length: int) -> Side:
    """The side with what the bias reads of its tokens."""
    padded = [jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]))) for x in found]
    return dataclasses.replace(side, by_head=tuple(padded))


def _looked_up(scores: Scores, side: Side, name: frozenset, positions: jax.Array | None, length: int) -> Side:
    """The side with what the mask looks up with its positions."""
    positions = jnp.arange(length, dtype=jnp.int32)[None] if positions is None else positions
    padded = jnp.pad(positions, ((0, 0), (0, length - positions.shape[1])), constant_values=-1)
    return dataclasses.replace(side, looked=tuple(scores.keep.look_up(name, padded)))


def clean(call: SoftmaxCall) -> SoftmaxCall:
    """The call with padded widths; what invalid slots hold (NaN, Inf) is selected to 0."""
    q_valid = call.q_valid_BT
    k_valid = call.k_valid_BS

    def fix(x, valid):
        width = x.shape[-1]
        return jnp.pad(select_valid(x, valid), ((0, 0), (0, 0), (0, 0), (0, padded_width(width) - width)))

    return dataclasses.replace(
        call,
        q_BTNH=fix(call.q_BTNH, q_valid),
        k_BSKH=fix(call.k_BSKH, k_valid),
        v_BSKM=fix(call.v_BSKM, k_valid),
    )
