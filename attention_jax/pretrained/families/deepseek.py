"""DeepSeek V2 and V3: latent attention, and experts behind a few dense layers.

The authors published V3 in float8 with scales of blocks (weight_scale_inv). Such files are refused: convert
them to bfloat16 first. The layer that predicts further tokens, which V3's files hold as model.layers.61, is
no part of the language model and is left out, as in transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attention_jax.feed_forwards import ExpertsConfig, RouterConfig
from attention_jax.mixers import LatentAttentionConfig
from attention_jax.model import BlockConfig, ModelConfig
from attention_jax.positions import RoPE
from attention_jax.pretrained.description import Description
from attention_jax.pretrained.families.llama import OUTER, dense_table, gated, model, norms_table
from attention_jax.pretrained.families.moe import experts, experts_table
from attention_jax.pretrained.family import Family
from attention_jax.pretrained.rope import read_rope
from attention_jax.pretrained.table import Entry, Place, joined, joined_by_head, linear, norm


def _has_query_latent(block: BlockConfig) -> bool:
    return getattr(block.mixer, "query_latent_dim", None) is not None


def _down_widths(place: Place) -> Sequence[int]:
    return place.block.mixer.latent_dim, place.block.mixer.rotary_dim


def _up_widths(place: Place) -> tuple[int, Sequence[int]]:
    mixer = place.block.mixer
    return mixer.num_heads, (mixer.head_dim, mixer.value_dim)


def latent_table(prefix: str = "model.layers.{i}.self_attn") -> list[Entry]:
    """The tensors of latent attention."""
    return [
        *linear("mixer/q_down", f"{prefix}.q_a_proj"),
        *norm("mixer/q_latent_norm", f"{prefix}.q_a_layernorm"),
        *linear("mixer/q", f"{prefix}.q_b_proj", when=_has_query_latent),
        *linear("mixer/q", f"{prefix}.q_proj", when=lambda block: not _has_query_latent(block)),
        *joined(("mixer/kv_down", "mixer/k_rotary"), f"{prefix}.kv_a_proj_with_mqa", _down_widths),
        *norm("mixer/kv_latent_norm", f"{prefix}.kv_a_layernorm"),
        *joined_by_head(("mixer/k_up", "mixer/v_up"), f"{prefix}.kv_b_proj", _up_widths),
        *linear("mixer/out", f"{prefix}.o_proj"),
    ]


TABLE = (
    *OUTER,
    *norms_table(norm1="input_layernorm", norm2="post_attention_layernorm"),
    *latent_table(),
    *dense_table(),
    *experts_table(shared="shared_experts"),
)


def latent_attention(d: Description, rope: RoPE | None) -> LatentAttentionConfig:
    """Latent attention with the sizes of a description."""
    heads, rotary = d.integer("num_attention_heads"), d.integer("qk_rope_head_dim", 64)
    content = d.integer("qk_nope_head_dim", 128)
    if not rotary:
        raise ValueError(f"{d.where}: qk_rope_head_dim must be >= 2, got 0")
    d.only("num_key_value_heads", heads)  # every head has keys and values of its own
    d.only("qk_head_dim", content + rotary)
    return LatentAttentionConfig(
        num_heads=heads,
        latent_dim=d.integer("kv_lora_rank", 512),
        query_latent_dim=d.integer("q_lora_rank", None),
        head_dim=content,
        rotary_dim=rotary,
        value_dim=d.integer("v_head_dim", 128),
        rope=rope,
        norm_eps=1e-6,  # whatever rms_norm_eps is
        use_bias=d.flag("attention_bias", False),
        dropout=float(d.number("attention_dropout", 0.0)),
    )


def read_latent_rope(d: Description, layout: str) -> RoPE:
    """The rotary embedding of the shared part of the keys."""
    width = d.integer("qk_rope_head_dim", 64)
    d.only("head_dim", width)
    for key in ("rope_parameters", "rope_scaling"):
        scaling = d.values.get(key)
        if isinstance(scaling, dict) and scaling.get("mscale_all_dim") and not scaling.get("mscale"):
            raise ValueError(f"{d.where}: {key}: mscale_all_dim is not supported without mscale")
    return read_rope(d, width, layout=layout)


def _deepseek(d: Description, rope: RoPE, router: RouterConfig, dense: int) -> ModelConfig:
    """dense: the layers before the first with experts, where the description does not say."""
    d.only("moe_layer_freq", 1)
    d.ignore("ep_size", "aux_loss_alpha", "seq_aux", "output_router_logits", "router_aux_loss_coef")
    layers, dense = d.layers(), d.integer("first_k_dense_replace", dense)
    mixer, mlp = latent_attention(d, rope), gated(d)
    sparse = _experts(d, router) if dense < layers else None
    return model(d, [BlockConfig(mixer, mlp if i < dense else sparse) for i in range(layers)])


def _experts(d: Description, router: RouterConfig) -> ExpertsConfig:
    shared = d.integer("n_shared_experts", None) or 0
    keys = {
        "number": ("n_routed_experts",),
        "chosen": "num_experts_per_tok",
        "width": "moe_intermediate_size",
    }
    return experts(d, router, **keys, shared_width=shared * d.integer("moe_intermediate_size") or None)


def _v2(d: Description) -> ModelConfig:
    d.only("scoring_func", "softmax")
    d.only("mlp_bias", False)
    d.only("norm_topk_prob", False)  # the authors' code would then not scale; transformers does not normalise
    groups: dict[str, Any] = {}
    d.ignore("n_group", "topk_group")
    if d.one_of("topk_method", {"greedy": False, "group_limited_greedy": True}, "greedy"):
        groups = {"num_groups": d.integer("n_group"), "groups_per_token": d.integer("topk_group")}
    router = RouterConfig(
        normalize=False, scale=float(d.number("routed_scaling_factor", 1.0)), group_score="max", **groups
    )
    return _deepseek(d, read_latent_rope(d, "interleaved"), router, dense=0)


def _v3(d: Description) -> ModelConfig:
    d.only("scoring_func", "sigmoid")
    d.only("topk_method", "noaux_tc")
    d.only("mlp_bias", False)
    d.ignore("num_nextn_predict_layers")
    router = RouterConfig(
        scoring="sigmoid",
        normalize=d.flag("norm_topk_prob", True),
        scale=float(d.number("routed_scaling_factor", 2.5)),
        correction_bias=True,
        num_groups=d.integer("n_group", 8),
        groups_per_token=d.integer("topk_group", 4),
        group_score="top2",
    )
    layout = "interleaved" if d.flag("rope_interleave", True) else "half"
    return _deepseek(d, read_latent_rope(d, layout), router, dense=3)


_FURTHER = (r".*rotary_emb\.inv_freq", r"model\.layers\.61\..*")
FAMILIES = (
    Family("DeepSeek V2", ("deepseek_v2",), _v2, TABLE),
    Family("DeepSeek V3", ("deepseek_v3",), _v3, TABLE, unused=_FURTHER),
)
