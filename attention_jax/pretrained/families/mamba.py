"""Mamba-2: layers of a mixer alone."""

from __future__ import annotations

import math

from attention_jax.mixers import Mamba2Config
from attention_jax.model import BlockConfig, ModelConfig
from attention_jax.pretrained.description import Description
from attention_jax.pretrained.family import Family
from attention_jax.pretrained.table import convolution, linear, norm, same, transposed

_MIXER = "backbone.layers.{i}.mixer"
TABLE = (
    same("embed/embedding", "backbone.embeddings.weight"),
    *norm("norm1", "backbone.layers.{i}.norm"),
    *linear("mixer/in_proj", f"{_MIXER}.in_proj"),
    *convolution("mixer/convolution", f"{_MIXER}.conv1d"),
    *(same(f"mixer/{name}", f"{_MIXER}.{name}") for name in ("A_log", "D", "dt_bias")),
    *norm("mixer/norm", f"{_MIXER}.norm"),
    *linear("mixer/out", f"{_MIXER}.out_proj"),
    *norm("final_norm", "backbone.norm_f"),
    transposed("head/kernel", "lm_head.weight"),
)


def mamba2(d: Description, groups: int) -> Mamba2Config:
    """The mixer of a description."""
    d.only("hidden_act", "silu")
    d.ignore("time_step_min", "time_step_max", "time_step_floor", "rescale_prenorm_residual", "chunk_size")
    d.ignore("time_step_rank", "residual_in_fp32")
    low, high = _limits(d)
    expand, heads, width = d.integer("expand", 2), d.integer("num_heads", 128), d.integer("head_dim", 64)
    if heads * width != expand * d.integer("hidden_size"):
        raise ValueError(f"{d.where}: num_heads {heads} x head_dim {width} is not expand x hidden_size")
    return Mamba2Config(
        expand=expand,
        head_dim=width,
        state_dim=d.integer("state_size", 128),
        groups=d.integer("n_groups", groups),
        convolution=d.integer("conv_kernel", 4),
        dt_limit_low=low,
        dt_limit_high=high,
        norm_eps=float(d.number("layer_norm_epsilon", 1e-5)),
        use_bias=d.flag("use_bias", False),
        convolution_bias=d.flag("use_conv_bias", True),
    )


def _limits(d: Description) -> tuple[float, float | None]:
    """The range that steps are clipped to. transformers 5 writes an infinite end as a mapping."""
    limits = d.items("time_step_limit", [0.0, math.inf])
    limits = [math.inf if x == {"__float__": "Infinity"} else x for x in limits]
    if len(limits) != 2 or not all(isinstance(x, (int, float)) for x in limits):
        raise ValueError(f"{d.where}: time_step_limit must be two numbers, got {str(limits)[:60]}")
    return float(limits[0]), None if math.isinf(limits[1]) else float(limits[1])


def _model(d: Description) -> ModelConfig:
    layers = d.layers()
    return ModelConfig(
        vocab_size=d.integer("vocab_size"),
        d_model=d.integer("hidden_size"),
        num_layers=layers,
        blocks=(BlockConfig(mamba2(d, groups=8), None),),
        norm_eps=float(d.number("layer_norm_epsilon", 1e-5)),
        tie_embeddings=d.flag("tie_word_embeddings", False),
    )


FAMILIES = (Family("Mamba-2", ("mamba2",), _model, TABLE),)
