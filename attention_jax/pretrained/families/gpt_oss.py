"""gpt-oss: sink logits, alternating windows, and experts of clamped units with biases."""

from __future__ import annotations

from attention_jax.feed_forwards import RouterConfig
from attention_jax.model import BlockConfig, ModelConfig
from attention_jax.pretrained.description import Description
from attention_jax.pretrained.families import llama
from attention_jax.pretrained.families.moe import experts, fused
from attention_jax.pretrained.family import Family
from attention_jax.pretrained.mxfp4 import unpacked
from attention_jax.pretrained.rope import read_rope
from attention_jax.pretrained.table import linear, same

_EXPERTS = "model.layers.{i}.mlp.experts"

TABLE = (
    *llama.OUTER,
    *llama.norms_table(norm1="input_layernorm", norm2="post_attention_layernorm"),
    *llama.attention_table(),
    same("mixer/sink_logits", "model.layers.{i}.self_attn.sinks"),
    *linear("mlp/router", "model.layers.{i}.mlp.router"),
    fused(("mlp/gate", "mlp/up"), f"{_EXPERTS}.gate_up_proj", interleaved=True),
    fused(("mlp/gate_bias", "mlp/up_bias"), f"{_EXPERTS}.gate_up_proj_bias", interleaved=True),
    same("mlp/down", f"{_EXPERTS}.down_proj"),
    same("mlp/down_bias", f"{_EXPERTS}.down_proj_bias"),
)


def _gpt_oss(d: Description) -> ModelConfig:
    layers, size = d.layers(), d.integer("sliding_window", 128)
    default = ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
    if d.mapping("rope_parameters", None) is None and d.mapping("rope_scaling", None) is None:
        raise ValueError(f"{d.where}: rope_scaling is missing")
    d.ignore("initial_context_length")  # the authors' name of a length that rope_scaling has
    d.only("hidden_act", "silu")
    d.only("experts_per_token", d.integer("num_experts_per_tok"))
    _check_quantization(d)
    feed_forward = experts(
        d,
        router=RouterConfig(use_bias=True),
        use_bias=True,
        limit=float(d.number("swiglu_limit", 7.0)),
        sharpness=float(d.number("swiglu_alpha", 1.702)),
        up_offset=1.0,
    )
    rope = read_rope(d, llama.head_dim(d), theta=150_000.0)
    bias = d.flag("attention_bias", True)
    blocks = [
        BlockConfig(
            llama.attention(d, llama.window(d, kind, size), rope=rope, sink_logits=True, use_bias=bias),
            feed_forward,
        )
        for kind in llama.layer_types(d, layers, default)
    ]
    return llama.model(d, blocks, norm_eps=float(d.number("rms_norm_eps", 1e-5)))


def _check_quantization(d: Description) -> None:
    """Accept MXFP4, which is unpacked exactly, and no other quantisation."""
    stored = d.mapping("quantization_config", None)
    if stored is not None:
        stored.only("quant_method", "mxfp4")
        stored.ignore("modules_to_not_convert", "dequantize")
        stored.finish()


FAMILIES = (Family("gpt-oss", ("gpt_oss",), _gpt_oss, TABLE, view=unpacked),)
