"""GGUF files as checkpoints of Hugging Face: the same names, order of rows and norms, and a config.json.

llama.cpp renames tensors, stores the rows of Llama's q and k in the order of interleaved RoPE, and adds 1 to
the norms of Gemma. Here this is undone, so that a family has one table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from attention_jax.pretrained.description import Description
from attention_jax.pretrained.files import GGUFTensors

_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_SANDWICH = _LAYER | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_NAME = re.compile(r"(?:blk\.(\d+)\.)?([a-z_]+)\.(weight|bias)")

#: By general.architecture: model_type, names of a layer's tensors, whether q and k are permuted, and what
#: was added to the norms.
ARCHITECTURES: dict[str, tuple[str, Mapping[str, str], bool, float]] = {
    "llama": ("llama", _LAYER, True, 0.0),
    "qwen2": ("qwen2", _LAYER, False, 0.0),
    "qwen3": ("qwen3", _LAYER, False, 0.0),
    "gemma": ("gemma", _LAYER, False, 1.0),
    "gemma2": ("gemma2", _SANDWICH, False, 1.0),
    "gemma3": ("gemma3_text", _SANDWICH, False, 1.0),
}
_SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}


class GGUFModel:
    """The tensors of a GGUF file under the names that a checkpoint of Hugging Face has.

    Implements `Tensors`; `description` is the config.json of the model. Raises: ValueError for an unknown
    architecture, option or tensor, by name.
    """

    def __init__(self, tensors: GGUFTensors, where: str):
        self.metadata, self._tensors, self._where = tensors.metadata, tensors, where
        architecture = tensors.metadata.get("general.architecture")
        if architecture not in ARCHITECTURES:
            raise ValueError(
                f"{where}: general.architecture {architecture!r} is not supported; there are "
                f"{', '.join(ARCHITECTURES)}"
            )
        self.model_type, layer, self._permuted, self._norm_offset = ARCHITECTURES[architecture]
        self._names = {self._theirs(name, layer): name for name in tensors.names()}
        self.description = self._describe(architecture)

    def names(self) -> list[str]:
        """The names, in the file's order."""
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that `read` gives."""
        return self._tensors.shape(self._find(name))

    def dtype(self, name: str) -> np.dtype:
        """The dtype that `read` gives."""
        return self._tensors.dtype(self._find(name))

    def read(self, name: str) -> np.ndarray:
        """The tensor, in the order and with the values of Hugging Face's checkpoints."""
        x = self._tensors.read(self._find(name))
        if self._permuted and (part := re.search(r"\.(q|k)_proj\.", name)):
            key = "num_attention_heads" if part[1] == "q" else "num_key_value_heads"
            return _halves(x, self.description.integer(key))
        return x - self._norm_offset if self._norm_offset and "norm." in name else x

    def read_slice(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """`read(name)[index]`."""
        return self.read(name)[index]

    def _find(self, name: str) -> str:
        if name not in self._names:
            raise ValueError(f"{self._where}: no tensor {name!r}")
        return self._names[name]

    def _theirs(self, name: str, layer: Mapping[str, str]) -> str:
        """The name of a tensor in Hugging Face's checkpoints."""
        match = _NAME.fullmatch(name)
        known = None if match is None else (_OUTER if match[1] is None else layer).get(match[2])
        if known is None:
            raise ValueError(f"{self._where}: tensor {name!r} is not known in a model of {self.model_type}")
        return f"model.layers.{match[1]}.{known}.{match[3]}" if match[1] else f"{known}.{match[3]}"

    def _describe(self, architecture: str) -> Description:
        given = {
            key.removeprefix(f"{architecture}."): value
            for key, value in self.metadata.items()
            if key.startswith(f"{architecture}.")
        }
        get: Callable[..., Any] = given.pop
        values = {theirs: get(ours, None) for ours, theirs in _SIZES.items()}
        values["model_type"] = self.model_type
        values["tie_word_embeddings"] = "lm_head.weight" not in self._names
        if values["vocab_size"] is None:
            values["vocab_size"] = self.shape("model.embed_tokens.weight")[0]
        values["attention_bias"] = "model.layers.0.self_attn.o_proj.bias" in self._names or None
        width = values["head_dim"]
        if width is None and None not in (values["hidden_size"], values["num_attention_heads"]):
            width = values["hidden_size"] // max(1, values["num_attention_heads"])
        for key in ("attention.value_length", "rope.dimension_count"):
            if (found := get(key, None)) not in (None, width):
                raise ValueError(
                    f"{self._where}: {architecture}.{key} {found} is not the width {width} of a head"
                )
        if self._norm_offset:
            values["query_pre_attn_scalar"] = self._query_scale(values, width)
        if (kind := get("rope.scaling.type", "none")) not in ("none", "linear"):
            raise ValueError(f"{self._where}: {architecture}.rope.scaling.type {kind!r} is not supported")
        factor = get("rope.scaling.factor", None)
        if kind == "linear":
            values["rope_scaling"] = {"type": kind, "factor": factor}
        if given:
            key = sorted(given)[0]
            raise ValueError(f"{self._where}: {architecture}.{key} {str(given[key])[:60]} is not supported")
        return Description({key: value for key, value in values.items() if value is not None}, self._where)

    def _query_scale(self, values: Mapping[str, Any], width: int | None) -> int | None:
        """The square of the divisor of Gemma's scores; a Gemma 1 has none of its own."""
        if self.model_type == "gemma":
            return None
        largest = {"gemma2": 46, "gemma3_text": 62}[self.model_type]  # layers of the 27B models
        if values["num_hidden_layers"] == largest:
            return values["hidden_size"] // values["num_attention_heads"]
        return width


def _halves(x: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k whose pairs (2j, 2j + 1) of RoPE become (j, j + H / 2)."""
    pairs = x.reshape(heads, x.shape[0] // heads // 2, 2, *x.shape[1:])
    return pairs.swapaxes(1, 2).reshape(x.shape)
