"""The config.json of Llama, or of Qwen 3 where queries and keys are normalised, for a model of one's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from attention_jax.feed_forwards import DenseConfig
from attention_jax.masks import Causal, Full
from attention_jax.mixers.attention import AttentionConfig
from attention_jax.model import ModelConfig
from attention_jax.pretrained.description import Description
from attention_jax.pretrained.families import family_of
from attention_jax.pretrained.family import tiled
from attention_jax.pretrained.models import read_config

#: Fields that do not change what trained parameters compute without dropout.
_OF_TRAINING = ("init_std", "dropout", "embedding_dropout", "scan_layers", "remat", "dtype")


def expressed(config: ModelConfig) -> tuple[ModelConfig, dict[str, Any]]:
    """(the same model as read from config.json, the values of that file).

    The parameters of one are those of the other. Raises: ValueError for a model that Llama and Qwen 3 do not
    compute exactly, with the first field that differs.
    """
    if config.encoder is not None or not config.causal:
        raise ValueError("model.encoder, model.causal: config.json of Llama describes a causal decoder")
    block = config.period[0]
    mixer, unit = block.mixer, block.feed_forward
    if not isinstance(mixer, AttentionConfig) or not isinstance(unit, DenseConfig):
        kind = getattr(unit if isinstance(mixer, AttentionConfig) else mixer, "kind", None)
        raise ValueError(f"model: config.json of Llama has no layer of kind {kind}")
    values = {
        "model_type": "llama" if mixer.qk_norm is None else "qwen3",
        "architectures": ["LlamaForCausalLM" if mixer.qk_norm is None else "Qwen3ForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": unit.hidden_width(config.d_model),
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": mixer.num_heads,
        "num_key_value_heads": mixer.num_kv_heads or mixer.num_heads,
        "head_dim": mixer.head_dim or config.d_model // mixer.num_heads,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": mixer.use_bias,
    }
    if mixer.qk_norm is None:
        values["mlp_bias"] = config.use_bias if unit.use_bias is None else unit.use_bias
    if mixer.rope is not None:
        values["rope_theta"] = mixer.rope.theta
    read = read_config(family_of(values["model_type"]), Description(values))
    ours, theirs = _plain(config), _plain(read)
    for name, own, other in _differences(ours, theirs, "model"):
        raise ValueError(
            f"{name} {str(own)[:60]}: config.json of {values['model_type']} has {str(other)[:60]}"
        )
    return read, values


def _plain(config: ModelConfig) -> ModelConfig:
    """The model with what a null stands for, written as `blocks`."""
    usual = {f.name: f.default for f in dataclasses.fields(ModelConfig)}
    layers = [config.period[i % len(config.period)] for i in range(config.num_layers)]
    reset = {name: usual[name] for name in (*_OF_TRAINING, "mixers", "mlp", "mlp_width")}
    blocks = tiled([_plain_block(config, block) for block in layers])
    rms = {"norm_bias": None, "use_bias": False} if config.norm == "rmsnorm" else {}
    return dataclasses.replace(config, **reset, **rms, blocks=blocks)


def _plain_block(config: ModelConfig, block: Any) -> Any:
    mixer, unit = block.mixer, block.feed_forward
    if isinstance(mixer, AttentionConfig):
        mixer = dataclasses.replace(
            mixer, mask=Causal() if mixer.mask in (Full(), Causal()) else mixer.mask,  # config.causal
            head_dim=mixer.head_dim or config.d_model // mixer.num_heads, dropout=0.0, impl=None,
            num_kv_heads=mixer.num_kv_heads or mixer.num_heads,
            out_bias=mixer.use_bias if mixer.out_bias is None else mixer.out_bias,
            qk_norm_eps=mixer.qk_norm_eps if mixer.qk_norm is not None else AttentionConfig.qk_norm_eps,
        )  # fmt: skip
    if isinstance(unit, DenseConfig):
        bias = config.use_bias if unit.use_bias is None else unit.use_bias
        unit = dataclasses.replace(unit, width=unit.hidden_width(config.d_model), use_bias=bias)
    return dataclasses.replace(block, mixer=mixer, feed_forward=unit)


def _differences(a: Any, b: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    """The innermost fields in which two configurations differ: (path, one's value, the other's)."""
    if a == b:
        return
    if dataclasses.is_dataclass(a) and type(a) is type(b):
        for field in dataclasses.fields(a):
            yield from _differences(getattr(a, field.name), getattr(b, field.name), f"{name}.{field.name}")
    elif isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from _differences(x, y, f"{name}.{index}")
    else:
        yield name, a, b
