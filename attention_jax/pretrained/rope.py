"""Rotary embeddings as published descriptions spell them, in both spellings.

On the hub: `rope_theta`, `rope_scaling` (with `type` or `rope_type`) and `partial_rotary_factor`. Since
transformers 5: `rope_parameters`, nested by the type of the layer where types differ.
"""

from __future__ import annotations

import math
from typing import Any

from attention_jax.positions import RoPE
from attention_jax.positions.scalings import LinearScaling, Llama3, LongRoPE, Scaling, YaRN
from attention_jax.pretrained.description import Description


def read_rope(
    d: Description,
    head_dim: int,
    *,
    layer_type: str | None = None,
    theta: float = 10_000.0,
    factor: float = 1.0,
    layout: str = "half",
    theta_key: str = "rope_theta",
    scaled: bool = True,
    others: tuple[str, ...] = (),
) -> RoPE:
    """The rotary embedding of a layer.

    Args:
      head_dim: width of a head, of which partial_rotary_factor rotates a share.
      layer_type: full_attention, sliding_attention ... where rope_parameters is nested.
      theta, factor: the family's rope_theta and partial_rotary_factor where the description has none.
      theta_key, scaled: in the older spelling, the key of this layer's theta, and whether rope_scaling is for
        it.
      others: keys beside those of the rotary embedding, which the family reads itself.
    """
    new = d.mapping("rope_parameters", None)
    if new is not None and layer_type is not None and layer_type in new.values:
        new = new.mapping(layer_type)
    old = d.mapping("rope_scaling", None)
    d.ignore("partial_rotary_factor", "rope_theta")
    given = new if new is not None else old if scaled else None
    theta = d.number(theta_key, theta)
    factor = d.number("partial_rotary_factor", factor)
    if new is not None:
        theta, factor = new.number("rope_theta", theta), new.number("partial_rotary_factor", factor)
    width = int(head_dim * factor)
    if given is not None:
        given.ignore(*others)
    scaling = None if given is None else _scaling(d, given)
    return RoPE(
        theta=float(theta), width=None if width == head_dim else width, layout=layout, scaling=scaling
    )


def _scaling(d: Description, s: Description) -> Scaling | None:
    s.ignore("type", "rope_type", "rope_theta", "partial_rotary_factor")
    kind = s.word("rope_type", s.word("type", "default"))
    trained = d.integer("max_position_embeddings", None)
    match kind:
        case "default":
            scaling = None
        case "linear":
            scaling = LinearScaling(factor=float(s.number("factor")))
        case "llama3":
            scaling = Llama3(
                factor=float(s.number("factor")),
                low_freq_factor=float(s.number("low_freq_factor")),
                high_freq_factor=float(s.number("high_freq_factor")),
                original_length=s.integer("original_max_position_embeddings"),
            )
        case "yarn":
            scaling = _yarn(s, trained)
        case "longrope" | "su":
            scaling = _longrope(d, s, trained)
        case _:
            known = "default, linear, llama3, yarn, longrope"
            raise ValueError(f"{s.where}: rope_type {kind!r} is not supported; there are {known}")
    s.finish()
    return scaling


def _yarn(s: Description, trained: int | None) -> YaRN:
    original = s.integer("original_max_position_embeddings", trained)
    options: dict[str, Any] = {}
    for key in ("beta_fast", "beta_slow", "attention_factor"):
        if (value := s.number(key, None)) is not None:
            options[key] = float(value)
    mscale, all_dim = s.number("mscale", None), s.number("mscale_all_dim", None)
    if mscale and all_dim:  # with only one of them, transformers uses neither
        options |= {"mscale": float(mscale), "mscale_all_dim": float(all_dim)}
    return YaRN(
        factor=float(s.number("factor")),
        original_length=original,
        truncate=s.flag("truncate", True),
        **options,
    )


def _longrope(d: Description, s: Description, trained: int | None) -> LongRoPE:
    original = s.integer("original_max_position_embeddings", None) or d.integer(
        "original_max_position_embeddings", trained
    )
    attention_factor = s.number("attention_factor", None)
    if attention_factor is None:  # published models apply theirs to short texts, too
        ratio = max(1.0, (trained or original) / original)
        attention_factor = math.sqrt(1 + math.log(ratio) / math.log(original))
    factor = s.number("factor", None)
    if factor is not None and trained is not None and factor != trained / original:
        raise ValueError(f"{s.where}: factor {factor} is not {trained} / {original}, the two lengths' ratio")
    return LongRoPE(
        short_factor=tuple(map(float, s.items("short_factor"))),
        long_factor=tuple(map(float, s.items("long_factor"))),
        original_length=original,
        length=d.length or original,
        attention_factor=float(attention_factor),
    )
