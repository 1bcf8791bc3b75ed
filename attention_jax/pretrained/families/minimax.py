"""MiniMax-01: lightning attention with softmax attention in between, and experts everywhere.

The slopes of the decays, which files hold too, are those that the description's sizes imply.
"""

from __future__ import annotations

from collections.abc import Sequence

from attention_jax.masks import Causal, SlidingWindow
from attention_jax.mixers import LightningConfig
from attention_jax.model import BlockConfig, ModelConfig
from attention_jax.pretrained.description import Description
from attention_jax.pretrained.families.llama import (
    OUTER,
    attention,
    attention_table,
    head_dim,
    layer_types,
    model,
    norms_table,
)
from attention_jax.pretrained.families.moe import NUMBERED, experts, experts_table
from attention_jax.pretrained.family import Family
from attention_jax.pretrained.rope import read_rope
from attention_jax.pretrained.table import Place, joined_by_head, linear, norm


def _qkv_widths(place: Place) -> tuple[int, Sequence[int]]:
    return place.block.mixer.num_heads, (place.block.mixer.head_dim,) * 3


def _is_lightning(block: BlockConfig) -> bool:
    return isinstance(block.mixer, LightningConfig)


_MIXER = "model.layers.{i}.self_attn"
TABLE = (
    *OUTER,
    *norms_table(norm1="input_layernorm", norm2="post_attention_layernorm"),
    *joined_by_head(("mixer/q", "mixer/k", "mixer/v"), f"{_MIXER}.qkv_proj", _qkv_widths, when=_is_lightning),
    *linear("mixer/gate", f"{_MIXER}.output_gate", when=_is_lightning),
    *norm("mixer/norm", f"{_MIXER}.norm", when=_is_lightning),
    *linear("mixer/out", f"{_MIXER}.out_proj", when=_is_lightning),
    *attention_table(),
    *experts_table("model.layers.{i}.block_sparse_moe", NUMBERED),
)


def _lightning(d: Description, layer: int, layers: int) -> LightningConfig:
    heads = d.integer("num_attention_heads")
    if heads & (heads - 1):
        raise ValueError(f"{d.where}: num_attention_heads {heads} is not supported, only powers of two")
    return LightningConfig(
        num_heads=heads,
        head_dim=head_dim(d),
        slope_factor=1 - layer / (layers - 1 + 1e-5) + 1e-5,
        norm_eps=1e-6,  # whatever rms_norm_eps is
    )


def _model(d: Description) -> ModelConfig:
    layers, size = d.layers(), d.integer("sliding_window", None)
    d.ignore("block_size", "output_router_logits", "router_aux_loss_coef", "router_jitter_noise")
    d.only("hidden_act", "silu")
    # The authors rotate this width of a head, transformers the whole head.
    d.only("rotary_dim", head_dim(d))
    rope = read_rope(d, head_dim(d), theta=1e6)
    if rope.width is not None:
        raise ValueError(f"{d.where}: partial_rotary_factor is not supported for model_type minimax")
    mask = Causal() if size is None else SlidingWindow(size) & Causal()
    softmax = attention(d, mask, rope=rope)
    mlp = experts(d)
    types = layer_types(d, layers, [("full", "linear")[i % 2] + "_attention" for i in range(layers)])
    names = {"linear_attention": "linear_attn", "full_attention": "full_attn"}
    blocks = []
    for i, kind in enumerate(types):
        if kind not in names:
            raise ValueError(f"{d.where}: a layer of type {kind!r} is not supported here")
        blocks.append(
            BlockConfig(
                _lightning(d, i, layers) if kind == "linear_attention" else softmax,
                mlp,
                norm_order="residual",
                **_factors(d, names[kind], "mixer"),
                **_factors(d, "mlp", "feed_forward"),
            )
        )
    for name in names.values():  # of a kind of layer that there is not
        d.ignore(f"{name}_alpha_factor", f"{name}_beta_factor")
    return model(d, blocks, norm_eps=float(d.number("rms_norm_eps", 1e-5)))


def _factors(d: Description, theirs: str, ours: str) -> dict[str, float]:
    """What a residual and a branch are multiplied by."""
    return {
        f"{ours}_residual_scale": float(d.number(f"{theirs}_alpha_factor", 1.0)),
        f"{ours}_scale": float(d.number(f"{theirs}_beta_factor", 1.0)),
    }


_DECAYS = r".*\.self_attn\.(slope_rate|query_decay|key_decay|diagonal_decay)"
FAMILIES = (Family("MiniMax-01", ("minimax",), _model, TABLE, unused=(r".*rotary_emb\.inv_freq", _DECAYS)),)
