"""BLOOM and Falcon, which began as a variant of it: the queries, keys and values of a head joined."""

from __future__ import annotations

import math

from attention_jax.biases import ALiBiConfig
from attention_jax.masks import Causal
from attention_jax.mixers import AttentionConfig
from attention_jax.model import BlockConfig, ModelConfig
from attention_jax.pretrained.description import Description
from attention_jax.pretrained.families.gpt import dropouts, layer_normed, ungated
from attention_jax.pretrained.family import Family
from attention_jax.pretrained.rope import read_rope
from attention_jax.pretrained.table import joined_by_group, linear, norm, same, transposed

_LAYER = "transformer.h.{i}"

_COMMON = (
    same("embed/embedding", "transformer.word_embeddings.weight"),
    *norm("final_norm", "transformer.ln_f"),
    transposed("head/kernel", "lm_head.weight"),
    *joined_by_group(f"{_LAYER}.self_attention.query_key_value"),
    *linear("mixer/out", f"{_LAYER}.self_attention.dense"),
    *linear("mlp/up", f"{_LAYER}.mlp.dense_h_to_4h"),
    *linear("mlp/down", f"{_LAYER}.mlp.dense_4h_to_h"),
)

BLOOM_TABLE = (
    *_COMMON,
    *norm("embed_norm", "transformer.word_embeddings_layernorm"),
    *norm("norm1", f"{_LAYER}.input_layernorm"),
    *norm("norm2", f"{_LAYER}.post_attention_layernorm"),
)


def _bloom(d: Description) -> ModelConfig:
    width = d.same_integer("hidden_size", "n_embed")
    # The last two are about the order of sums in training with several devices.
    d.ignore(
        "attention_softmax_in_fp32", "bias_dropout_fusion", "masked_softmax_fusion", "offset_alibi",
        "seq_length", "skip_bias_add", "skip_bias_add_qkv", "unk_token_id", "slow_but_exact",
    )  # fmt: skip
    d.only("n_inner", 4 * width)
    mixer = AttentionConfig(
        num_heads=d.same_integer("n_head", "num_attention_heads"),
        mask=Causal(),
        bias="alibi",
        use_bias=True,
        dropout=float(d.number("attention_dropout", 0.0)),
    )
    mlp = ungated(d, 4 * width, key="activation_function", default="gelu_new")
    after = d.flag("apply_residual_connection_post_layernorm", False)
    block = BlockConfig(mixer, mlp, norm_order="residual" if after else "pre")
    return layer_normed(
        d,
        [block] * d.same_integer("n_layer", "num_hidden_layers"),
        width=width,
        eps="layer_norm_epsilon",
        embedding_norm=True,
        tie_embeddings=d.flag("tie_word_embeddings", True),
        **dropouts(d, "hidden_dropout"),
    )


def _two_norms(block: BlockConfig) -> bool:
    """Whether it is a parallel layer with norms of its own for attention and feed-forward."""
    return block.parallel and not block.shared_norm


def _other_norms(block: BlockConfig) -> bool:
    return not _two_norms(block)


FALCON_TABLE = (
    *_COMMON,
    *norm("norm1", f"{_LAYER}.ln_attn", when=_two_norms),
    *norm("norm2", f"{_LAYER}.ln_mlp", when=_two_norms),
    *norm("norm1", f"{_LAYER}.input_layernorm", when=_other_norms),
    *norm("norm2", f"{_LAYER}.post_attention_layernorm", when=_other_norms),
)


def _falcon(d: Description) -> ModelConfig:
    width = d.same_integer("hidden_size", "n_embed")
    heads = d.same_integer("num_attention_heads", "n_head")
    head_dim, bias = width // heads, d.flag("bias", False)
    d.only("apply_residual_connection_post_layernorm", False)
    mlp_width = d.integer("ffn_hidden_size", None) or 4 * width
    d.only("ff_factor", mlp_width / width)
    positions = (
        # Their bias is a product of bfloat16 numbers, added before the scores are divided by sqrt(head_dim).
        {"bias": ALiBiConfig(scale=1 / math.sqrt(head_dim), rounding="bfloat16")}
        if d.flag("alibi", False)
        else {"rope": read_rope(d, head_dim)}
    )
    d.ignore("rope_theta", "rope_scaling", "rope_parameters")
    mixer = AttentionConfig(
        num_heads=heads,
        num_kv_heads=_falcon_kv_heads(d, heads),
        mask=Causal(),
        use_bias=bias,
        dropout=float(d.number("attention_dropout", 0.0)),
        **positions,
    )
    mlp = ungated(d, mlp_width, key="activation", default="gelu", use_bias=bias)
    block = BlockConfig(mixer, mlp, **_falcon_norms(d))
    return layer_normed(
        d,
        [block] * d.same_integer("num_hidden_layers", "n_layer"),
        width=width,
        eps="layer_norm_epsilon",
        tie_embeddings=d.flag("tie_word_embeddings", True),
        **dropouts(d, "hidden_dropout"),
    )


def _falcon_kv_heads(d: Description, heads: int) -> int:
    """The key-value heads: num_kv_heads counts in the new architecture only."""
    given, multi_query = d.integer("num_kv_heads", None), d.flag("multi_query", True)
    if d.flag("new_decoder_architecture", False):
        return given or heads
    if multi_query:
        return 1
    d.only("num_kv_heads", heads)
    return heads


def _falcon_norms(d: Description) -> dict[str, bool]:
    """Which norms a layer has: one or two in the new architecture, in the older one by parallel_attn."""
    norms = d.integer("num_ln_in_parallel_attn", None)
    if d.flag("new_decoder_architecture", False):
        d.only("parallel_attn", True)
        d.only("num_ln_in_parallel_attn", 1, 2)
        return {"parallel": True, "shared_norm": norms == 1}
    d.only("num_ln_in_parallel_attn", 1)
    parallel = d.flag("parallel_attn", True)
    return {"parallel": parallel, "shared_norm": parallel}


FAMILIES = (
    Family(
        "BLOOM",
        ("bloom",),
        _bloom,
        BLOOM_TABLE,
        older_names=((r"(?!transformer\.|lm_head\.)(.+)", r"transformer.\1"),),
    ),
    Family("Falcon", ("falcon",), _falcon, FALCON_TABLE),
)
