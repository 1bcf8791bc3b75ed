"""Tiny random models of published families: the options of transformers' configuration of each."""

from __future__ import annotations

import dataclasses
import re
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
MOE = SIZES | {"num_local_experts": 5}
QWEN_MOE = SIZES | {
    "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_hidden_layers": 4,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "beta_fast": 0.5, "beta_slow": 0.05,
    "original_max_position_embeddings": 6,
}  # fmt: skip
LLAMA4 = SIZES | {
    "num_local_experts": 4, "intermediate_size_mlp": 40, "head_dim": 12, "attention_chunk_size": 5,
    "floor_scale": 3, "attn_scale": 0.5,
}  # fmt: skip
FACTORS = {"short_factor": [1.0, 1.3, 2.0], "long_factor": [1.0, 3.0, 5.0]}
LONGROPE = FACTORS | {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75}

#: Latent attention and experts, of DeepSeek and of Kimi.
LATENT = SIZES | {
    "num_key_value_heads": 4, "kv_lora_rank": 12, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6,
    "v_head_dim": 8, "moe_intermediate_size": 12,
}  # fmt: skip
DEEPSEEK = LATENT | {
    "num_experts_per_tok": 3, "n_routed_experts": 8, "n_shared_experts": 2, "first_k_dense_replace": 1,
}  # fmt: skip
DEEPSEEK_YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "original_max_position_embeddings": 64,
    "beta_fast": 8.0, "beta_slow": 1.0, "mscale": 0.707, "mscale_all_dim": 1.0,
}  # fmt: skip
DEEPSEEK_OLD = {
    "ep_size": 1, "moe_layer_freq": 1, "aux_loss_alpha": 0.001, "seq_aux": True, "head_dim": None,
    "qk_head_dim": None, "rope_theta": 10000,
    "rope_scaling": {k: v for k, v in DEEPSEEK_YARN.items() if k not in ("rope_theta", "rope_type")}
    | {"type": "yarn"},
}  # fmt: skip

QWEN3_NEXT = SIZES | {
    "head_dim": 16, "linear_num_value_heads": 6, "linear_num_key_heads": 3, "linear_key_head_dim": 8,
    "linear_value_head_dim": 10, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 20,
}  # fmt: skip

KIMI = LATENT | {
    "linear_head_dim": 8, "linear_num_heads": 3, "num_experts": 8, "num_experts_per_token": 3,
    "num_shared_experts": 1,
}  # fmt: skip
KIMI_OLD = {
    "dtype": None, "layer_types": None, "mlp_layer_types": None, "linear_head_dim": None,
    "linear_num_heads": None, "linear_conv_kernel_dim": None, "qk_head_dim": None, "head_dim": 72,
    "linear_attn_config": {
        "full_attn_layers": [2], "kda_layers": [1, 3], "head_dim": 8, "num_heads": 3,
        "short_conv_kernel_size": 4,
    },
    "mla_use_nope": True, "moe_layer_freq": 1, "moe_router_activation_func": "sigmoid",
    "num_nextn_predict_layers": 0, "rope_scaling": None, "rope_theta": 10000.0, "use_grouped_topk": True,
}  # fmt: skip


