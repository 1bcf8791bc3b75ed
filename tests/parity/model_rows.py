"""Tiny random models of published families: the options of transformers' configuration of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
GPT = {
    "vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
#: As on the hub, where files name parts that no longer exist.
OLD_GPT = {
    "n_ctx": 64, "gradient_checkpointing": False, "summary_type": "cls_index", "n_inner": None,
    "tie_word_embeddings": None, "dtype": None,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
    """A configuration of transformers. options: its arguments. old: keys of the hub's older spelling.

    old replaces keys of the saved config.json: a null removes one. first_hidden: where in
    transformers' hidden_states the output of the first layer is. old_names: from a tensor's name to that on
    the hub. buffers: further tensors of a layer's module there, which are no parameters. attention: the
    implementation of transformers.
    """

    model_type: str
    options: dict[str, Any]
    old: dict[str, Any] | None = None
    first_hidden: int = 1
    old_names: Callable[[str], str] = lambda name: name
    buffers: tuple[str, ...] = ()
    attention: str = "eager"


def _embed_out(name: str) -> str:
    """GPT-NeoX's output projection, whose name in files is not that in transformers."""
    return "embed_out.weight" if name == "lm_head.weight" else name


def _old(**keys: Any) -> dict[str, Any]:
    """The older spelling: without rope_parameters, dtype and layer_types."""
    return {"rope_parameters": None, "dtype": None, "torch_dtype": "float32"} | keys


NEOX = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
NEOX_OLD = {"dtype": None, "rope_parameters": None, "rotary_emb_base": 10000, "attention_bias": None}

