"""Masked language modelling: which tokens of a batch are targets, and what the model reads in their place.

Of the n tokens of a row round(fraction n), at least one, are chosen; a chosen token becomes the mask id, a
random token or itself. The model predicts it from bidirectional context (Devlin et al. 2018,
arXiv 1810.04805). The end-of-document token is neither chosen nor drawn.
"""

from __future__ import annotations

import numpy as np

from attention_jax.tokenizers import Tokenizer
from train.config.sections import DataConfig
from train.data.packing import Batch
from train.data.tasks import TaskConfig


def mask_id(tokenizer: Tokenizer) -> int:
    """The [MASK] id: the tokenizer's vocab_size, outside its range."""
    return tokenizer.vocab_size


def vocabulary_size(objective: str, source: Tokenizer | TaskConfig) -> int:
    """The number of ids a model needs: the tokenizer's or the task's, and for masked_lm the [MASK] id."""
    return source.vocab_size + (objective == "masked_lm")


def hide(batch: Batch, config: DataConfig, tokenizer: Tokenizer, key: tuple[int, ...]) -> Batch:
    """A batch of `train.data.packing.assemble` with its targets replaced by the chosen tokens.

    tokens: what the model reads; targets: the tokens that stood at the chosen places, -1 elsewhere. What
    is chosen in row b depends on (key, b) and the row's tokens alone.
    """
    tokens = batch["tokens"]
    is_text = batch["targets"] >= 0  # a slot without a next token is empty
    if tokenizer.end_of_document is not None:
        is_text &= tokens != tokenizer.end_of_document
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
    # Three uniform numbers a token, row after row: the draws of a row depend on neither B nor the other rows.
    order, kind, other = np.moveaxis(rng.random((*tokens.shape, 3)), -1, 0)
    chosen = _smallest(np.where(is_text, order, np.inf), _counts(is_text.sum(1), config.mask_fraction))
    # The end-of-document token, where there is one, is the last id of a tokenizer.
    characters = tokenizer.vocab_size - (tokenizer.end_of_document is not None)
    random = kind < config.mask_replaced + config.mask_random
    replaced = kind < config.mask_replaced
    read = np.where(random, (other * characters).astype(np.int32), tokens)
    read = np.where(replaced, mask_id(tokenizer), read)
    return batch | {
        "tokens": np.where(chosen, read, tokens).astype(np.int32),
        "targets": np.where(chosen, tokens, -1).astype(np.int32),
    }


def _counts(tokens: np.ndarray, fraction: float) -> np.ndarray:
    """How many of a row's tokens are chosen: at least one, if there is one."""
    return np.minimum(np.maximum(np.rint(fraction * tokens), 1), tokens).astype(int)


def _smallest(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """True at the counts[b] smallest of values[b]."""
    rank = np.argsort(np.argsort(values, axis=1), axis=1)
    return rank < counts[:, None]
