"""Log-probabilities of given text, against log-softmax in float64 of the whole logits."""

import dataclasses

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose

from attention_jax.generation import score
from attention_jax.generation.score import _scores
from attention_jax.mixers import AttentionConfig, Context, CrossAttentionConfig
from attention_jax.model import EncoderConfig, ModelConfig, apply, encode
from attention_jax.positions import RoPE
from tests.params import random_params

SOFTMAX = AttentionConfig(num_heads=2, rope=RoPE())


def model(*mixers, **options):
    config = ModelConfig(vocab_size=31, d_model=32, num_layers=2, mixers=mixers, init_std=0.3, **options)
    return config, random_params(config)


def reference(config, params, ids, ctx=None):
    z = np.asarray(apply(config, params, np.asarray(ids)[None], ctx=ctx).logits, np.float64)[0, :-1]
    z -= np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)) + z.max(-1, keepdims=True)
    return z[np.arange(len(ids) - 1), ids[1:]]


@pytest.mark.parametrize("scan_layers", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_scores_are_log_probabilities(scan_layers):
    config, params = model(SOFTMAX, tie_embeddings=False, scan_layers=scan_layers)
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 31, n) for n in (70, 5, 1, 64, 20)]
    found = score(config, params, sequences, batch_size=2)
    for ids, row in zip(sequences, found, strict=True):
        assert row.dtype == np.float32 and len(row) == len(ids) - 1
        assert_allclose(row, reference(config, params, ids), atol=2e-5)
    behind = score(config, params, sequences, prompt_lengths=[60, 5, 1, 2, 19], batch_size=2)
    for row, whole, n in zip(behind, found, [60, 5, 1, 2, 19], strict=True):
        assert row.tolist() == whole[n - 1 :].tolist()
    assert score(config, params, []) == []


def test_scores_given_a_source():
    encoder = EncoderConfig(num_layers=1, mixers=(SOFTMAX,))
    config, params = model(SOFTMAX, CrossAttentionConfig(num_heads=2), encoder=encoder)
    ids, sources = [[1, 2, 3, 4], [5, 6]], [[7, 8], [9]]
    for found, row, source in zip(score(config, params, ids, sources=sources), ids, sources, strict=True):
        memory = encode(config, params, np.array([source]))
        assert_allclose(found, reference(config, params, row, Context(memory_BSD=memory)), atol=2e-5)


def test_the_logits_of_a_row_are_never_held_at_once():
    config, params = model(SOFTMAX)
    config = dataclasses.replace(config, vocab_size=100_000)
    params = params | {"embed": {"embedding": jax.ShapeDtypeStruct((100_000, 32), np.float32)}}
    ids = jax.ShapeDtypeStruct((4, 512), np.int32)
    plan = _scores.lower(config, params, ids, ids, None).compile().memory_analysis()
    assert plan.temp_size_in_bytes < 4 * 512 * 100_000 * 4 / 4


def test_a_prefix_is_given():
    config, params = model(AttentionConfig(num_heads=2, mask="Prefix(4) | Causal()", rope=RoPE()))
    [row] = score(config, params, [np.arange(9)])
    assert_allclose(row, reference(config, params, np.arange(9))[3:], atol=2e-5)
    for options, message in (
        ({"prompt_lengths": [3]}, r"prompt_lengths of sequence 0 must be an integer in \[4, 9\], got 3"),
        ({"prompt_lengths": [10]}, r"must be an integer in \[4, 9\], got 10"),
        ({"prompt_lengths": [4, 4]}, "one number for each of 1 sequences"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
        ({"sources": [[1]]}, "a model without an encoder takes no sources"),
    ):
        with pytest.raises(ValueError, match=message):
            score(config, params, [np.arange(9)], **options)
    with pytest.raises(ValueError, match="sequence 0 has 2 tokens, fewer than the prefix of 4"):
        score(config, params, [[1, 2]])
    with pytest.raises(ValueError, match="sequence 1: token id 31 is outside 0..30"):
        score(config, params, [[1, 2, 3, 4], [31]])
    with pytest.raises(ValueError, match="the model is not causal"):
        score(dataclasses.replace(config, mixers=(SOFTMAX,), causal=False), params, [[1]])
    short, weights = model(SOFTMAX, max_positions=8)
    with pytest.raises(ValueError, match="sequence 0 of 9 tokens exceeds the model's max_positions 8"):
        score(short, weights, [np.arange(9)])