BLOOM = {
    "vocab_size": 61, "hidden_size": 32, "n_layer": 2, "n_head": 4,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
BLOOM_OLD = {
    "hidden_size": None, "n_embed": 32, "n_head": None, "num_attention_heads": 4, "n_inner": None,
    "attention_softmax_in_fp32": True, "masked_softmax_fusion": True, "bias_dropout_fusion": True,
    "offset_alibi": 100, "seq_length": 64, "skip_bias_add": True, "skip_bias_add_qkv": False,
    "unk_token_id": 0, "tie_word_embeddings": None, "dtype": None,
}  # fmt: skip
FALCON = {key: value for key, value in NEOX.items() if key != "intermediate_size"}
FALCON_OLD = {
    "dtype": None, "rope_parameters": None, "activation": None, "tie_word_embeddings": None,
    "max_position_embeddings": None,
}  # fmt: skip
MPT = {
    "vocab_size": 61, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MPT_OLD = {
    "dtype": None, "tie_word_embeddings": None, "layer_norm_epsilon": None, "verbose": 0, "logit_scale": None,
    "tokenizer_name": "EleutherAI/gpt-neox-20b", "init_config": {"name": "kaiming_normal_"},
    "attn_config": {
        "alibi": True, "alibi_bias_max": 8, "attn_impl": "torch", "attn_pdrop": 0, "clip_qkv": None,
        "attn_type": "multihead_attention", "attn_uses_sequence_id": False, "prefix_lm": False,
        "qk_ln": False, "softmax_scale": None,
    },
}  # fmt: skip
FACTORS = {"short_factor": [1.0, 1.3, 2.0], "long_factor": [1.0, 3.0, 5.0]}
LONGROPE = FACTORS | {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75}

ROWS: dict[str, Row] = {
    "llama": Row("llama", SIZES, _old(rope_theta=10000.0)),
    "llama3": Row(
        "llama",
        SIZES | {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True}
        | {"tie_word_embeddings": True},
        _old(rope_theta=5e5, rope_scaling={k: v for k, v in LLAMA3.items() if k != "rope_theta"}),
    ),
    "mistral": Row("mistral", SIZES | {"sliding_window": 5, "head_dim": 12}, _old(rope_theta=10000.0)),
    "qwen2": Row(
        "qwen2",
        SIZES | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
        _old(rope_theta=10000.0, layer_types=None),
    ),
    "qwen3": Row("qwen3", SIZES | {"head_dim": 12}, _old(rope_theta=10000.0, layer_types=None)),
    "smollm3": Row(
        "smollm3", SIZES | {"no_rope_layer_interval": 2}, _old(rope_theta=2000000.0, layer_types=None)
    ),
    "gemma": Row(
        "gemma", SIZES | {"head_dim": 12, "num_key_value_heads": 1},
        _old(rope_theta=10000.0, hidden_act="gelu", hidden_activation="gelu_pytorch_tanh"),
    ),
    "gemma2": Row(
        "gemma2",
        SIZES | {"head_dim": 12, "sliding_window": 5, "query_pre_attn_scalar": 20,
                 "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
        _old(rope_theta=10000.0, layer_types=None),
    ),
    "gemma3": Row(
        "gemma3_text",
        SIZES | {"head_dim": 12, "sliding_window": 5, "query_pre_attn_scalar": 20,
                 "layer_types": ["sliding_attention", "full_attention"],
                 "rope_parameters": {
                     "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                     "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}}},
        _old(rope_theta=1e6, rope_local_base_freq=1e4, rope_scaling={"factor": 8.0, "rope_type": "linear"},
             layer_types=None, sliding_window_pattern=2, _sliding_window_pattern=None),
    ),
    "olmo2": Row("olmo2", SIZES, _old(rope_theta=10000.0)),
    "olmo3": Row(
        "olmo3",
        SIZES | {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"],
                 "rope_parameters": {
                     "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
                     "full_attention": {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0,
                                        "original_max_position_embeddings": 16}}},
        _old(rope_theta=5e5, rope_scaling={"rope_type": "yarn", "factor": 4.0,
                                           "original_max_position_embeddings": 16}),
    ),
    "mamba2": Row(
        "mamba2",
        {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8,
         "state_size": 6, "n_groups": 2, "chunk_size": 8, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2},
        {"dtype": None, "torch_dtype": "float32", "time_step_rank": 2},
        first_hidden=0,
    ),
    "gpt2": Row(
        "gpt2", GPT, OLD_GPT, old_names=lambda name: name.removeprefix("transformer."),
        buffers=("attn.bias", "attn.masked_bias"),
    ),
    "gpt2-scaled": Row(
        "gpt2", GPT | {"n_inner": 40, "activation_function": "relu", "scale_attn_weights": False}
        | {"scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False, "resid_pdrop": 0.0},
    ),
    "gptj": Row("gptj", GPT | {"rotary_dim": 4}, OLD_GPT | {"rotary": True, "scale_attn_weights": True}),
    "neox": Row(
        "gpt_neox", NEOX, NEOX_OLD | {"rotary_pct": 0.25}, old_names=_embed_out,
        buffers=("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"),
    ),
    "neox-sequential": Row(
        "gpt_neox", NEOX | {"use_parallel_residual": False, "hidden_act": "gelu_fast"}
        | {"attention_bias": False}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0}},
        {"dtype": None, "rope_parameters": None, "rotary_emb_base": 500, "rotary_pct": 1.0},
        old_names=_embed_out,
    ),
    "bloom": Row(
        "bloom", BLOOM, BLOOM_OLD, old_names=lambda name: name.removeprefix("transformer.")
    ),
    "bloom-residual": Row(
        "bloom", BLOOM | {"apply_residual_connection_post_layernorm": True, "n_head": 6, "hidden_size": 36}
    ),
    "falcon-7b": Row(
        "falcon", FALCON,
        FALCON_OLD | {"apply_residual_connection_post_layernorm": False, "num_kv_heads": None},
    ),
    "falcon-40b": Row(
        "falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 48}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        FALCON_OLD | {"num_ln_in_parallel_attn": None, "rope_theta": 500.0}
        | {"hidden_size": None, "n_embed": 32},
    ),
    "falcon-11b": Row(
        "falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1}
        | {"bias": True},
        FALCON_OLD | {"ff_factor": 4, "ffn_hidden_size": None},
    ),
    "falcon-rw": Row(
        "falcon", FALCON | {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}
        | {"num_attention_heads": 16},  # from 16 heads on, bfloat16 does not hold their slopes
        FALCON_OLD,
        attention="sdpa",  # eager adds the bias twice: in the mask and again to the scores
    ),
    "mpt": Row("mpt", MPT | {"attn_config": {"clip_qkv": 1.5, "softmax_scale": 0.3}}),
    "mpt-7b": Row("mpt", MPT | {"n_heads": 6, "d_model": 36, "attn_config": None}, MPT_OLD),
    "phi": Row(
        "phi", SIZES | {"qk_layernorm": True}, _old(rope_theta=10000.0, partial_rotary_factor=0.5)
    ),
    "phi-1": Row("phi", SIZES | {"num_key_value_heads": 4}),
    "phi3": Row("phi3", SIZES | {"sliding_window": 5}, _old(rope_theta=10000.0, rope_scaling=None)),
    "phi3-longrope": Row(
        "phi3", SIZES | {"original_max_position_embeddings": 32, "rope_parameters": LONGROPE}
        | {"tie_word_embeddings": True},
        _old(
            rope_theta=10000.0, partial_rotary_factor=0.75,
            rope_scaling={"type": "longrope"} | FACTORS,
            full_attn_mod=1, interpolate_factor=1, lm_head_bias=False, mlp_bias=False, attention_bias=False,
        ),
    ),
    "cohere": Row(
        "cohere", SIZES | {"logit_scale": 0.5},
        _old(rope_theta=500000.0, model_max_length=64, use_qk_norm=None),
    ),
    "cohere-qk-norm": Row(
        "cohere", SIZES | {"use_qk_norm": True, "attention_bias": True, "tie_word_embeddings": False}
        | {"logit_scale": 1.0},
    ),
    "cohere2": Row(
        "cohere2", SIZES | {"sliding_window": 5, "num_hidden_layers": 3, "logit_scale": 0.25}
        | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        _old(
            rope_theta=10000.0, layer_types=None, sliding_window_pattern=2, layer_switch=2, rotary_pct=1.0,
            use_embedding_sharing=True, position_embedding_type="rope_gptj", use_parallel_block=True,
            order_of_interleaved_layers="local_attn_first", use_gated_activation=True,
        ),
    ),
    "granite": Row(
        "granite", SIZES | {"embedding_multiplier": 3.0, "logits_scaling": 2.5, "residual_multiplier": 0.7}
        | {"attention_multiplier": 0.2, "tie_word_embeddings": True}
        | {"attention_bias": True, "mlp_bias": True},
        _old(rope_theta=10000.0, rope_scaling=None),
    ),
}  # fmt: skip
