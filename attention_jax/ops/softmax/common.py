"""What every implementation of softmax attention shares: the checked call, platform, dropout bits.

Implementations import this module and never one another.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from attention_jax.biases import Bias
from attention_jax.masks import Mask
from attention_jax.ops.tokens import valid_tokens

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SoftmaxCall:
    """One checked call of `dot_product_attention`: arrays are pytree leaves, the rest is static.

    Positions and segments are int32 [B or 1, T] and [B or 1, S], or None (positions 0, 1, 2, ...; one
    segment). `mask_BNTS` is a boolean array broadcastable to [B, N, T, S] that restricts further what
    `mask` keeps. `dropout_words` is the key's data, uint32 [n]. `lse`: the log-sum-exp is asked for. Under a
    mesh a call is one shard's: its rows and heads are numbered from first_row and first_head (int32 []; None
    is 0) for biases and dropout.
    """

    q_BTNH: jax.Array
    k_BSKH: jax.Array
    v_BSKM: jax.Array
    q_positions_BT: jax.Array | None
    k_positions_BS: jax.Array | None
    q_segments_BT: jax.Array | None
    k_segments_BS: jax.Array | None
    mask_BNTS: jax.Array | None
    bias: Bias | None
    sink_logits_N: jax.Array | None
    dropout_words: jax.Array | None
    first_row: jax.Array | None
    first_head: jax.Array | None
    mask: Mask = dataclasses.field(metadata=_STATIC)
    scale: float = dataclasses.field(metadata=_STATIC)
    softcap: float | None = dataclasses.field(metadata=_STATIC)
    dropout_rate: float = dataclasses.field(metadata=_STATIC)
    lse: bool = dataclasses.field(metadata=_STATIC)

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int, int]:
        """(B, T, S, N, K, H, M)."""
        B, T, N, H = self.q_BTNH.shape
        _, S, K, M = self.v_BSKM.shape
        return B, T, S, N, K, H, M

    def leaf_axes(self) -> list[str]:
        """The axes of every array of the call, in the order of its leaves, as letters of its field's name.

        "." is an axis that belongs to no batch row and no head: a bias is given global head numbers, so that
        only its batch axis counts.
        """
        found = []
        for field in dataclasses.fields(self):
            x = getattr(self, field.name)
            if x is None or field.metadata.get("static"):
                continue
            if field.name == "bias":
                for leaf, axes in zip(jax.tree.leaves(x), x.axes(), strict=True):
                    found.append("".join("B" if i == axes.batch else "." for i in range(leaf.ndim)))
            else:
                letters = field.name.rpartition("_")[2]
                found.append(letters if letters.isupper() else "." * x.ndim)
        return found

    @property
    def output_axes(self) -> tuple[str, str | None]:
        """The axes of what `attend` returns, (out, lse); None for an lse that is not asked for."""
        return "BTNM", "BTN" if self.lse else None

    @property
    def q_valid_BT(self) -> jax.Array | None:
        """Which query slots hold a token; None: all do."""
        return valid_tokens(self.q_positions_BT, self.q_segments_BT)

    @property
    def k_valid_BS(self) -> jax.Array | None:
        """Which key slots hold a token; None: all do."""
        return valid_tokens(self.k_positions_BS, self.k_segments_BS)

    def row_ids(self, b: jax.Array) -> jax.Array:
        """Global numbers of batch rows, for dropout."""
        return b if self.first_row is None else b + self.first_row

    def head_ids(self, n: jax.Array) -> jax.Array:
        """Global numbers of query heads, for biases and dropout."""
        return n if self.first_head is None else n + self.first_head

    @property
    def arange_positions(self) -> bool:
        """Positions are implicit and there are no segments: block lists are known while tracing."""
        return (
            self.q_positions_BT is None
            and self.k_positions_BS is None
            and self.q_segments_BT is None
            and self.k_segments_BS is None
        )


def platform(call: SoftmaxCall) -> str:
    """Where the call will run, "cpu", "gpu" or "tpu": its mesh's devices, or the default backend."""
    mesh = jax.typeof(call.q_BTNH).sharding.mesh
    device = getattr(mesh, "abstract_device", None)
    return (device and device.platform) or jax.default_backend()


def kernel_refusal(call: SoftmaxCall) -> str | None:
    """Why no kernel can run the call on its mesh: XLA cannot partition one or number its heads; or None."""
    sharding = jax.typeof(call.q_BTNH).sharding
    mesh = sharding.mesh
    if any(kind == AxisType.Auto and mesh.shape[name] > 1 for name, kind in _axes(mesh)):
        return f"{mesh} has Auto axes, over which a kernel is not split: make them Explicit, or use shard_map"
    if any(sharding.spec) and (call.bias is not None or call.dropout_rate > 0):
        return "q is sharded, and a bias or dropout needs the global numbers of its rows and heads"
    return None


def _axes(mesh) -> list[tuple[str, AxisType]]:
    return [] if mesh.empty else list(zip(mesh.axis_names, mesh.axis_types, strict=True))


_GOLDEN = 0x9E3779B9


def _mix(h: jax.Array) -> jax.Array:
    """A full-avalanche 32-bit finaliser (lowbias32, Wellons 2018)."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x7FEB352D)
    h = (h ^ (h >> 15)) * jnp.uint32(0x846CA68B)
    return h ^ (h >> 16)


def dropout_keep(
    words: jax.Array,
    rate: float,
    batch_B: jax.Array,
    heads_N: jax.Array,
    q_pos_BT: jax.Array,
    k_pos_BS: jax.Array,
) -> jax.Array:
    """True where an entry survives dropout, boolean [B, N, T, S].

    The bit is a fixed hash of (key, batch row, global head, q position, k position) alone, so that
    every implementation, block size, cache and shard drops the same entries.
    """
    rows_BNT = dropout_rows(words, batch_B, heads_N, q_pos_BT)
    return dropout_keeps(rows_BNT[..., None], k_pos_BS[:, None, None, :], rate)


def dropout_rows(words: jax.Array, batch_B: jax.Array, heads_N: jax.Array, q_pos_BT: jax.Array) -> jax.Array:
    """The part of `dropout_keep`'s hash that keys have in common, uint32 [B, N, T]."""
    seed = jnp.uint32(0)
    for word in words:
        seed = _mix(seed + jnp.uint32(_GOLDEN) ^ word)
    rows = _mix(seed ^ batch_B.astype(jnp.uint32))
    rows = _mix(rows[:, None] + jnp.uint32(_GOLDEN) ^ heads_N.astype(jnp.uint32)[None])  # [B, N]
    return _mix(rows[:, :, None] + jnp.uint32(_GOLDEN) ^ q_pos_BT.astype(jnp.uint32)[:, None])


def dropout_keeps(rows: jax.Array, k_pos: jax.Array, rate: float) -> jax.Array:
    """True where an entry survives: rows of `dropout_rows` against key positions, broadcasting."""
    bits = _mix(rows + jnp.uint32(_GOLDEN) ^ k_pos.astype(jnp.uint32))
    return bits >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))
