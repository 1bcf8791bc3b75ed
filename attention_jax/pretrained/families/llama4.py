"""Llama 4 (text): chunks with rotary embeddings, layers without them that read everything, and experts."""

from __future__ import annotations

from typing import Any

from attention_jax.feed_forwards import RouterConfig
from attention_jax.masks import Causal, Chunked, Mask
from attention_jax.mixers import AttentionConfig
from attention_jax.model import BlockConfig, ModelConfig
from attention_jax.positions import LinearScaling, Llama3, Temperature
from attention_jax.pretrained.description import Description
from attention_jax.pretrained.families import llama
from attention_jax.pretrained.families.moe import experts, fused
from attention_jax.pretrained.family import Family
from attention_jax.pretrained.rope import read_rope
from attention_jax.pretrained.table import linear, same, transposed

_FFN = "model.layers.{i}.feed_forward"

TABLE = (
    *llama.OUTER,
    *llama.norms_table(norm1="input_layernorm", norm2="post_attention_layernorm"),
    *llama.attention_table(),
    *llama.dense_table(_FFN),  # of layers without experts
    transposed("mlp/router/kernel", f"{_FFN}.router.weight"),
    fused(("mlp/gate", "mlp/up"), f"{_FFN}.experts.gate_up_proj"),
    same("mlp/down", f"{_FFN}.experts.down_proj"),
    *linear("mlp/shared/gate", f"{_FFN}.shared_expert.gate_proj"),
    *linear("mlp/shared/up", f"{_FFN}.shared_expert.up_proj"),
    *linear("mlp/shared/down", f"{_FFN}.shared_expert.down_proj"),
)


def _mask(d: Description, layer_type: str, size: int | None) -> Mask:
    if layer_type == "chunked_attention" and size is not None:
        return Chunked(size) & Causal()
    return llama.window(d, layer_type, None)


def _attentions(d: Description, layers: int) -> list[AttentionConfig]:
    """The attention of each layer: with rotary embeddings, or with a temperature by position."""
    interval = d.integer("no_rope_layer_interval", 4)
    if interval < 1:
        raise ValueError(f"{d.where}: no_rope_layer_interval must be >= 1, got {interval}")
    # The first files have an empty list.
    rotated = d.items("no_rope_layers", []) or [(i + 1) % interval != 0 for i in range(layers)]
    if len(rotated) != layers:
        raise ValueError(f"{d.where}: no_rope_layers has {len(rotated)} entries for {layers} layers")
    size = d.integer("attention_chunk_size", None)
    if size is None and "attention_chunk_size" not in d.values:
        size = 8192
    chunked = "full_attention" if size is None else "chunked_attention"
    types = llama.layer_types(d, layers, [chunked if rotates else "full_attention" for rotates in rotated])
    with_rope, without = _with_rope(d), _without_rope(d)
    bias = d.flag("attention_bias", False)
    return [
        llama.attention(d, _mask(d, kind, size), use_bias=bias, **with_rope if rotates else without)
        for kind, rotates in zip(types, rotated, strict=True)
    ]


def _with_rope(d: Description) -> dict[str, Any]:
    """The norm follows the rotation, which does not change it, as nothing here multiplies the rotated."""
    rope = read_rope(d, llama.head_dim(d), theta=5e5, layout="interleaved")
    if rope.width is not None or not isinstance(rope.scaling, LinearScaling | Llama3 | None):
        raise ValueError(
            f"{d.where}: rope_type must be default, linear or llama3, of whole heads, got {rope}"
        )
    if not d.flag("use_qk_norm", True):
        return {"rope": rope}
    return {"rope": rope, "qk_norm": "l2", "qk_norm_eps": float(d.number("rms_norm_eps", 1e-5))}


def _without_rope(d: Description) -> dict[str, Any]:
    temperature = Temperature(floor=d.integer("floor_scale", 8192), scale=float(d.number("attn_scale", 0.1)))
    # The first files have a 4 for true.
    tuned = d.one_of("attn_temperature_tuning", {True: True, False: False, 4: True}, True)
    return {"temperature": temperature if tuned else None}


def _llama4(d: Description) -> ModelConfig:
    layers, step = d.layers(), d.integer("interleave_moe_layer_step", 1)
    if step < 1:
        raise ValueError(f"{d.where}: interleave_moe_layer_step must be >= 1, got {step}")
    sparse = d.items("moe_layers", list(range(step - 1, layers, step)))
    if not all(isinstance(i, int) and 0 <= i < layers for i in sparse):
        raise ValueError(f"{d.where}: moe_layers must hold layers from 0 to {layers - 1}, got {sparse}")
    d.only("for_llm_compressor", False)
    mixture = experts(
        d,
        router=RouterConfig(scoring="sigmoid", normalize=False),
        weigh_input=True,
        shared_width=d.integer("intermediate_size"),
    )
    dense = llama.gated(d, width=d.integer("intermediate_size_mlp", 16384), use_bias=False)
    blocks = [
        BlockConfig(mixer, mixture if i in sparse else dense)
        for i, mixer in enumerate(_attentions(d, layers))
    ]
    return llama.model(d, blocks, norm_eps=float(d.number("rms_norm_eps", 1e-5)))


FAMILIES = (Family("Llama 4 (text)", ("llama4_text",), _llama4, TABLE),)