def _kimi_dense(name: str) -> str:
    """The authors' name of a dense layer's tensors, which transformers files under the experts' prefix."""
    return re.sub(r"block_sparse_moe(\.(gate|up|down)_proj)", r"mlp\1", name)


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
    "mixtral": Row(
        "mixtral", MOE | {"num_experts_per_tok": 3},
        _old(rope_theta=1000000.0, sliding_window=None, router_aux_loss_coef=0.02),
    ),
    "mixtral-window": Row(
        "mixtral", MOE | {"sliding_window": 5, "head_dim": 12, "hidden_act": "gelu", "rms_norm_eps": 1e-3}
        | {"tie_word_embeddings": True},
    ),
    "qwen2-moe": Row(
        "qwen2_moe", QWEN_MOE | {"shared_expert_intermediate_size": 40, "mlp_only_layers": [1]},
        _old(rope_theta=10000.0, layer_types=None, max_window_layers=21, qkv_bias=None,
             sliding_window=32768, use_sliding_window=False),
    ),
    "qwen2-moe-window": Row(
        "qwen2_moe", QWEN_MOE | {"shared_expert_intermediate_size": 40, "norm_topk_prob": True}
        | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2, "qkv_bias": False}
        | {"decoder_sparse_step": 2},
        _old(rope_theta=10000.0, layer_types=None),
    ),
    "qwen3-moe": Row(
        "qwen3_moe", QWEN_MOE | {"head_dim": 12, "norm_topk_prob": True, "mlp_only_layers": [2]},
        _old(rope_theta=10000.0, rope_scaling=None, max_window_layers=4),
    ),
    "qwen3-moe-window": Row(
        "qwen3_moe", QWEN_MOE | {"use_sliding_window": True, "sliding_window": 5, "decoder_sparse_step": 2}
        | {"attention_bias": True, "tie_word_embeddings": True},
    ),
    "olmoe": Row(
        "olmoe", SIZES | {"num_experts": 6, "num_experts_per_tok": 3},
        _old(rope_theta=10000.0, rope_scaling=None, clip_qkv=None, norm_topk_prob=False),
    ),
    "granite-moe": Row(
        "granitemoe", MOE | {"embedding_multiplier": 3.0, "logits_scaling": 2.5, "residual_multiplier": 0.7}
        | {"attention_multiplier": 0.2, "tie_word_embeddings": True, "num_experts_per_tok": 2},
        _old(rope_theta=10000.0, rope_scaling=None),
    ),
    "gpt-oss": Row(
        "gpt_oss", MOE | {"num_experts_per_tok": 2, "head_dim": 12, "sliding_window": 5}
        | {"swiglu_limit": 0.9, "swiglu_alpha": 1.3, "rope_parameters": YARN | {"truncate": False}},
        _old(
            rope_theta=5e5,
            rope_scaling={k: v for k, v in YARN.items() if k != "rope_theta"} | {"truncate": False},
            layer_types=None, experts_per_token=2, initial_context_length=6, router_aux_loss_coef=0.9,
        ),
    ),
    "llama4": Row(
        "llama4_text", LLAMA4 | {"num_hidden_layers": 4, "no_rope_layer_interval": 2}
        | {"moe_layers": [0, 1, 3], "rope_parameters": LLAMA3},
        _old(
            rope_theta=5e5, rope_scaling={k: v for k, v in LLAMA3.items() if k != "rope_theta"},
            layer_types=None, no_rope_layers=[], attn_temperature_tuning=4, for_llm_compressor=False,
        ),
    ),
    "llama4-interleaved": Row(
        "llama4_text", LLAMA4 | {"interleave_moe_layer_step": 2, "use_qk_norm": False, "attention_bias": True}
        | {"num_experts_per_tok": 2, "attn_temperature_tuning": False, "no_rope_layers": [0, 1]},
        _old(rope_theta=5e5, moe_layers=None),
    ),
    "ministral": Row(
        "ministral", SIZES | {"sliding_window": 5, "head_dim": 12}
        | {"layer_types": ["sliding_attention", "full_attention"]},
        _old(rope_theta=10000.0),
    ),
    "ministral3": Row(
        "ministral3", SIZES | {"head_dim": 12}
        | {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.5}},
        {"dtype": None, "torch_dtype": "float32"},
    ),
    "deepseek2-lite": Row(
        "deepseek_v2", DEEPSEEK | {"q_lora_rank": None, "topk_method": "greedy"},
        _old(rope_theta=10000, scoring_func="softmax", moe_layer_freq=1, ep_size=1, n_group=1, topk_group=1),
    ),
    "deepseek2": Row(
        "deepseek_v2",
        DEEPSEEK | {"q_lora_rank": 9, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
        | {"routed_scaling_factor": 1.7, "rope_parameters": DEEPSEEK_YARN, "attention_bias": True},
        _old(**DEEPSEEK_OLD, scoring_func="softmax"),
    ),
    "deepseek3": Row(
        "deepseek_v3",
        DEEPSEEK | {"q_lora_rank": 9, "n_group": 4, "topk_group": 2, "rope_parameters": DEEPSEEK_YARN},
        _old(**DEEPSEEK_OLD, scoring_func="sigmoid", topk_method="noaux_tc", rope_interleave=None),
    ),
    "deepseek3-half": Row(
        "deepseek_v3",
        DEEPSEEK | {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "rope_interleave": False}
        | {"norm_topk_prob": False, "attention_bias": True, "first_k_dense_replace": 0},
    ),
    "minimax": Row(
        "minimax",
        SIZES | {"num_hidden_layers": 3, "num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 12}
        | {"layer_types": ["linear_attention", "full_attention", "linear_attention"], "block_size": 7}
        | {"full_attn_alpha_factor": 1.5, "full_attn_beta_factor": 0.7, "linear_attn_alpha_factor": 1.3}
        | {"linear_attn_beta_factor": 0.8, "mlp_alpha_factor": 1.2, "mlp_beta_factor": 0.9},
        _old(rope_theta=1000000),
    ),
    "minimax-window": Row(
        "minimax", SIZES | {"num_local_experts": 4, "sliding_window": 5, "tie_word_embeddings": True}
    ),
    "qwen3-next": Row(
        "qwen3_next", QWEN3_NEXT | {"layer_types": ["linear_attention", "full_attention"]},
        _old(rope_theta=10000, partial_rotary_factor=0.25, layer_types=None, full_attention_interval=2),
    ),
    "qwen3-next-dense": Row(
        "qwen3_next",
        QWEN3_NEXT | {"num_hidden_layers": 3, "mlp_only_layers": [0], "attention_bias": True}
        | {"layer_types": ["full_attention", "linear_attention", "full_attention"]}
        | {"norm_topk_prob": False, "rms_norm_eps": 1e-5},
    ),
    "kimi-linear": Row(
        "kimi_linear",
        KIMI | {"num_hidden_layers": 3, "first_k_dense_replace": 1}
        | {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
        KIMI_OLD | {"first_k_dense_replace": 1},
        old_names=_kimi_dense,
    ),
    "kimi-linear-groups": Row(
        "kimi_linear",
        KIMI | {"layer_types": ["full_attention", "linear_attention"], "num_expert_group": 4, "topk_group": 2}
        | {"mlp_layer_types": ["sparse", "sparse"], "moe_renormalize": False, "q_lora_rank": 9},
    ),
}  # fmt: skip
