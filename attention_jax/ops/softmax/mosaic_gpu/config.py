"""Tile sizes of the Hopper kernels: what a user may set, and the defaults by head width."""

from __future__ import annotations

import dataclasses

from attention_jax.ops.arguments import positive_integer

GROUP = 64  # rows of a warpgroup's matrix instruction
WORD = 32  # mask bits of a word
WIDTHS = (64, 96, 128, 192, 256)  # head widths the kernels know; others are padded with zeros


@dataclasses.dataclass(frozen=True)
class HopperTileSizes:
    """Tile sizes of one kernel."""

    #: Keys per step, in the kernels over keys queries per step; a multiple of 32.
    block: int
    #: Steps in flight.
    stages: int
    #: Warpgroups that compute, 2 or 3, each with 64 rows of its own. The kernels over keys take 2.
    warpgroups: int = 2

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            positive_integer(field.name, getattr(self, field.name))
        if self.block % WORD:
            raise ValueError(f"block must be a multiple of {WORD}, got {self.block}")
        if self.warpgroups not in (2, 3):
            raise ValueError(f"warpgroups must be 2 or 3, got {self.warpgroups}")

    @property
    def rows(self) -> int:
        """Of a thread block whose warpgroups own 64 each."""
        return self.warpgroups * GROUP

    def half_block(self) -> HopperTileSizes:
        """With blocks of half the size, as many tokens in flight; a block of 32 stays."""
        if self.block <= WORD:
            return self
        return dataclasses.replace(self, block=self.block // 2, stages=self.stages * 2)

    def two_warpgroups(self) -> HopperTileSizes:
        """For two warpgroups."""
        return dataclasses.replace(self, warpgroups=2)


@dataclasses.dataclass(frozen=True)
class MosaicGPUConfig:
    """Tile sizes and backward of "mosaic_gpu".

    Sizes that are None are the defaults of the head width (`FORWARD`, ...), made smaller where registers or
    shared memory must hold more than q, k and v. Sizes that are given are taken as they are.
    """

    #: The backward as two kernels, which give the same bits every time. False: as one kernel with five matrix
    #: products in place of seven, which adds to dQ in whatever order its thread blocks arrive.
    deterministic: bool = True
    #: The forward: keys per step.
    forward: HopperTileSizes | None = None
    #: The kernel of the backward for dQ: keys per step.
    backward_q: HopperTileSizes | None = None
    #: The kernel of the backward for dK and dV: queries per step.
    backward_kv: HopperTileSizes | None = None
    #: The backward in one kernel: queries per step, of which it takes 64.
    fused: HopperTileSizes | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.deterministic, bool):
            raise ValueError(f"deterministic must be True or False, got {self.deterministic!r}")
        for name in ("forward", "backward_q", "backward_kv", "fused"):
            sizes = getattr(self, name)
            if sizes is None:
                continue
            if not isinstance(sizes, HopperTileSizes):
                raise ValueError(f"{name} must be HopperTileSizes or None, got {sizes!r}")
            if name in ("backward_kv", "fused") and sizes.warpgroups != 2:
                raise ValueError(f"{name} takes 2 warpgroups, got {sizes}")


# By the larger of the padded widths of keys and values. `scripts/tune.py` times the alternatives.
FORWARD = {
    64: HopperTileSizes(128, 4, warpgroups=3),
    96: HopperTileSizes(64, 4, warpgroups=3),
    128: HopperTileSizes(128, 2),
    192: HopperTileSizes(64, 3),
    256: HopperTileSizes(64, 2),
}
BACKWARD_Q = {
    64: HopperTileSizes(64, 4, warpgroups=3),
    96: HopperTileSizes(64, 3, warpgroups=3),
    128: HopperTileSizes(64, 3),
    192: HopperTileSizes(64, 2),
    256: HopperTileSizes(32, 3),
}
BACKWARD_KV = {
    64: HopperTileSizes(64, 3),
    96: HopperTileSizes(64, 2),
    128: HopperTileSizes(64, 2),
    192: HopperTileSizes(64, 2),
    256: HopperTileSizes(64, 2),
}
FUSED = {
    64: HopperTileSizes(64, 3),
    96: HopperTileSizes(64, 2),
    128: HopperTileSizes(64, 2),
    192: HopperTileSizes(64, 2),
    256: HopperTileSizes(64, 2),
}
