"""Samples of a run in training: generated text, or held-out text with its masked tokens filled in."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from attention_jax.generation import Increment, Sampling, stream
from attention_jax.model import ModelConfig
from train.config.schema import RunConfig
from train.run.restore import Requests, make_requests
from train.step import Batch

_SAMPLING = Sampling(temperature=0.8)
_SAMPLED_SOURCES = 4
_SAMPLED_TOKENS = 1000  # between two signs of life of a long sample
_MASK = "█"  # stands for a masked token in a sample


def sample_requests(config: RunConfig, model: ModelConfig, data: Any) -> Requests | None:
    """The inputs of samples, the prompt or a few held-out sources; None where nothing is sampled."""
    evaluation = config.evaluation
    if evaluation.sample_tokens == 0 or config.objective == "masked_lm":
        return None
    texts = [evaluation.sample_prompt]
    if config.objective == "seq2seq":
        texts = data.held_out_sources(_SAMPLED_SOURCES)
    try:
        requests = make_requests(config.objective, data.tokenizer, texts)
    except ValueError as error:
        raise ValueError(f"evaluation.sample_prompt: {error}") from None
    prompt = len(requests.prompts[0])
    if prompt < model.prefix:
        raise ValueError(
            f"evaluation.sample_prompt has {prompt} tokens, fewer than the mask's prefix of {model.prefix}: "
            "give a longer one, or set evaluation.sample_tokens to 0"
        )
    limit, key = model.limit or (math.inf, "")
    if prompt + evaluation.sample_tokens > limit:
        raise ValueError(
            f"evaluation.sample_tokens {evaluation.sample_tokens}: with the prompt's {prompt} tokens it"
            f" exceeds model.{key} {limit}: lower it to {max(0, limit - prompt)}"
        )
    return requests


def continued(
    config: RunConfig,
    model: ModelConfig,
    params: Any,
    requests: Requests,
    tokenizer: Any,
    key: jax.Array,
    report: Callable[[str], None],
) -> list[str]:
    """The prompts, each with its generated text; `report` gets a line for every thousand tokens."""
    wanted, pieces = config.evaluation.sample_tokens, []
    for increments in stream(
        model,
        params,
        requests.prompts,
        sources=requests.sources,
        max_new_tokens=wanted,
        sampling=_SAMPLING,
        key=key,
        eos_id=tokenizer.end_of_document,
        chunk=_SAMPLED_TOKENS,
    ):
        pieces.append([_tokens(increment) for increment in increments])
        done = len(pieces) * _SAMPLED_TOKENS
        if done < wanted:
            report(f"sampling: {done:,} of at most {wanted:,} tokens")
    rows = [np.concatenate(row) for row in zip(*pieces, strict=True)]
    return [echo + tokenizer.decode(ids) for echo, ids in zip(requests.echo, rows, strict=True)]


def _tokens(increment: Increment) -> np.ndarray:
    if increment.error is not None:
        raise ValueError(increment.error)
    return increment.tokens


def filled_in(data: Any, batch: Batch, predicted: jax.Array, length: int) -> list[str]:
    """The first row's text with masked tokens, and with the model's predictions in their places."""
    masked, filled = (
        _readable(data, np.asarray(tokens)[0, :length]) for tokens in (batch["tokens"], predicted)
    )
    return [f"--- masked\n{masked}", f"--- filled in\n{filled}"]


def _readable(data: Any, ids: np.ndarray) -> str:
    """The text of some ids, with a block for each masked token."""
    masks = np.flatnonzero(ids == data.mask_id)
    parts = np.split(ids, masks)
    return _MASK.join(data.tokenizer.decode(part[part != data.mask_id]) for part in parts)
