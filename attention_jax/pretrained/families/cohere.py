"""Cohere's Command R (1 and 2): parallel layers of one layer norm, and interleaved rotary embeddings."""

from __future__ import annotations

from typing import Any

from attention_jax.masks import Causal
from attention_jax.model import BlockConfig, ModelConfig
from attention_jax.pretrained.description import Description
from attention_jax.pretrained.families.gpt import layer_normed
from attention_jax.pretrained.families.llama import (
    OUTER,
    attention,
    attention_table,
    dense_table,
    gated,
    head_dim,
    layer_types,
    norms_table,
    window,
)
from attention_jax.pretrained.family import Family
from attention_jax.pretrained.rope import read_rope

TABLE = (*OUTER, *norms_table(norm1="input_layernorm"), *attention_table(), *dense_table())


def _model(d: Description, mixers: list[Any]) -> ModelConfig:
    mlp = gated(d, use_bias=False)
    return layer_normed(
        d,
        [BlockConfig(mixer, mlp, parallel=True, shared_norm=True) for mixer in mixers],
        width=d.integer("hidden_size"),
        eps="layer_norm_eps",
        norm_bias=False,
        logit_scale=float(d.number("logit_scale", 0.0625)),
        tie_embeddings=d.flag("tie_word_embeddings", True),
    )


def _cohere(d: Description) -> ModelConfig:
    d.ignore("model_max_length")
    mixer = attention(
        d,
        Causal(),
        rope=read_rope(d, head_dim(d), theta=5e5, layout="interleaved"),
        use_bias=d.flag("attention_bias", False),
        qk_norm="layer_per_head" if d.flag("use_qk_norm", False) else None,
        qk_norm_eps=float(d.number("layer_norm_eps", 1e-5)),
    )
    return _model(d, [mixer] * d.layers())


def _cohere2(d: Description) -> ModelConfig:
    layers, size = d.layers(), d.integer("sliding_window", 4096)
    period = d.integer("sliding_window_pattern", 4)
    if not period:
        raise ValueError(f"{d.where}: sliding_window_pattern must be >= 1, got 0")
    types = layer_types(
        d, layers, ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(layers)]
    )
    # Keys of the authors' code; files of transformers ignore them.
    d.only("layer_switch", period)
    for key, value in {
        "order_of_interleaved_layers": "local_attn_first", "position_embedding_type": "rope_gptj",
        "use_gated_activation": True, "use_parallel_block": True, "use_parallel_embedding": False,
        "use_qk_norm": False,
    }.items():  # fmt: skip
        d.only(key, value)
    d.only("rotary_pct", 1.0)
    d.only("use_embedding_sharing", d.flag("tie_word_embeddings", True))
    d.ignore("cache_implementation", "model_max_length")
    rope, bias = read_rope(d, head_dim(d), layout="interleaved"), d.flag("attention_bias", False)
    return _model(
        d,
        [
            attention(
                d,
                window(d, kind, size),
                rope=rope if kind == "sliding_attention" else None,
                use_bias=bias,
            )
            for kind in types
        ],
    )


FAMILIES = (
    Family("Cohere Command R", ("cohere",), _cohere, TABLE),
    Family("Cohere Command R7B and A", ("cohere2",), _cohere2, TABLE),
)
