"""Position codes in float64: RoPE by complex rotation, ALiBi's slopes as published."""

from __future__ import annotations

import numpy as np

# Press et al. 2022, section 3, and `get_slopes` of the authors' code for counts that are no power of two.
ALIBI_SLOPES = {
    1: (0.00390625,),
    2: (0.0625, 0.00390625),
    3: (0.0625, 0.00390625, 0.25),
    4: (0.25, 0.0625, 0.015625, 0.00390625),
    8: (0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625),
    12: (
        0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625,
        0.7071067811865476, 0.35355339059327384, 0.17677669529663692, 0.08838834764831849,
    ),
    20: (
        0.7071067811865476, 0.5, 0.35355339059327384, 0.25,
        0.17677669529663692, 0.125, 0.08838834764831849, 0.0625,
        0.044194173824159244, 0.03125, 0.022097086912079622, 0.015625,
        0.011048543456039811, 0.0078125, 0.005524271728019906, 0.00390625,
        0.8408964152537145, 0.5946035575013605, 0.42044820762685725, 0.29730177875068026,
    ),
}  # fmt: skip


def rope(x, positions, *, theta, width, layout):
    """x [B, T, heads, H] rotated: feature pair j turns by position * theta^(-2j / width)."""
    x = np.asarray(x, np.float64)
    pairs = np.arange(width // 2)
    phase = np.exp(1j * np.asarray(positions, np.float64)[..., None] * theta ** (-2.0 * pairs / width))
    first, second = {
        "half": (pairs, pairs + width // 2),
        "interleaved": (2 * pairs, 2 * pairs + 1),
    }[layout]
    turned = (x[..., first] + 1j * x[..., second]) * phase[:, :, None, :]
    y = x.copy()
    y[..., first], y[..., second] = turned.real, turned.imag
    return y
