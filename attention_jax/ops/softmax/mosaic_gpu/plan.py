"""How a call is cut for the kernels: widths, tiles within registers and shared memory, lists, operands."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.ops.softmax.common import SoftmaxCall
from attention_jax.ops.softmax.mosaic_gpu import config, registers
from attention_jax.ops.softmax.mosaic_gpu.bits import mask_bits
from attention_jax.ops.softmax.mosaic_gpu.config import GROUP, WIDTHS, WORD, HopperTileSizes
from attention_jax.ops.softmax.mosaic_gpu.elementwise import K, Q
from attention_jax.ops.softmax.mosaic_gpu.registers import register_pressure
from attention_jax.ops.softmax.mosaic_gpu.schedule import Schedule, Side, block_map, schedule, sides
from attention_jax.ops.softmax.mosaic_gpu.scores import Scores, scores_of
from attention_jax.ops.tokens import select_valid

SHARED = 232_448  # bytes of shared memory of a thread block on sm_90
REDUCTION = 2048  # of them what jax takes where a kernel sums rows


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
    key_rows: int  # keys of a thread block in the kernels over keys
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
    scores, width = _scores(call), _width(call)
    if tiles is None:
        tiles = config.FORWARD[width]
        if tiles.warpgroups > 2 and register_pressure(scores, registers.FORWARD_THREE_WARPGROUPS[width]):
            tiles = tiles.two_warpgroups()
        if register_pressure(scores, registers.FORWARD_WHOLE_BLOCK[width]):
            tiles = tiles.half_block()
        tiles = _fitting(tiles, call, scores, _forward_bytes)
    return _plan(call, scores, tiles, tiles.rows, tiles.block, by_key=False)


def backward_q_plan(call: SoftmaxCall, tiles: HopperTileSizes | None = None) -> HopperPlan:
    """Rows of 64 queries a warpgroup over blocks of keys."""
    scores, width = _scores(call), _width(call)
    if tiles is None:
        tiles = config.BACKWARD_Q[width]
        if tiles.warpgroups > 2 and register_pressure(scores, registers.BACKWARD_Q_THREE_WARPGROUPS[width]):
            tiles = tiles.two_warpgroups()
        if register_pressure(scores, registers.BACKWARD_Q_WHOLE_BLOCK[width]):
            tiles = tiles.half_block()
        tiles = _fitting(tiles, call, scores, _backward_q_bytes)
    return _plan(call, scores, tiles, tiles.rows, tiles.block, by_key=False)


def backward_kv_plan(call: SoftmaxCall, tiles: HopperTileSizes | None = None) -> HopperPlan:
    """Rows of keys over blocks of queries: 2 x 64 while registers hold the sums of dK and dV, else 64."""
    scores, width = _scores(call), _width(call)
    if tiles is None:
        tiles = config.BACKWARD_KV[width]
        if register_pressure(scores, registers.BACKWARD_KV_WHOLE_BLOCK[width]):
            tiles = tiles.half_block()
        tiles = _fitting(tiles, call, scores, _backward_kv_bytes)
    return _plan(call, scores, tiles, tiles.block, 2 * GROUP if width <= 128 else GROUP, by_key=True)


def fused_plan(call: SoftmaxCall, tiles: HopperTileSizes | None = None) -> HopperPlan:
    """Rows of keys over blocks of queries: 2 x 64 while registers hold both sums and the scores, else 64."""
    scores, width = _scores(call), _width(call)
    pair = width <= 128 and not register_pressure(scores, registers.FUSED_128_KEYS[width])
    tiles = tiles or config.FUSED[width]  # any call fits: `scores.vectors` is bounded
    return _plan(call, scores, tiles, tiles.block, 2 * GROUP if pair else GROUP, by_key=True)


def _width(call: SoftmaxCall) -> int:
    """The larger of the padded widths of keys and values."""
    *_, H, M = call.sizes
    return padded_width(max(H, M))


def _fitting(
    tiles: HopperTileSizes, call: SoftmaxCall, scores: Scores, shared: Callable[..., int]
) -> HopperTileSizes:
    """Tiles that fit shared memory: one block less in flight, a halved one if possible, until they do."""
    *_, H, M = call.sizes
    while shared(H, M, tiles, scores) > SHARED:
        tiles = tiles.half_block()
        tiles = dataclasses.replace(tiles, stages=tiles.stages - 1)
        assert tiles.stages > 0, (H, M, scores.vectors)
    return tiles


def _forward_bytes(H: int, M: int, tiles: HopperTileSizes, scores: Scores) -> int:
    own = tiles.rows * (H + (M if H != M else 0)) * 2
    return own + _buffer(tiles.rows * 4) + REDUCTION + _swept_bytes(H + M, tiles, scores, tiles.rows)


def _backward_q_bytes(H: int, M: int, tiles: HopperTileSizes, scores: Scores) -> int:
    bias = _bias_bytes(scores.bias.by_query if scores.bias else [], tiles.rows)
    return tiles.rows * (H + M) * 2 + bias + _swept_bytes(H + M, tiles, scores, tiles.rows)


def _backward_kv_bytes(H: int, M: int, tiles: HopperTileSizes, scores: Scores) -> int:
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
