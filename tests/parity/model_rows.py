"""Tiny random models of published families: the options of transformers' configuration of each."""

from __future__ import annotations

import dataclasses
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


@dataclasses.dataclass(frozen=True)
class Row:
    """A configuration of transformers. options: its arguments. old: keys of the hub's older spelling.

    old replaces keys of the saved config.json: a null removes one. first_hidden: where in
    transformers' hidden_states the output of the first layer is.
    """

    model_type: str
    options: dict[str, Any]
    old: dict[str, Any] | None = None
    first_hidden: int = 1


def _old(**keys: Any) -> dict[str, Any]:
    """The older spelling: without rope_parameters, dtype and layer_types."""
    return {"rope_parameters": None, "dtype": None, "torch_dtype": "float32"} | keys


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
}  # fmt: skip
