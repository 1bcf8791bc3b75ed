"""Checks of single arguments that the ops share."""

from __future__ import annotations

import math
import numbers
from typing import Any

from attention_jax.choices import check_number


def is_array(x: Any) -> bool:
    """True for an array or a tracer, False for a Python number or a list."""
    return hasattr(x, "shape") and hasattr(x, "dtype")


def finite_number(name: str, value: Any) -> float:
    """The Python number as a float; ValueError for anything else, a traced value included."""
    if not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite Python number (multiply q by a traced one), got {value!r}")
    check_number(name, float(value))
    return float(value)


def positive_integer(name: str, value: Any) -> int:
    """The integer >= 1; ValueError for anything else."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    return int(value)
