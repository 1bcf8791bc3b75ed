"""Gemma 1, 2 and 3: scaled embeddings, (1 + w) norms, tanh GELU; from 2 on norms on both sides and
windows."""

from __future__ import annotations

import math

from attention_jax.masks import Causal
from attention_jax.model import BlockConfig, ModelConfig
from attention_jax.pretrained.description import Description
from attention_jax.pretrained.families import llama
from attention_jax.pretrained.family import Family
from attention_jax.pretrained.rope import read_rope

TABLE = (
    *llama.OUTER,
    *llama.norms_table(norm1="input_layernorm", norm2="post_attention_layernorm"),
    *llama.attention_table(),
    *llama.dense_table(),
)
SANDWICH_TABLE = (
    *llama.OUTER,
    *llama.norms_table(
        norm1="input_layernorm",
        post_norm1="post_attention_layernorm",
        norm2="pre_feedforward_layernorm",
        post_norm2="post_feedforward_layernorm",
    ),
    *llama.attention_table(),
    *llama.dense_table(),
)


def _activation(d: Description) -> str:
    # The first files of Gemma 1 say hidden_act: gelu; the models were trained with the tanh approximation.
    d.ignore("hidden_act")
    name = d.word("hidden_activation", None) or d.word("hidden_act", "gelu_pytorch_tanh")
    return "gelu_tanh" if name == "gelu" else llama.ACTIVATIONS.get(name, name)


def _model(d: Description, blocks: list[BlockConfig], **options) -> ModelConfig:
    d.only("use_bidirectional_attention", False)
    return llama.model(
        d,
        blocks,
        norm_offset=1.0,
        embedding_scale=math.sqrt(d.integer("hidden_size")),
        tie_embeddings=d.flag("tie_word_embeddings", True),
        **options,
    )


def _gemma(d: Description) -> ModelConfig:
    bias = d.flag("attention_bias", False)
    mixer = llama.attention(d, Causal(), rope=read_rope(d, llama.head_dim(d)), use_bias=bias)
    feed_forward = llama.gated(d, activation=_activation(d))
    return _model(d, [BlockConfig(mixer, feed_forward)] * d.layers())


def _number(d: Description, key: str, default: float | None) -> float | None:
    """A number whose null turns it off, where an absent key means the default."""
    value = d.number(key, None)
    return float(value) if value is not None else None if key in d.values else default


def _sandwich(
    d: Description, *, period: int, softcap: float | None, final: float | None, norms: bool
) -> ModelConfig:
    """Gemma 2 and 3: of each `period` of layers the last attends to everything, the others have a window."""
    layers, size = d.layers(), d.integer("sliding_window", 4096)
    d.ignore("_sliding_window_pattern")
    period = d.integer("sliding_window_pattern", None) or period
    types = ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(layers)]
    options = {
        "scale": float(d.number("query_pre_attn_scalar", 256)) ** -0.5,
        "softcap": _number(d, "attn_logit_softcapping", softcap),
        "use_bias": d.flag("attention_bias", False),
    }
    if norms:
        eps = float(d.number("rms_norm_eps", 1e-6))
        options |= {"qk_norm": "rms", "qk_norm_eps": eps, "qk_norm_offset": 1.0}
    blocks = []
    for kind in llama.layer_types(d, layers, types):
        local = norms and kind == "sliding_attention"
        rope = read_rope(
            d,
            llama.head_dim(d),
            layer_type=kind,
            theta=1e6 if norms and not local else 1e4,
            theta_key="rope_local_base_freq" if local else "rope_theta",
            scaled=not local,
        )
        mixer = llama.attention(d, llama.window(d, kind, size), rope=rope, **options)
        blocks.append(BlockConfig(mixer, llama.gated(d, activation=_activation(d))))
    cap = _number(d, "final_logit_softcapping", final)
    return _model(d, blocks, norm_order="sandwich", logit_softcap=cap)


FAMILIES = (
    Family("Gemma", ("gemma",), _gemma, TABLE),
    Family(
        "Gemma 2",
        ("gemma2",),
        lambda d: _sandwich(d, period=2, softcap=50.0, final=30.0, norms=False),
        SANDWICH_TABLE,
    ),
    Family(
        "Gemma 3 (text)",
        ("gemma3_text",),
        lambda d: _sandwich(d, period=6, softcap=None, final=None, norms=True),
        SANDWICH_TABLE,
    ),
)
