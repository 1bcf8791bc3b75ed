"""Weights in MXFP4, as the experts of gpt-oss are published: blocks of 32 numbers of 4 bits with one scale.

A number is one of 16 values times 2^(scale - 127), which bfloat16 holds exactly.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from attention_jax.pretrained.files import Tensors

_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_VALUES = np.concatenate([_VALUES, -_VALUES])
_BIAS = 127
_LARGEST = 252  # 6 * 2^125; bfloat16 does not hold more


def unpacked(tensors: Tensors) -> Tensors:
    """The tensors, with a kernel [E, in, out] for each pair NAME_blocks and NAME_scales, in bfloat16."""
    there = set(tensors.names())
    packed = {
        name.removesuffix("_blocks")
        for name in there
        if name.endswith("_blocks") and name.removesuffix("_blocks") + "_scales" in there
    }
    return _Unpacked(tensors, packed) if packed else tensors


class _Unpacked:
    """`tensors` without the pairs of `packed`, and with what they stand for."""

    def __init__(self, tensors: Tensors, packed: set[str]):
        self._tensors, self._packed, self.metadata = tensors, packed, tensors.metadata
        if both := packed & set(tensors.names()):
            raise ValueError(f"tensor {min(both)} is there twice, also as blocks and scales")

    def names(self) -> list[str]:
        parts = {name + end for name in self._packed for end in ("_blocks", "_scales")}
        return [name for name in self._tensors.names() if name not in parts] + sorted(self._packed)

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._packed:
            return self._tensors.shape(name)
        E, rows, groups, width = self._block_shape(name)
        return E, groups * width * 2, rows

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(jnp.bfloat16) if name in self._packed else self._tensors.dtype(name)

    def read(self, name: str) -> np.ndarray:
        if name not in self._packed:
            return self._tensors.read(name)
        self._block_shape(name)
        blocks, scales = (self._tensors.read(f"{name}_{part}") for part in ("blocks", "scales"))
        if (largest := scales.max(initial=0)) > _LARGEST:
            raise ValueError(f"tensor {name}_scales: a scale must be <= {_LARGEST}, got {largest}")
        out = np.empty(self.shape(name), jnp.bfloat16)
        for e, (blocks_RGW, scales_RG) in enumerate(zip(blocks, scales, strict=True)):
            out[e] = _numbers(blocks_RGW, scales_RG).T
        return out

    def read_slice(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        return self.read(name)[index] if name in self._packed else self._tensors.read_slice(name, index)

    def _block_shape(self, name: str) -> tuple[int, ...]:
        """The shape [E, out, groups, 16] of the blocks; ValueError for blocks and scales that do not fit."""
        pair = [f"{name}_{part}" for part in ("blocks", "scales")]
        shapes = [tuple(self._tensors.shape(part)) for part in pair]
        is_bytes = all(self._tensors.dtype(part) == np.uint8 for part in pair)
        fits = len(shapes[0]) == 4 and shapes[0][3] == 16 and shapes[0][:3] == shapes[1]
        if not (fits and is_bytes):
            raise ValueError(
                f"tensor {name}_blocks: blocks of MXFP4 are uint8 [E, out, groups, 16] with scales "
                f"[E, out, groups], got {list(shapes[0])} and {list(shapes[1])}"
            )
        return shapes[0]


def _numbers(blocks_RGW: np.ndarray, scales_RG: np.ndarray) -> np.ndarray:
    """float32 [R, 32 G]; the low half of a byte comes first."""
    pairs = np.stack([blocks_RGW & 15, blocks_RGW >> 4], axis=-1)
    exponents_RG = scales_RG.astype(np.int32) - _BIAS
    values = np.ldexp(_VALUES[pairs], exponents_RG[..., None, None])
    return values.reshape(len(blocks_RGW), -1)
