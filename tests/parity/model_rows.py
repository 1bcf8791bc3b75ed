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

    old replaces keys of the saved config.json: a null removes one.
    """

    model_type: str
    options: dict[str, Any]
    old: dict[str, Any] | None = None


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
}  # fmt: skip
