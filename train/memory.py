"""Whether a run can fit this machine, asked before anything is built: arrays that do not fit end the process.

Only shapes are made. What is counted is a lower bound: parameters, their gradient and AdamW's two moments,
and of one batch the residual stream that the backward pass reads and the logits with their gradient. A run is
refused only where the bound is `_FACTOR` times the memory; below that the machine itself decides.
"""

from __future__ import annotations

import dataclasses
import math
import os

import jax

from attention_jax.model import ModelConfig, count_params, init_params, init_state
from train.config.schema import RunConfig

_FACTOR = 2
_ENTRY = 4  # bytes of a float32 or int32


def check_memory(config: RunConfig) -> None:
    """ValueError where the run needs a clear multiple of the memory, with both numbers."""
    most = _FACTOR * _memory()
    model = _with_vocabulary(config)
    parameters = parameter_count(model)
    if (least := 4 * _ENTRY * parameters) > most:
        raise ValueError(
            f"model: its {parameters:,} parameters take {_show(least)} with gradient and moments, and this "
            f"machine has {_show(most // _FACTOR)}: lower model.d_model, num_layers or the widths"
        )
    if (least := batch_bytes(config, model)) > most:
        raise ValueError(
            f"data: a batch of {config.data.batch_size} rows of {config.data.sequence_length} tokens takes "
            f"at least {_show(least)}, and this machine has {_show(most // _FACTOR)}: lower data.batch_size "
            "or data.sequence_length, or raise optimizer.accumulation_steps"
        )
    if (least := _sample_bytes(config, model)) > most:
        tokens = config.evaluation.sample_tokens
        raise ValueError(
            f"evaluation.sample_tokens {tokens}: the state of so many tokens takes at least {_show(least)}, "
            f"and this machine has {_show(most // _FACTOR)}: lower it"
        )


def parameter_count(model: ModelConfig) -> int:
    """The number of parameters, by the shapes of one layer of each kind: many layers need no more time."""
    period = len(model.period)
    encoder = model.encoder
    one = None if encoder is None else dataclasses.replace(encoder, num_layers=len(encoder.mixers))
    single = _count(dataclasses.replace(model, num_layers=period, encoder=one))
    double = _count(dataclasses.replace(model, num_layers=2 * period, encoder=one))
    total = single + (double - single) * (model.num_layers - period) / period
    if encoder is not None:
        two = dataclasses.replace(encoder, num_layers=2 * len(encoder.mixers))
        more = _count(dataclasses.replace(model, num_layers=period, encoder=two)) - single
        total += more * (encoder.num_layers - len(encoder.mixers)) / len(encoder.mixers)
    return math.ceil(total)


def batch_bytes(config: RunConfig, model: ModelConfig) -> int:
    """A lower bound of what one micro-batch needs beside the parameters."""
    data = config.data
    rows = data.batch_size // config.optimizer.accumulation_steps
    width = 2 if model.dtype == "bfloat16" else _ENTRY
    stream = rows * data.sequence_length * model.d_model * model.num_layers * width
    logits = 2 * rows * data.sequence_length * model.vocab_size * _ENTRY
    return stream + logits + 2 * data.batch_size * data.sequence_length * _ENTRY


def _sample_bytes(config: RunConfig, model: ModelConfig) -> int:
    """The state with which a sample is decoded; 0 where none is."""
    tokens = config.evaluation.sample_tokens
    if not tokens or not model.causal:
        return 0
    if model.limit is not None:  # more are refused with the prompt
        tokens = min(tokens, model.limit[0])
    period = dataclasses.replace(model, num_layers=len(model.period))
    state = jax.eval_shape(lambda: init_state(period, 1, tokens))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def _count(model: ModelConfig) -> int:
    return count_params(jax.eval_shape(lambda: init_params(model, jax.random.key(0))))


def _with_vocabulary(config: RunConfig) -> ModelConfig:
    """The model with as many ids as are known before the text is read."""
    if config.model.vocab_size is not None:
        return config.model
    ids = 2 if config.data.task is None else config.data.task.vocab_size
    return dataclasses.replace(config.model, vocab_size=ids)


def _memory() -> int:
    """Bytes of memory of the device that trains: the machine's own for a CPU."""
    stats = jax.devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _show(size: int) -> str:
    """A number of bytes in words."""
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            return f"{size:,.0f} {unit}"
        size /= 1024
    raise AssertionError
