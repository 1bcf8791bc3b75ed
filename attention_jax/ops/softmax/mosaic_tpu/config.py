"""Block sizes of the TPU kernels: what a user may set, and the defaults."""

from __future__ import annotations

import dataclasses

from attention_jax.ops.arguments import positive_integer


@dataclasses.dataclass(frozen=True)
class MosaicTPUConfig:
    """Block sizes of "mosaic_tpu" as (queries, keys).

    Lengths are cut into equal blocks no larger than these, in multiples of 128. None: by head width and dtype
    (`DEFAULTS`).
    """

    #: Blocks of the forward.
    forward: tuple[int, int] | None = None
    #: Blocks of the backward.
    backward: tuple[int, int] | None = None
    #: VMEM of a core; None: what the chip has.
    vmem_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in ("forward", "backward"):
            sizes = getattr(self, name)
            if sizes is None:
                continue
            if not isinstance(sizes, tuple | list) or len(sizes) != 2:
                raise ValueError(f"{name} must be a pair (queries, keys) or None, got {sizes!r}")
            object.__setattr__(self, name, tuple(positive_integer(name, size) for size in sizes))
        if self.vmem_bytes is not None:
            positive_integer("vmem_bytes", self.vmem_bytes)

    def blocks(self, width: int, itemsize: int, backward: bool) -> tuple[int, int]:
        """(queries, keys) of a block, for the wider of keys and values and the bytes of an element."""
        given = self.backward if backward else self.forward
        if given is not None:
            return given
        row = next(row for (most, size), row in DEFAULTS.items() if width <= most and itemsize == size)
        return row.blocks(width, itemsize, backward)


# (widest head, bytes of an element) to blocks. Found by counting the bundles that the compiler schedules per
# live block (scripts/kernel_report.py). Chips differ in their VMEM alone.
DEFAULTS = {
    (128, 2): MosaicTPUConfig((512, 512), (512, 512)),
    (256, 2): MosaicTPUConfig((512, 512), (512, 512)),
    (128, 4): MosaicTPUConfig((512, 512), (256, 512)),
    (256, 4): MosaicTPUConfig((256, 512), (256, 256)),
}
WIDEST = max(width for width, _ in DEFAULTS)
