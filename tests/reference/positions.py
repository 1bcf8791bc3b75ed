"""Position codes in float64: RoPE by complex rotation, scalings pair by pair, ALiBi's slopes as published."""

from __future__ import annotations

import math

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


def rope(x, positions, *, theta, width, layout, scaling=None, gain=1.0):
    """x [B, T, heads, H] rotated: feature pair j turns by position * theta^(-2j / width), times the gain.

    scaling: a dict for `scaled`; gain: broadcastable to [B, T, width / 2].
    """
    x = np.asarray(x, np.float64)
    pairs = np.arange(width // 2)
    frequencies, factor = scaled(theta, width, **(scaling or {}))
    phase = np.exp(1j * np.asarray(positions, np.float64)[..., None] * frequencies) * factor * gain
    first, second = {
        "half": (pairs, pairs + width // 2),
        "interleaved": (2 * pairs, 2 * pairs + 1),
    }[layout]
    rotated = (x[..., first] + 1j * x[..., second]) * phase[:, :, None, :]
    y = x.copy()
    y[..., first], y[..., second] = rotated.real, rotated.imag
    return y


def scaled(theta, width, kind=None, **settings):
    """(the frequencies [width / 2], the factor of cosines and sines) of a published scaling."""
    frequencies = [theta ** (-2 * j / width) for j in range(width // 2)]
    if kind is None:
        return np.array(frequencies), 1.0
    return SCALINGS[kind](frequencies, theta, width, **settings)


def linear(frequencies, theta, width, *, factor):
    """Chen et al. 2023, section 2.3: position p becomes p L / L'."""
    return np.array([f / factor for f in frequencies]), 1.0


def dynamic_ntk(frequencies, theta, width, *, factor, original_length, length):
    """bloc97's base b s^(d / (d - 2)) with emozilla's s, which grows with the length."""
    length = max(length, original_length)
    s = factor * length / original_length - (factor - 1)
    base = theta * s ** (width / (width - 2))
    return np.array([base ** (-2 * j / width) for j in range(width // 2)]), 1.0


def yarn(
    frequencies, theta, width, *, factor, original_length, beta_fast=32, beta_slow=1, attention_factor=None,
    mscale=1, mscale_all_dim=0, truncate=True,
):  # fmt: skip
    """Peng et al. 2023 and the authors' code: the range of pairs by the number of rotations, then a ramp."""

    def pair_with(rotations):
        return width / 2 * math.log(original_length / (2 * math.pi * rotations)) / math.log(theta)

    first, last = pair_with(beta_fast), pair_with(beta_slow)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    if first == last:
        last += 0.001
    out = []
    for j, f in enumerate(frequencies):
        ramp = min(max((j - first) / (last - first), 0), 1)
        out.append((1 - ramp) * f + ramp * f / factor)
    if attention_factor is None:
        attention_factor = (0.1 * mscale * math.log(factor) + 1) / (
            0.1 * mscale_all_dim * math.log(factor) + 1
        )
    return np.array(out), attention_factor


def llama3(frequencies, theta, width, *, factor, low_freq_factor, high_freq_factor, original_length):
    """Meta's released code: by wavelength."""
    out = []
    for f in frequencies:
        wavelength = 2 * math.pi / f
        if wavelength < original_length / high_freq_factor:
            out.append(f)
        elif wavelength > original_length / low_freq_factor:
            out.append(f / factor)
        else:
            smooth = original_length / wavelength - low_freq_factor
            smooth /= high_freq_factor - low_freq_factor
            out.append((1 - smooth) * f / factor + smooth * f)
    return np.array(out), 1.0


def longrope(
    frequencies, theta, width, *, short_factor, long_factor, original_length, length, attention_factor=None
):
    """Ding et al. 2024: a divisor per pair, and an attention factor from how far the text was stretched."""
    divisors = long_factor if length > original_length else short_factor
    if attention_factor is None:
        stretch = max(length / original_length, 1)
        attention_factor = math.sqrt(1 + math.log(stretch) / math.log(original_length))
    return np.array([f / d for f, d in zip(frequencies, divisors, strict=True)]), attention_factor


SCALINGS = {
    "linear": linear,
    "dynamic_ntk": dynamic_ntk,
    "yarn": yarn,
    "llama3": llama3,
    "longrope": longrope,
}


def xpos(position, width, *, scale_base, centre):
    """What multiplies a query's pairs at a position, [width / 2]: Sun et al. 2022, algorithm 1, gamma 0.4."""
    zeta = np.array([(2 * j / width + 0.4) / (1 + 0.4) for j in range(width // 2)])
    return zeta ** ((np.asarray(position, np.float64)[..., None] - centre) / scale_base)


def temperature(position, *, floor, scale, offset=1):
    """Llama 4's factor of a query at a position (Meta's released code); offset 0 in Ministral 3."""
    return math.log(math.floor((position + offset) / floor) + 1) * scale + 1


def sinusoid(position, feature, width):
    """One entry of Vaswani et al. 2017, section 3.5."""
    angle = position / 10000 ** (2 * (feature // 2) / width)
    return math.cos(angle) if feature % 2 else math.sin(angle)


def t5_bucket(relative_position, *, bidirectional, buckets, max_distance):
    """The bucket of k position - q position: Raffel et al. 2020, section 2.1, as in the released code."""
    bucket = 0
    if bidirectional:
        buckets //= 2
        bucket = buckets if relative_position > 0 else 0
        distance = abs(relative_position)
    else:
        distance = max(-relative_position, 0)
    exact = buckets // 2
    if distance < exact:
        return bucket + distance
    share = math.log(distance / exact) / math.log(max_distance / exact)
    return bucket + min(exact + int(share * (buckets - exact)), buckets - 1)
