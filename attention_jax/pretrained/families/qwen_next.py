"""Qwen3-Next: three layers of Gated DeltaNet for each of gated attention, and experts with a shared one.

The layer that predicts further tokens, mtp in the files, is no part of the language model and is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attention_jax.feed_forwards import RouterConfig
from attention_jax.masks import Causal
from attention_jax.mixers import GatedAttentionConfig, GatedDeltaNetConfig
from attention_jax.model import BlockConfig, ModelConfig
from attention_jax.pretrained.description import Description
from attention_jax.pretrained.families.llama import (
    OUTER,
    attention_table,
    dense_table,
    gated,
    head_dim,
    layer_types,
    model,
    norms_table,
)
from attention_jax.pretrained.families.moe import experts, experts_table
from attention_jax.pretrained.family import Family
from attention_jax.pretrained.rope import read_rope
from attention_jax.pretrained.table import Place, convolution, joined_by_head, linear, norm, same


def _is_delta(block: BlockConfig) -> bool:
    return isinstance(block.mixer, GatedDeltaNetConfig)


def _is_attention(block: BlockConfig) -> bool:
    return not _is_delta(block)


def _delta_widths(place: Place) -> tuple[int, Sequence[int]]:
    mixer = place.block.mixer
    values = mixer.num_heads // mixer.num_qk_heads * mixer.value_dim
    return mixer.num_qk_heads, (mixer.head_dim, mixer.head_dim, values, values)


def _step_widths(place: Place) -> tuple[int, Sequence[int]]:
    mixer = place.block.mixer
    return mixer.num_qk_heads, (mixer.num_heads // mixer.num_qk_heads,) * 2


def _query_widths(place: Place) -> tuple[int, Sequence[int]]:
    return place.block.mixer.num_heads, (place.block.mixer.head_dim,) * 2


_DELTA, _MLP = "model.layers.{i}.linear_attn", "model.layers.{i}.mlp"
TABLE = (
    *OUTER,
    *norms_table(norm1="input_layernorm", norm2="post_attention_layernorm"),
    *joined_by_head(
        ("mixer/q", "mixer/k", "mixer/v", "mixer/gate"),
        f"{_DELTA}.in_proj_qkvz",
        _delta_widths,
        when=_is_delta,
    ),
    *joined_by_head(("mixer/beta", "mixer/decay"), f"{_DELTA}.in_proj_ba", _step_widths, when=_is_delta),
    *convolution("mixer/convolution", f"{_DELTA}.conv1d"),
    *(same(f"mixer/{name}", f"{_DELTA}.{name}") for name in ("A_log", "dt_bias")),
    *norm("mixer/norm", f"{_DELTA}.norm"),
    *linear("mixer/out", f"{_DELTA}.out_proj", when=_is_delta),
    *joined_by_head(
        ("mixer/q", "mixer/gate"), "model.layers.{i}.self_attn.q_proj", _query_widths, when=_is_attention
    ),
    *attention_table(when=_is_attention),
    *dense_table(),
    *experts_table(shared="shared_expert"),
    *linear("mlp/shared_gate", f"{_MLP}.shared_expert_gate"),
)


def _delta(d: Description) -> GatedDeltaNetConfig:
    return GatedDeltaNetConfig(
        num_heads=d.integer("linear_num_value_heads", 32),
        num_qk_heads=d.integer("linear_num_key_heads", 16),
        head_dim=d.integer("linear_key_head_dim", 128),
        value_dim=d.integer("linear_value_head_dim", 128),
        convolution=d.integer("linear_conv_kernel_dim", 4),
        norm_eps=float(d.number("rms_norm_eps", 1e-6)),
    )


def _attention(d: Description) -> GatedAttentionConfig:
    return GatedAttentionConfig(
        num_heads=d.integer("num_attention_heads"),
        num_kv_heads=d.integer("num_key_value_heads"),
        head_dim=head_dim(d),
        mask=Causal(),
        rope=read_rope(d, head_dim(d), factor=0.25),
        qk_norm="rms",
        qk_norm_offset=1.0,
        qk_norm_eps=float(d.number("rms_norm_eps", 1e-6)),
        use_bias=d.flag("attention_bias", False),
        dropout=float(d.number("attention_dropout", 0.0)),
    )


def _model(d: Description) -> ModelConfig:
    layers, interval = d.layers(), d.integer("full_attention_interval", 4)
    step, dense = d.integer("decoder_sparse_step", 1), d.items("mlp_only_layers", [])
    for key, value in {"full_attention_interval": interval, "decoder_sparse_step": step}.items():
        if not value:
            raise ValueError(f"{d.where}: {key} must be >= 1, got 0")
    d.only("hidden_act", "silu")
    d.ignore("output_router_logits", "router_aux_loss_coef")
    kinds = [("full" if (i + 1) % interval == 0 else "linear") + "_attention" for i in range(layers)]
    mixers: dict[str, Any] = {"linear_attention": _delta(d), "full_attention": _attention(d)}
    mlp, sparse = gated(d), None
    if d.integer("num_experts", 0):
        router = RouterConfig(normalize=d.flag("norm_topk_prob", True))
        keys = {"number": ("num_experts",), "chosen": "num_experts_per_tok", "width": "moe_intermediate_size"}
        shared = d.integer("shared_expert_intermediate_size")
        sparse = experts(d, router, **keys, shared_width=shared, shared_gate=True)
    blocks = []
    for i, kind in enumerate(layer_types(d, layers, kinds)):
        if kind not in mixers:
            raise ValueError(f"{d.where}: a layer of type {kind!r} is not supported here")
        is_sparse = sparse is not None and i not in dense and (i + 1) % step == 0
        blocks.append(BlockConfig(mixers[kind], sparse if is_sparse else mlp))
    return model(d, blocks, norm_offset=1.0)


FAMILIES = (
    Family("Qwen3-Next", ("qwen3_next",), _model, TABLE, unused=(r".*rotary_emb\.inv_freq", r"mtp\..*")),
)
