"""Llama and the models that changed little of it: Mistral, Ministral, Qwen 2 and 3, SmolLM3."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attention_jax.feed_forwards import DenseConfig
from attention_jax.masks import Causal, Mask, SlidingWindow
from attention_jax.mixers import AttentionConfig
from attention_jax.model import BlockConfig, ModelConfig
from attention_jax.positions import RoPE, Temperature
from attention_jax.pretrained.description import Description
from attention_jax.pretrained.family import Family, tiled
from attention_jax.pretrained.rope import read_rope
from attention_jax.pretrained.table import Entry, linear, norm, same, transposed

#: The activations of feed-forwards by their names in config.json.
ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "relu2": "relu2",
}  # fmt: skip


def attention_table(prefix: str = "model.layers.{i}.self_attn", **options: Any) -> list[Entry]:
    """The tensors of softmax attention under Llama's names."""
    return [
        *linear("mixer/q", f"{prefix}.q_proj", **options),
        *linear("mixer/k", f"{prefix}.k_proj", **options),
        *linear("mixer/v", f"{prefix}.v_proj", **options),
        *linear("mixer/out", f"{prefix}.o_proj", **options),
        *norm("mixer/q_norm", f"{prefix}.q_norm", **options),
        *norm("mixer/k_norm", f"{prefix}.k_norm", **options),
    ]


def dense_table(prefix: str = "model.layers.{i}.mlp", **options: Any) -> list[Entry]:
    """The tensors of a gated feed-forward under Llama's names."""
    return [
        *linear("mlp/gate", f"{prefix}.gate_proj", **options),
        *linear("mlp/up", f"{prefix}.up_proj", **options),
        *linear("mlp/down", f"{prefix}.down_proj", **options),
    ]


def norms_table(**names: str) -> list[Entry]:
    """The tensors of a layer's norms, by our names."""
    return [entry for ours, theirs in names.items() for entry in norm(ours, f"model.layers.{{i}}.{theirs}")]


#: What lies outside of the layers.
OUTER = (
    same("embed/embedding", "model.embed_tokens.weight"),
    *norm("final_norm", "model.norm"),
    transposed("head/kernel", "lm_head.weight"),
)

TABLE = (
    *OUTER,
    *norms_table(norm1="input_layernorm", norm2="post_attention_layernorm"),
    *attention_table(),
    *dense_table(),
)


def layer_types(d: Description, layers: int, default: list[str] | None = None) -> list[str]:
    """The type of each layer; `default`, or full_attention everywhere, where the description has no list."""
    types = d.items("layer_types", default or ["full_attention"] * layers)
    if len(types) != layers:
        raise ValueError(f"{d.where}: layer_types has {len(types)} entries for {layers} layers")
    return types


def window(d: Description, layer_type: str, size: int | None) -> Mask:
    """The mask of a layer of this type; a window of `size` tokens includes the token itself."""
    match layer_type:
        case "full_attention":
            return Causal()
        case "sliding_attention" if size is not None:
            return SlidingWindow(size) & Causal()
    raise ValueError(f"{d.where}: a layer of type {layer_type!r} is not supported here")


def head_dim(d: Description) -> int:
    """The width of a head: head_dim, or hidden_size / num_attention_heads."""
    return d.integer("head_dim", None) or d.integer("hidden_size") // d.integer("num_attention_heads")


def attention(d: Description, mask: Mask, **options: Any) -> AttentionConfig:
    """Softmax attention with the sizes of a description."""
    heads = d.integer("num_attention_heads")
    return AttentionConfig(
        **{
            "num_heads": heads,
            "num_kv_heads": d.integer("num_key_value_heads", None) or heads,
            "head_dim": head_dim(d),
            "mask": mask,
            "dropout": float(d.number("attention_dropout", 0.0)),
        }
        | options
    )


def gated(d: Description, **options: Any) -> DenseConfig:
    """The dense feed-forward of a description."""
    return DenseConfig(
        **{
            "activation": d.one_of("hidden_act", ACTIVATIONS, "silu"),
            "width": d.integer("intermediate_size"),
            "use_bias": d.flag("mlp_bias", False),
        }
        | options
    )


