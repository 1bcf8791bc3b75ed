"""GPT-2, GPT-J and GPT-NeoX with Pythia: layer norms, and feed-forwards without a gate."""

from __future__ import annotations

import math
from typing import Any

from attention_jax.feed_forwards import DenseConfig
from attention_jax.masks import Causal
from attention_jax.mixers import AttentionConfig
from attention_jax.model import BlockConfig, ModelConfig
from attention_jax.positions import RoPE
from attention_jax.pretrained.description import Description
from attention_jax.pretrained.families.llama import ACTIVATIONS
from attention_jax.pretrained.family import Family, tiled
from attention_jax.pretrained.rope import read_rope
from attention_jax.pretrained.table import (
    Place,
    conv1d,
    joined,
    joined_by_group,
    linear,
    norm,
    same,
    transposed,
)

#: Keys of GPT-2 and its relatives about other tasks than language modelling, or without an effect.
_UNUSED_KEYS = (
    "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels",
    "summary_first_dropout", "n_ctx", "n_positions", "gradient_checkpointing", "reorder_and_upcast_attn",
    "tokenizer_name", "n_special", "predict_special_tokens", "output_past", "_num_labels",
)  # fmt: skip


def layer_normed(
    d: Description, blocks: list[BlockConfig], *, width: int, eps: str, **options: Any
) -> ModelConfig:
    """A model of these layers with layer norms. eps: the key of their epsilon. width: that of the model."""
    return ModelConfig(
        **{
            "vocab_size": d.integer("vocab_size"),
            "d_model": width,
            "num_layers": len(blocks),
            "blocks": tiled(blocks),
            "norm": "layernorm",
            "norm_bias": True,
            "norm_eps": float(d.number(eps, 1e-5)),
        }
        | options
    )


def dropouts(d: Description, branches: str, embedding: str | None = None) -> dict[str, float]:
    """The dropout rates of a model. branches, embedding: their keys; embedding None: that of no dropout."""
    rates = {"dropout": float(d.number(branches, 0.0)), "embedding_dropout": 0.0}
    if embedding is not None:
        rates["embedding_dropout"] = float(d.number(embedding, 0.0))
    return rates


def ungated(d: Description, width: int, *, key: str, default: str, use_bias: bool = True) -> DenseConfig:
    """A feed-forward without a gate. key: that of its activation, which is `default` where it is absent."""
    activation = d.one_of(key, ACTIVATIONS, default)
    return DenseConfig(activation=activation, gated=False, width=width, use_bias=use_bias)


_GPT2_PREFIX = (r"(?!transformer\.|lm_head\.)(.+)", r"transformer.\1")


def thirds(place: Place) -> list[int]:
    """The widths of q, k and v, each as wide as the model."""
    return [place.config.d_model] * 3


GPT2_TABLE = (
    same("embed/embedding", "transformer.wte.weight"),
    same("positions/embedding", "transformer.wpe.weight"),
    *norm("final_norm", "transformer.ln_f"),
    transposed("head/kernel", "lm_head.weight"),
    *norm("norm1", "transformer.h.{i}.ln_1"),
    *norm("norm2", "transformer.h.{i}.ln_2"),
    *joined(("mixer/q", "mixer/k", "mixer/v"), "transformer.h.{i}.attn.c_attn", thirds, axis=1),
    *conv1d("mixer/out", "transformer.h.{i}.attn.c_proj"),
    *conv1d("mlp/up", "transformer.h.{i}.mlp.c_fc"),
    *conv1d("mlp/down", "transformer.h.{i}.mlp.c_proj"),
)


