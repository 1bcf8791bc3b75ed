"""RoPE's frequencies, and the scalings that extend the context beyond the trained length."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Any, Literal

import numpy as np

from attention_jax.choices import ByKind, check_choices

FORBID = {"extra": "forbid", "strict": True}


def check(kind: str, name: str, value: Any, good: bool, need: str) -> None:
    if not good:
        raise ValueError(f"{kind} {name} must be {need}, got {value}")


def plain_frequencies(theta: float, width: int) -> np.ndarray:
    """theta^(-2j / width) for the pairs j, float64 [width / 2]."""
    return theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)


class BaseScaling:
    """Interface of all scalings: frozen dataclasses that YAML selects by `kind`."""

    @property
    def magnitude(self) -> float:
        """The factor of cosines and sines; it enters each score squared."""
        return 1.0

    @property
    def softmax_factor(self) -> float:
        """The factor of the softmax scale in latent attention (MLA); other attention ignores it."""
        return 1.0

    def frequencies(self, theta: float, width: int) -> np.ndarray:
        """The angle per position of each pair, float64 [width / 2]; ValueError for an unsupported width."""
        raise NotImplementedError

    def _check_factor(self) -> None:
        check_choices(self)
        check(type(self).__name__, "factor", self.factor, 1 <= self.factor <= 1e6, "from 1 to 1e6")

    def _check_lengths(self, *names: str, least: int = 1) -> None:
        for name in names:
            value = getattr(self, name)
            check(type(self).__name__, name, value, value >= least, f">= {least}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling(BaseScaling):
    """Position interpolation, p / factor: Chen et al. 2023 (arXiv 2306.15595)."""

    __pydantic_config__ = FORBID

    kind: Literal["linear"] = "linear"  #: the scaling
    factor: float  #: the extended length divided by the trained length

    def __post_init__(self):
        self._check_factor()

    def frequencies(self, theta: float, width: int) -> np.ndarray:
        return plain_frequencies(theta, width) / self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicNTK(BaseScaling):
    """A base that depends on the length: bloc97 and emozilla 2023, described in YaRN's section 3.3 (2309.00071).

        theta' = theta * (factor * r - (factor - 1))^(width / (width - 2)),   r = max(1, length / original)

    `length` is fixed. If the base followed the current length, new queries would be inconsistent with the
    keys already rotated in a cache.
    """

    __pydantic_config__ = FORBID

    kind: Literal["dynamic_ntk"] = "dynamic_ntk"  #: the scaling
    factor: float = 1.0  #: growth rate of the base with the length
    original_length: int  #: trained length in tokens
    length: int  #: maximum length in tokens; fixed, so that cached keys stay valid

    def __post_init__(self):
        self._check_factor()
        self._check_lengths("original_length", "length")

    def frequencies(self, theta: float, width: int) -> np.ndarray:
        if width < 4:
            raise ValueError(f"DynamicNTK needs a RoPE width of at least 4, got {width}")
        ratio = max(1.0, self.length / self.original_length)
        stretch = (self.factor * ratio - (self.factor - 1)) ** (width / (width - 2))
        return plain_frequencies(theta * stretch, width)


@dataclasses.dataclass(frozen=True, kw_only=True)
class YaRN(BaseScaling):
    """Interpolation of low frequencies only: Peng et al. 2023 (arXiv 2309.00071).

    The pair with r full rotations over the original length has the index

        c(r) = width ln(original / (2 pi r)) / (2 ln theta)

    Below c(beta_fast) a frequency is unchanged, above c(beta_slow) it is divided by `factor`, and in between
    the two are mixed linearly in the index, as in the authors' code. Cosines and sines are multiplied by
    0.1 ln(factor) + 1, or by m(mscale) / m(mscale_all_dim) with m(x) = 0.1 x ln(factor) + 1, as in DeepSeek-V2
    (2405.04434).
    """

    __pydantic_config__ = FORBID

    kind: Literal["yarn"] = "yarn"  #: the scaling
    factor: float  #: the extended length divided by the trained length
    original_length: int  #: trained length in tokens
    beta_fast: float = 32.0  #: pairs with more rotations than this over the original length are unchanged
    beta_slow: float = 1.0  #: pairs with fewer rotations than this are interpolated
    attention_factor: float | None = (
        None  #: multiplies cosines and sines; null: computed from factor, mscale and mscale_all_dim
    )
    #: weight of ln(factor) in the numerator of the attention factor
    mscale: float = 1.0
    #: weight of ln(factor) in its denominator; for latent attention see `softmax_factor`
    mscale_all_dim: float = 0.0
    truncate: bool = True  #: round the ends of the range between beta_fast and beta_slow outward

    def __post_init__(self):
        self._check_factor()
        self._check_lengths("original_length")
        for name in ("beta_fast", "beta_slow", "attention_factor"):
            value = getattr(self, name)
            check("YaRN", name, value, value is None or 1e-6 <= value <= 1e6, "from 1e-6 to 1e6")
        check("YaRN", "beta_fast", self.beta_fast, self.beta_fast > self.beta_slow, "above beta_slow")
        for name in ("mscale", "mscale_all_dim"):
            value = getattr(self, name)
            check("YaRN", name, value, 0 <= value <= 100, "from 0 to 100")
        if self.attention_factor is not None and (self.mscale, self.mscale_all_dim) != (1.0, 0.0):
            raise ValueError("YaRN attention_factor excludes mscale and mscale_all_dim: set one or the other")

    @property
    def magnitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        return self._mscale(self.mscale) / self._mscale(self.mscale_all_dim)

    @property
    def softmax_factor(self) -> float:
        return self._mscale(self.mscale_all_dim) ** 2

    def _mscale(self, weight: float) -> float:
        return 0.1 * weight * math.log(self.factor) + 1

    def frequencies(self, theta: float, width: int) -> np.ndarray:
        low, high = self._correction_range(theta, width)
        # As in the published code, this avoids 0 / 0; the ramp is then a step after pair `low`.
        high = high + 0.001 if low == high else high
        interpolated = np.clip((np.arange(width // 2) - low) / (high - low), 0, 1)
        return plain_frequencies(theta, width) * (1 - interpolated + interpolated / self.factor)

    def _correction_range(self, theta: float, width: int) -> tuple[float, float]:
        check("YaRN", "RoPE theta", theta, theta > 1, "> 1")
        low, high = (
            width * math.log(self.original_length / (2 * math.pi * rotations)) / (2 * math.log(theta))
            for rotations in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        if low > high:
            raise ValueError(
                f"YaRN: no pair of RoPE width {width}, theta {theta} makes beta_slow {self.beta_slow} to "
                f"beta_fast {self.beta_fast} rotations over original_length {self.original_length}; change these"
            )
        return low, high


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3(BaseScaling):
    """Llama 3.1's scaling by wavelength: Meta's released code (Grattafiori et al. 2024, arXiv 2407.21783).

    r = original / wavelength is the number of rotations of a pair over the original length. A frequency with
    r > high_freq_factor is unchanged, one with r < low_freq_factor is divided by `factor`, and in between the
    two are mixed linearly in r.
    """

    __pydantic_config__ = FORBID

    kind: Literal["llama3"] = "llama3"  #: the scaling
    factor: float = 8.0  #: divisor of low frequencies
    low_freq_factor: float = 1.0  #: pairs with fewer rotations than this over the original length are low
    high_freq_factor: float = 4.0  #: pairs with more rotations than this are unchanged
    original_length: int = 8192  #: trained length in tokens

    def __post_init__(self):
        self._check_factor()
        self._check_lengths("original_length")
        low, high = self.low_freq_factor, self.high_freq_factor
        check("Llama3", "low_freq_factor", low, 1e-6 <= low <= 1e6, "from 1e-6 to 1e6")
        need = f"above low_freq_factor {low} and at most 1e6"
        check("Llama3", "high_freq_factor", high, low < high <= 1e6, need)

    def frequencies(self, theta: float, width: int) -> np.ndarray:
        plain = plain_frequencies(theta, width)
        rotations = self.original_length * plain / (2 * np.pi)
        low, high = self.low_freq_factor, self.high_freq_factor
        kept = np.clip((rotations - low) / (high - low), 0, 1)
        return plain * (kept + (1 - kept) / self.factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRoPE(BaseScaling):
    """A divisor for each pair, found by search: Ding et al. 2024 (arXiv 2402.13753).

    `short_factor` divides the frequencies if `length` is at most the original length. Otherwise `long_factor`
    does, and cosines and sines are multiplied by sqrt(1 + ln(length / original) / ln(original)). `length` is
    fixed: cached keys rotated with one list would be inconsistent with queries rotated with the other.
    """

    __pydantic_config__ = FORBID

    kind: Literal["longrope"] = "longrope"  #: the scaling
    short_factor: tuple[float, ...]  #: width / 2 divisors, for lengths up to original_length
    long_factor: tuple[float, ...]  #: width / 2 divisors, for longer ones
    original_length: int  #: trained length in tokens
    length: int  #: maximum length in tokens; fixed, it selects the list
    #: multiplies cosines and sines; null: computed from length and original_length, and 1 up to the latter; set
    #: it for models that apply their factor to short texts too (Phi-3)
    attention_factor: float | None = None

    def __post_init__(self):
        check_choices(self)
        self._check_lengths("original_length", least=2)
        self._check_lengths("length")
        for name in ("short_factor", "long_factor"):
            values = tuple(getattr(self, name))
            object.__setattr__(self, name, values)
            bad = [value for value in values if not 1e-6 <= value <= 1e6]
            check("LongRoPE", name, bad[:3], not bad, "numbers from 1e-6 to 1e6")
        factor = self.attention_factor
        good = factor is None or 1e-6 <= factor <= 1e6
        check("LongRoPE", "attention_factor", factor, good, "from 1e-6 to 1e6")

    @property
    def magnitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        ratio = max(1.0, self.length / self.original_length)
        return math.sqrt(1 + math.log(ratio) / math.log(self.original_length))

    def frequencies(self, theta: float, width: int) -> np.ndarray:
        for name in ("short_factor", "long_factor"):
            count = len(getattr(self, name))
            check("LongRoPE", name, count, count == width // 2, f"{width // 2} numbers (RoPE width / 2)")
        long = self.length > self.original_length
        return plain_frequencies(theta, width) / np.array(self.long_factor if long else self.short_factor)


Scaling = Annotated[LinearScaling | DynamicNTK | YaRN | Llama3 | LongRoPE, ByKind()]