def model(d: Description, blocks: list[BlockConfig], **options: Any) -> ModelConfig:
    """A model of these layers with the sizes of a description."""
    return ModelConfig(
        **{
            "vocab_size": d.integer("vocab_size"),
            "d_model": d.integer("hidden_size"),
            "num_layers": len(blocks),
            "blocks": tiled(blocks),
            "norm_eps": float(d.number("rms_norm_eps", 1e-6)),
            "tie_embeddings": d.flag("tie_word_embeddings", False),
        }
        | options
    )


def _llama(d: Description) -> ModelConfig:
    bias = d.flag("attention_bias", False)
    mixer = attention(d, Causal(), rope=read_rope(d, head_dim(d)), use_bias=bias)
    return model(d, [BlockConfig(mixer, gated(d))] * d.layers())


def _mistral(d: Description, rope: RoPE | None = None, eps: float = 1e-6, **options: Any) -> ModelConfig:
    size, layers = d.integer("sliding_window", None), d.layers()
    types = layer_types(d, layers, None if size is None else ["sliding_attention"] * layers)
    options |= {"rope": rope or read_rope(d, head_dim(d))}
    d.only("mlp_bias", False)
    blocks = [BlockConfig(attention(d, window(d, kind, size), **options), gated(d)) for kind in types]
    return model(d, blocks, norm_eps=float(d.number("rms_norm_eps", eps)))


def _ministral3(d: Description) -> ModelConfig:
    """Mistral whose queries grow with their position, by keys of the rotary embedding."""
    beta = "llama_4_scaling_beta"
    scaling = d.mapping("rope_parameters", None) or d.mapping("rope_scaling")
    temperature = Temperature(
        floor=scaling.integer("original_max_position_embeddings"),
        scale=float(scaling.number(beta)),
        offset=0,
    )
    rope = read_rope(d, head_dim(d), theta=1e6, others=(beta,))
    return _mistral(d, rope, 1e-5, temperature=temperature)


def _qwen(d: Description, attention_options: Callable[[Description], dict[str, Any]]) -> ModelConfig:
    layers, size = d.layers(), d.integer("sliding_window", None)
    d.ignore("max_window_layers")
    default = None
    if d.flag("use_sliding_window", False) and size is not None:
        first = d.integer("max_window_layers", 28)
        default = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    types = layer_types(d, layers, default)
    options = attention_options(d) | {"rope": read_rope(d, head_dim(d))}
    return model(d, [BlockConfig(attention(d, window(d, kind, size), **options), gated(d)) for kind in types])


def qwen3_norm(d: Description) -> dict[str, Any]:
    """The options of Qwen 3's attention: an RMS norm of each query and key."""
    return {
        "qk_norm": "rms",
        "qk_norm_eps": float(d.number("rms_norm_eps", 1e-6)),
        "use_bias": d.flag("attention_bias", False),
    }


def _smollm3(d: Description) -> ModelConfig:
    layers, bias = d.layers(), d.flag("attention_bias", False)
    interval = d.integer("no_rope_layer_interval", 4)
    rotated = d.items("no_rope_layers", [int((i + 1) % interval != 0) for i in range(layers)])
    if len(rotated) != layers:
        raise ValueError(f"{d.where}: no_rope_layers has {len(rotated)} entries for {layers} layers")
    d.only("use_sliding_window", False)
    size, rope = d.integer("sliding_window", None), read_rope(d, head_dim(d), theta=2e6)
    types = layer_types(d, layers)
    blocks = [
        BlockConfig(
            attention(d, window(d, kind, size), use_bias=bias, rope=rope if rotates else None), gated(d)
        )
        for kind, rotates in zip(types, rotated, strict=True)
    ]
    return model(d, blocks)


FAMILIES = (
    Family("Llama 2, 3 and 3.1", ("llama",), _llama, TABLE),
    Family("Mistral", ("mistral",), _mistral, TABLE),
    Family("Ministral", ("ministral",), _mistral, TABLE),
    Family("Ministral 3 (text)", ("ministral3",), _ministral3, TABLE),
    Family("Qwen 2", ("qwen2",), lambda d: _qwen(d, lambda d: {"use_bias": True, "out_bias": False}), TABLE),
    Family("Qwen 3", ("qwen3",), lambda d: _qwen(d, qwen3_norm), TABLE),
    Family("SmolLM3", ("smollm3",), _smollm3, TABLE),
)
