"""Known models with experts: Mixtral, Qwen 2 and 3 MoE, OLMoE, Granite MoE."""

from __future__ import annotations

from typing import Any

from attention_jax.feed_forwards import RouterConfig
from attention_jax.masks import Causal, SlidingWindow
from attention_jax.model import BlockConfig, ModelConfig
from attention_jax.pretrained.description import Description
from attention_jax.pretrained.families import granite, llama, olmo
from attention_jax.pretrained.families.moe import NUMBERED, experts, experts_table, fused, swapped
from attention_jax.pretrained.family import Family
from attention_jax.pretrained.rope import read_rope
from attention_jax.pretrained.table import linear, transposed

MIXTRAL_TABLE = (
    *llama.OUTER,
    *llama.norms_table(norm1="input_layernorm", norm2="post_attention_layernorm"),
    *llama.attention_table(),
    *experts_table("model.layers.{i}.block_sparse_moe", NUMBERED),
)


def _mixtral(d: Description) -> ModelConfig:
    size = d.integer("sliding_window", None)
    mask = Causal() if size is None else SlidingWindow(size) & Causal()
    mixer = llama.attention(d, mask, rope=read_rope(d, llama.head_dim(d), theta=1e6))
    eps = float(d.number("rms_norm_eps", 1e-5))
    return llama.model(d, [BlockConfig(mixer, experts(d))] * d.layers(), norm_eps=eps)


_PRE_NORMS = llama.norms_table(norm1="input_layernorm", norm2="post_attention_layernorm")

QWEN_TABLE = (
    *llama.OUTER,
    *_PRE_NORMS,
    *llama.attention_table(),
    *llama.dense_table(),  # of layers without experts
    *experts_table(shared="shared_expert"),
    *linear("mlp/shared_gate", "model.layers.{i}.mlp.shared_expert_gate"),
)


def _with_experts(d: Description, layers: int) -> list[bool]:
    """Whether a layer of Qwen's has experts: every decoder_sparse_step-th, except for mlp_only_layers."""
    step, dense = d.integer("decoder_sparse_step", 1), d.items("mlp_only_layers", [])
    if step < 1:
        raise ValueError(f"{d.where}: decoder_sparse_step must be >= 1, got {step}")
    if not all(isinstance(i, int) and 0 <= i < layers for i in dense):
        raise ValueError(f"{d.where}: mlp_only_layers must hold layers from 0 to {layers - 1}, got {dense}")
    return [i not in dense and (i + 1) % step == 0 for i in range(layers)]


def _qwen(d: Description, types: list[str], size: int | None, options: dict[str, Any], **shared: Any):
    options = options | {"rope": read_rope(d, llama.head_dim(d))}
    router = RouterConfig(normalize=d.flag("norm_topk_prob", False))
    feed_forward = {
        True: experts(d, width="moe_intermediate_size", router=router, **shared),
        False: llama.gated(d, use_bias=False),
    }
    blocks = [
        BlockConfig(llama.attention(d, llama.window(d, kind, size), **options), feed_forward[sparse])
        for kind, sparse in zip(types, _with_experts(d, len(types)), strict=True)
    ]
    return llama.model(d, blocks)


def _qwen2_moe(d: Description) -> ModelConfig:
    layers, size = d.layers(), d.integer("sliding_window", 4096)
    first, windows = d.integer("max_window_layers", 28), d.flag("use_sliding_window", False)
    types = [
        "sliding_attention" if windows and i % 2 == 0 and i < first else "full_attention"
        for i in range(layers)
    ]
    options = {"use_bias": d.flag("qkv_bias", True), "out_bias": False}
    shared = {"shared_width": d.integer("shared_expert_intermediate_size"), "shared_gate": True}
    return _qwen(d, llama.layer_types(d, layers, types), size, options, **shared)


def _qwen3_moe(d: Description) -> ModelConfig:
    layers, size = d.layers(), d.integer("sliding_window", 4096)
    d.ignore("max_window_layers")  # a window is that of all layers
    kind = "sliding_attention" if d.flag("use_sliding_window", False) else "full_attention"
    return _qwen(d, llama.layer_types(d, layers, [kind] * layers), size, llama.qwen3_norm(d))


OLMOE_TABLE = (
    *llama.OUTER,
    *_PRE_NORMS,
    *olmo.QK_NORMS,
    *llama.attention_table(),
    *experts_table(),
)


def _olmoe(d: Description) -> ModelConfig:
    d.only("clip_qkv")  # it clips behind the norms
    eps = float(d.number("rms_norm_eps", 1e-5))
    mixer = llama.attention(
        d,
        Causal(),
        rope=read_rope(d, llama.head_dim(d)),
        qk_norm="rms_all_heads",
        qk_norm_eps=eps,
        use_bias=d.flag("attention_bias", False),
    )
    router = RouterConfig(normalize=d.flag("norm_topk_prob", False))
    return llama.model(d, [BlockConfig(mixer, experts(d, router=router))] * d.layers(), norm_eps=eps)


_GRANITE = "model.layers.{i}.block_sparse_moe"

GRANITE_TABLE = (
    *llama.OUTER,
    *_PRE_NORMS,
    *llama.attention_table(),
    transposed("mlp/router/kernel", f"{_GRANITE}.router.layer.weight"),
    fused(("mlp/gate", "mlp/up"), f"{_GRANITE}.input_linear.weight", transpose=True),
    swapped("mlp/down", f"{_GRANITE}.output_linear.weight"),
)

FAMILIES = (
    Family("Mixtral", ("mixtral",), _mixtral, MIXTRAL_TABLE),
    Family("Qwen 1.5 and 2 MoE", ("qwen2_moe",), _qwen2_moe, QWEN_TABLE),
    Family("Qwen 3 MoE", ("qwen3_moe",), _qwen3_moe, QWEN_TABLE),
    Family("OLMoE", ("olmoe",), _olmoe, OLMOE_TABLE),
    Family("Granite 3 MoE", ("granitemoe",), lambda d: granite.granite(d, experts(d)), GRANITE_TABLE),
)
