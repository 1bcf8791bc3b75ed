"""MPT: ALiBi, and no biases, not even in its layer norms."""

from __future__ import annotations

from attention_jax.biases import ALiBiConfig
from attention_jax.feed_forwards import DenseConfig
from attention_jax.masks import Causal
from attention_jax.mixers import AttentionConfig
from attention_jax.model import BlockConfig, ModelConfig
from attention_jax.pretrained.description import Description
from attention_jax.pretrained.families.gpt import layer_normed, thirds
from attention_jax.pretrained.family import Family
from attention_jax.pretrained.table import joined, linear, norm, same, transposed

_LAYER = "transformer.blocks.{i}"

TABLE = (
    same("embed/embedding", "transformer.wte.weight"),
    *norm("final_norm", "transformer.norm_f"),
    transposed("head/kernel", "lm_head.weight"),
    *norm("norm1", f"{_LAYER}.norm_1"),
    *norm("norm2", f"{_LAYER}.norm_2"),
    *joined(("mixer/q", "mixer/k", "mixer/v"), f"{_LAYER}.attn.Wqkv", thirds),
    *linear("mixer/out", f"{_LAYER}.attn.out_proj"),
    *linear("mlp/up", f"{_LAYER}.ffn.up_proj"),
    *linear("mlp/down", f"{_LAYER}.ffn.down_proj"),
)


def _mixer(d: Description, heads: int) -> AttentionConfig:
    """The attention that the nested attn_config describes."""
    a = d.mapping("attn_config", None) or Description({}, f"{d.where}: attn_config")
    # The authors' code implements all of these. transformers ignores those that are refused here, and
    # alibi_bias_max, which is 16 in MPT-7B-StoryWriter.
    largest = a.number("alibi_bias_max", 8)
    a.only("alibi", True)
    a.only("qk_ln", False)
    a.only("prefix_lm", False)
    a.only("attn_uses_sequence_id", False)
    a.only("attn_type", "multihead_attention")
    a.ignore("attn_impl")
    clip, scale = a.number("clip_qkv", None), a.number("softmax_scale", None)
    dropout = float(a.number("attn_pdrop", 0.0))
    a.finish()
    return AttentionConfig(
        num_heads=heads,
        mask=Causal(),
        bias=ALiBiConfig(max_exponent=float(largest)),
        clip_qkv=None if not clip else float(clip),
        scale=None if scale is None else float(scale),
        dropout=dropout,
    )


def _mpt(d: Description) -> ModelConfig:
    width = d.integer("d_model")
    d.only("no_bias", True)
    d.only("logit_scale")
    d.only("embedding_fraction", 1.0)
    d.only("norm_type", "low_precision_layernorm", "layernorm")
    # With ALiBi there are no learned positions, whatever learned_pos_emb says.
    d.ignore("learned_pos_emb", "max_seq_len", "init_device", "init_config", "tokenizer_name", "verbose")
    mlp = DenseConfig(
        activation="gelu", gated=False, width=d.integer("expansion_ratio", 4) * width, use_bias=False
    )
    block = BlockConfig(_mixer(d, d.integer("n_heads")), mlp)
    return layer_normed(
        d,
        [block] * d.layers("n_layers"),
        width=width,
        eps="layer_norm_epsilon",
        norm_bias=False,
        tie_embeddings=d.flag("tie_word_embeddings", True),
        dropout=float(d.number("resid_pdrop", 0.0)),
        embedding_dropout=float(d.number("emb_pdrop", 0.0)),
    )


FAMILIES = (Family("MPT", ("mpt",), _mpt, TABLE),)
