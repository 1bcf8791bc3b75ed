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

    old replaces keys of the saved config.json: a null removes one. old_names: from a tensor's name to that on
    the hub. buffers: further tensors of a layer's module there, which are no parameters.
    """

    model_type: str
    options: dict[str, Any]
    old: dict[str, Any] | None = None
    old_names: Callable[[str], str] = lambda name: name
    buffers: tuple[str, ...] = ()


def _embed_out(name: str) -> str:
    """GPT-NeoX's output projection, whose name in files is not that in transformers."""
    return "embed_out.weight" if name == "lm_head.weight" else name


def _old(**keys: Any) -> dict[str, Any]:
    """The older spelling: without rope_parameters, dtype and layer_types."""
    return {"rope_parameters": None, "dtype": None, "torch_dtype": "float32"} | keys


NEOX = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
NEOX_OLD = {"dtype": None, "rope_parameters": None, "rotary_emb_base": 10000, "attention_bias": None}

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
    "gpt2": Row(
        "gpt2", GPT, OLD_GPT, lambda name: name.removeprefix("transformer."),
        ("attn.bias", "attn.masked_bias"),
    ),
    "gpt2-scaled": Row(
        "gpt2", GPT | {"n_inner": 40, "activation_function": "relu", "scale_attn_weights": False}
        | {"scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False, "resid_pdrop": 0.0},
    ),
    "gptj": Row("gptj", GPT | {"rotary_dim": 4}, OLD_GPT | {"rotary": True, "scale_attn_weights": True}),
    "neox": Row(
        "gpt_neox", NEOX, NEOX_OLD | {"rotary_pct": 0.25}, _embed_out,
        ("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"),
    ),
    "neox-sequential": Row(
        "gpt_neox", NEOX | {"use_parallel_residual": False, "hidden_act": "gelu_fast"}
        | {"attention_bias": False}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0}},
        {"dtype": None, "rope_parameters": None, "rotary_emb_base": 500, "rotary_pct": 1.0}, _embed_out,
    ),
}  # fmt: skip
