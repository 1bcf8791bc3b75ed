"""How a decoding state is stored."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, Self

import jax.numpy as jnp

from attention_jax.dtypes import accumulator

_MOST_SPARE = 2**12


@dataclasses.dataclass(frozen=True)
class CacheOptions:
    """How the states of mixers are stored; every mechanism uses the options that apply to its state.

    dtype: dtype of cached keys, values and convolution inputs; None is that of the layer. Running sums are
      float32 whatever it is, and float64 beside it.
    spare: the number of tokens that `State.rewind` can take back. Rings get as many further slots, and
      recurrent states keep the states after each of the last `spare` + 1 tokens. Caches that keep all tokens
      need none.
    quantize: store keys and values as int8 or int4 with a float32 scale per token and head; None stores them
      in `dtype`.
    residual: with `quantize`, the number of newest tokens whose keys and values are also kept in `dtype`.

    Raises: ValueError for an option outside its range.
    """

    dtype: Any = None
    spare: int = 0
    quantize: Literal["int8", "int4"] | None = None
    residual: int = 0

    def __post_init__(self):
        if self.dtype is not None:
            if not jnp.issubdtype(self.dtype, jnp.floating):
                given = jnp.dtype(self.dtype)
                more = ": set quantize" if given.name.startswith("int") else ""
                raise ValueError(f"dtype of cached keys and values must be floating point, got {given}{more}")
            object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        for name in ("spare", "residual"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MOST_SPARE:
                raise ValueError(f"{name} must be an integer in [0, {_MOST_SPARE}], got {value!r}")
        if self.quantize not in (None, "int8", "int4"):
            raise ValueError(f"quantize must be int8, int4 or None, got {self.quantize!r}")
        if self.residual and self.quantize is None:
            raise ValueError(
                f"residual {self.residual} needs quantize: all tokens are stored in dtype without it"
            )

    @property
    def storage_dtype(self) -> Any:
        """`dtype`, float32 where none is given."""
        return jnp.dtype(jnp.float32) if self.dtype is None else self.dtype

    @property
    def sum_dtype(self) -> Any:
        """That of running sums: float32, or float64 where `dtype` is."""
        return accumulator(self.storage_dtype)

    def of_layer(self, dtype: Any) -> Self:
        """The options with the dtype of a layer where none is given."""
        return self if self.dtype is not None else dataclasses.replace(self, dtype=dtype)

    def unquantized(self) -> Self:
        """The options without `quantize`, for states that codes would not make smaller."""
        return dataclasses.replace(self, quantize=None, residual=0)


DEFAULT_CACHE = CacheOptions()