def _gpt2(d: Description) -> ModelConfig:
    width, heads, layers = d.integer("n_embd"), d.integer("n_head"), d.layers("n_layer")
    scale = 1 / math.sqrt(width // heads) if d.flag("scale_attn_weights", True) else 1.0
    by_layer = d.flag("scale_attn_by_inverse_layer_idx", False)
    mlp = ungated(d, d.integer("n_inner", None) or 4 * width, key="activation_function", default="gelu_new")
    blocks = [
        BlockConfig(
            AttentionConfig(
                num_heads=heads,
                mask=Causal(),
                use_bias=True,
                scale=scale / (i + 1) if by_layer else scale,
                dropout=float(d.number("attn_pdrop", 0.0)),
            ),
            mlp,
        )
        for i in range(layers)
    ]
    positions = d.integer("n_positions", 1024)
    d.ignore(*_UNUSED_KEYS)
    return layer_normed(
        d,
        blocks,
        width=width,
        eps="layer_norm_epsilon",
        max_positions=positions,
        tie_embeddings=d.flag("tie_word_embeddings", True),
        **dropouts(d, "resid_pdrop", "embd_pdrop"),
    )


GPTJ_TABLE = (
    same("embed/embedding", "transformer.wte.weight"),
    *norm("final_norm", "transformer.ln_f"),
    *linear("head", "lm_head"),
    *norm("norm1", "transformer.h.{i}.ln_1"),
    *linear("mixer/q", "transformer.h.{i}.attn.q_proj"),
    *linear("mixer/k", "transformer.h.{i}.attn.k_proj"),
    *linear("mixer/v", "transformer.h.{i}.attn.v_proj"),
    *linear("mixer/out", "transformer.h.{i}.attn.out_proj"),
    *linear("mlp/up", "transformer.h.{i}.mlp.fc_in"),
    *linear("mlp/down", "transformer.h.{i}.mlp.fc_out"),
)


def _gptj(d: Description) -> ModelConfig:
    width = d.integer("n_embd")
    d.only("rotary", True)
    d.only("scale_attn_weights", True)
    d.ignore(*_UNUSED_KEYS)
    mixer = AttentionConfig(
        num_heads=d.integer("n_head"),
        mask=Causal(),
        rope=RoPE(width=d.integer("rotary_dim", 64), layout="interleaved"),
        dropout=float(d.number("attn_pdrop", 0.0)),
    )
    mlp = ungated(d, d.integer("n_inner", None) or 4 * width, key="activation_function", default="gelu_new")
    blocks = [BlockConfig(mixer, mlp, parallel=True, shared_norm=True)] * d.layers("n_layer")
    return layer_normed(
        d,
        blocks,
        width=width,
        eps="layer_norm_epsilon",
        tie_embeddings=d.flag("tie_word_embeddings", False),
        head_bias=True,
        **dropouts(d, "resid_pdrop", "embd_pdrop"),
    )


_NEOX = "gpt_neox.layers.{i}"

NEOX_TABLE = (
    same("embed/embedding", "gpt_neox.embed_in.weight"),
    *norm("final_norm", "gpt_neox.final_layer_norm"),
    transposed("head/kernel", "embed_out.weight"),
    *norm("norm1", f"{_NEOX}.input_layernorm"),
    *norm("norm2", f"{_NEOX}.post_attention_layernorm"),
    *joined_by_group(f"{_NEOX}.attention.query_key_value"),
    *linear("mixer/out", f"{_NEOX}.attention.dense"),
    *linear("mlp/up", f"{_NEOX}.mlp.dense_h_to_4h"),
    *linear("mlp/down", f"{_NEOX}.mlp.dense_4h_to_h"),
)


def _neox(d: Description) -> ModelConfig:
    width, heads = d.integer("hidden_size"), d.integer("num_attention_heads")
    # The hub's names; files of some versions hold both these and the usual ones.
    theta, share = d.number("rotary_emb_base", None), d.number("rotary_pct", None)
    if theta is not None:
        d.only("rope_theta", theta)
    if share is not None:
        d.only("partial_rotary_factor", share)
    for key in ("attention_probs_dropout_prob", "hidden_dropout_prob"):
        d.only(key, 0)
    d.ignore("classifier_dropout")
    rope = read_rope(
        d, width // heads, theta=10_000.0 if theta is None else theta, factor=0.25 if share is None else share
    )
    mixer = AttentionConfig(
        num_heads=heads,
        mask=Causal(),
        rope=rope,
        use_bias=d.flag("attention_bias", True),
        dropout=float(d.number("attention_dropout", 0.0)),
    )
    mlp = ungated(d, d.integer("intermediate_size"), key="hidden_act", default="gelu")
    block = BlockConfig(mixer, mlp, parallel=d.flag("use_parallel_residual", True))
    return layer_normed(
        d,
        [block] * d.layers(),
        width=width,
        eps="layer_norm_eps",
        tie_embeddings=d.flag("tie_word_embeddings", False),
        dropout=float(d.number("hidden_dropout", 0.0)),
    )


#: Masks and angles that files of older versions hold.
_BUFFERS = (
    r".*\.(attn|attention)\.(bias|masked_bias)",
    r".*rotary_emb\.inv_freq",
    r".*\.attn\.embed_positions",
)

FAMILIES = (
    Family("GPT-2", ("gpt2",), _gpt2, GPT2_TABLE, unused=_BUFFERS, older_names=(_GPT2_PREFIX,)),
    Family("GPT-J", ("gptj",), _gptj, GPTJ_TABLE, unused=_BUFFERS),
    Family(
        "GPT-NeoX and Pythia",
        ("gpt_neox",),
        _neox,
        NEOX_TABLE,
        head="embed_out.weight",
        unused=_BUFFERS,
        older_names=((r"lm_head\.weight", "embed_out.weight"),),
    ),
)
