"""Phi, with parallel layers of one layer norm, and Phi-3, which is Llama with joined projections."""

from __future__ import annotations

from attention_jax.masks import Causal, SlidingWindow
from attention_jax.model import BlockConfig, ModelConfig
from attention_jax.pretrained.description import Description
from attention_jax.pretrained.families.gpt import dropouts, layer_normed, ungated
from attention_jax.pretrained.families.llama import OUTER, attention, gated, head_dim, model, norms_table
from attention_jax.pretrained.family import Family
from attention_jax.pretrained.rope import read_rope
from attention_jax.pretrained.table import Place, joined, linear, norm, same

_LAYER = "model.layers.{i}"

PHI_TABLE = (
    same("embed/embedding", "model.embed_tokens.weight"),
    *norm("final_norm", "model.final_layernorm"),
    *linear("head", "lm_head"),
    *norm("norm1", f"{_LAYER}.input_layernorm"),
    *linear("mixer/q", f"{_LAYER}.self_attn.q_proj"),
    *linear("mixer/k", f"{_LAYER}.self_attn.k_proj"),
    *linear("mixer/v", f"{_LAYER}.self_attn.v_proj"),
    *linear("mixer/out", f"{_LAYER}.self_attn.dense"),
    *norm("mixer/q_norm", f"{_LAYER}.self_attn.q_layernorm"),
    *norm("mixer/k_norm", f"{_LAYER}.self_attn.k_layernorm"),
    *linear("mlp/up", f"{_LAYER}.mlp.fc1"),
    *linear("mlp/down", f"{_LAYER}.mlp.fc2"),
)


def _phi(d: Description) -> ModelConfig:
    mixer = attention(
        d,
        Causal(),
        rope=read_rope(d, head_dim(d), factor=0.5),
        use_bias=True,
        qk_norm="layer" if d.flag("qk_layernorm", False) else None,
        qk_norm_eps=float(d.number("layer_norm_eps", 1e-5)),
    )
    mlp = ungated(d, d.integer("intermediate_size"), key="hidden_act", default="gelu_new")
    block = BlockConfig(mixer, mlp, parallel=True, shared_norm=True)
    return layer_normed(
        d,
        [block] * d.layers(),
        width=d.integer("hidden_size"),
        eps="layer_norm_eps",
        tie_embeddings=d.flag("tie_word_embeddings", False),
        head_bias=True,
        **dropouts(d, "resid_pdrop", "embd_pdrop"),
    )


def _qkv_widths(place: Place) -> list[int]:
    mixer = place.block.mixer
    return [
        heads * mixer.head_width(place.config.d_model) for heads in (mixer.num_heads, *[mixer.kv_heads] * 2)
    ]


def _halves(place: Place) -> list[int]:
    return [place.block.feed_forward.width] * 2


PHI3_TABLE = (
    *OUTER,
    *norms_table(norm1="input_layernorm", norm2="post_attention_layernorm"),
    *joined(("mixer/q", "mixer/k", "mixer/v"), f"{_LAYER}.self_attn.qkv_proj", _qkv_widths),
    *linear("mixer/out", f"{_LAYER}.self_attn.o_proj"),
    *joined(("mlp/gate", "mlp/up"), f"{_LAYER}.mlp.gate_up_proj", _halves),
    *linear("mlp/down", f"{_LAYER}.mlp.down_proj"),
)


def _phi3(d: Description) -> ModelConfig:
    size = d.integer("sliding_window", None)
    for key in ("attention_bias", "mlp_bias", "lm_head_bias"):
        d.only(key, False)
    for key in ("full_attn_mod", "interpolate_factor"):  # of Phi-4-mini, whose own code has other values, too
        d.only(key, 1)
    d.ignore("original_max_position_embeddings", "embd_pdrop")  # the embeddings have no dropout
    mask = Causal() if size is None else SlidingWindow(size) & Causal()
    mixer = attention(d, mask, rope=read_rope(d, head_dim(d)))
    return model(
        d,
        [BlockConfig(mixer, gated(d))] * d.layers(),
        norm_eps=float(d.number("rms_norm_eps", 1e-5)),
        **dropouts(d, "resid_pdrop"),
    )


FAMILIES = (
    Family("Phi 1, 1.5 and 2", ("phi",), _phi, PHI_TABLE),
    Family("Phi 3 and 4", ("phi3",), _phi3, PHI3_TABLE),
)
