"""Prompts in pieces and states that are extended: the logits of whole prompts, for every mixer."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from attention_jax.benchmarks.prefill_memory import planned
from attention_jax.generation import Sampling, decode_step, extend, generate, prefill
from attention_jax.generation.pieces import checked_chunk
from attention_jax.mixers import AttentionConfig, Context, CrossAttentionConfig, make_config, mla, parts
from attention_jax.model import EncoderConfig, ModelConfig, apply, encode
from attention_jax.positions import RoPE
from tests import marks
from tests.marks import Row
from tests.mixers import MIXERS
from tests.params import random_params

LENGTHS, CAPACITY = (23, 9, 4), 40
FAST = ("window-sinks", "mamba2")
ROWS = {
    name: Row(
        case.config if case.config.horizon is None else dataclasses.replace(case.config, horizon=CAPACITY),
        slow=name not in FAST,
    )
    for name, case in MIXERS.items()
}
PREFIX = AttentionConfig(num_heads=2, mask="Prefix(4) | Causal()", rope=RoPE())


def model(*mixers, **options):
    config = ModelConfig(vocab_size=31, d_model=32, num_layers=2, mixers=mixers, init_std=0.3, **options)
    return config, random_params(config)


def padded(rows, T):
    tokens, positions = np.zeros((len(rows), T), np.int32), np.full((len(rows), T), -1, np.int32)
    for i, (ids, first) in enumerate(rows):
        if len(ids):
            tokens[i, T - len(ids) :] = ids
            positions[i, T - len(ids) :] = first + np.arange(len(ids))
    return tokens, positions


def check(config, params, chunk):
    """A ragged prefill in pieces, then a ragged extension, against the uncached logits."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 31, n) for n in LENGTHS]
    more = [rng.integers(0, 31, n) for n in (5, 0, 13)]
    logits = jax.jit(lambda t: apply(config, params, t).logits)

    def wanted(ids):
        return np.asarray(logits(np.pad(ids, (0, CAPACITY - len(ids)))[None]))[0, len(ids) - 1]

    first = jax.jit(functools.partial(prefill, config, capacity=CAPACITY, prefill_chunk=chunk))
    state = first(params, *padded([(row, 0) for row in rows], 24))
    assert state.positions_B.tolist() == list(LENGTHS)
    assert_allclose(state.logits_BV, [wanted(row) for row in rows], atol=2e-5, rtol=1e-5)
    then = jax.jit(functools.partial(extend, config, prefill_chunk=chunk))
    new = then(params, state, *padded([(m, n) for m, n in zip(more, LENGTHS, strict=True)], 13))
    assert new.positions_B.tolist() == [28, 9, 17]
    whole = [np.concatenate(pair) for pair in zip(rows, more, strict=True)]
    assert_allclose(new.logits_BV, [wanted(row) for row in whole], atol=2e-5, rtol=1e-5)
    assert_array_equal(new.logits_BV[1], state.logits_BV[1])


@pytest.mark.parametrize("name", marks.params(ROWS))
def test_pieces_give_the_logits_of_the_whole(name):
    check(*model(ROWS[name].value), 5)


def test_a_prefix_lies_within_the_first_piece():
    config, params = model(PREFIX)
    with pytest.raises(ValueError, match="prefill_chunk 3 is smaller than the prefix of 4 tokens"):
        prefill(config, params, np.zeros((1, 9), int), capacity=9, prefill_chunk=3)
    rows = [np.arange(11), np.arange(5, 11)]
    read = jax.jit(functools.partial(prefill, config, capacity=11, prefill_chunk=4))
    state, whole = (
        read(params, *padded([(r, 0) for r in rows], 11)),
        jax.jit(functools.partial(apply, config)),
    )
    for row, logits in zip(rows, state.logits_BV, strict=True):
        padded_row = np.pad(row, (0, 11 - len(row)))[None]
        assert_allclose(logits, whole(params, padded_row).logits[0, len(row) - 1], atol=2e-5)


@pytest.mark.slow
def test_a_long_prefix_makes_longer_pieces():
    config, params = model(PREFIX)
    long = dataclasses.replace(config, mixers=(dataclasses.replace(PREFIX, mask="Prefix(600) | Causal()"),))
    prompt = np.arange(650) % 31
    [done] = generate(long, params, [prompt], max_new_tokens=1, sampling=Sampling(0))
    assert done.tokens[0] == np.argmax(apply(long, params, prompt[None]).logits[0, -1])


@pytest.mark.slow
def test_a_source_is_encoded_before_the_first_piece():
    mixers = (AttentionConfig(num_heads=2, rope=RoPE()), CrossAttentionConfig(num_heads=2))
    config, params = model(*mixers, encoder=EncoderConfig(num_layers=1, mixers=mixers[:1]))
    prompts, sources = [np.arange(20), np.arange(3)], [[1, 2, 3], [4]]
    options = {"sources": sources, "max_new_tokens": 5, "sampling": Sampling(0), "capacity": 32}
    whole = generate(config, params, prompts, **options)
    pieces = generate(config, params, prompts, prefill_chunk=6, **options)
    assert [c.tokens.tolist() for c in whole] == [c.tokens.tolist() for c in pieces]
    memory = encode(config, params, np.array([[1, 2, 3]]))
    tokens = prompts[0][None]
    read = functools.partial(prefill, config, capacity=32, prefill_chunk=6)
    state = jax.jit(read)(params, tokens, memory_BSD=memory)
    # A state holds what its layers need of the source.
    [rest] = generate(config, params, [[]], state=state, max_new_tokens=5, sampling=Sampling(0))
    assert rest.tokens.tolist() == whole[0].tokens.tolist()


def test_bad_extensions():
    config, params = model(AttentionConfig(num_heads=2, rope=RoPE()))
    read = jax.jit(functools.partial(prefill, config, capacity=6))
    state = read(params, np.zeros((2, 4), int))
    for tokens, positions, message in (
        (np.zeros((1, 2), int), None, "tokens_BT has 1 rows and the state 2"),
        (np.zeros((2, 3), int), None, "position 6 exceeds the state's capacity 6"),
        (np.zeros((2, 2), int), [[4, 5], [5, 6]], "positions_BT of row 1 must continue the state at 4"),
        (np.zeros((2, 2), int), [[4, 5], [4, -1]], "must be left-padded"),
        (np.array([[1, 1], [1, 31]]), None, "token id 31 is outside 0..30"),
    ):
        with pytest.raises(ValueError, match=message):
            extend(config, params, state, tokens, positions)
    with pytest.raises(ValueError, match="capacity must be an integer >= 1, static under jax.jit, got 1.5"):
        prefill(config, params, np.zeros((1, 1), int), capacity=1.5)
    with pytest.raises(ValueError, match="token id 2147483647 is outside 0..30"):  # not the id 0
        prefill(config, params, np.array([[2**33]]), capacity=6)
    full = dataclasses.replace(state, positions_B=np.full(2, 6, np.int32))
    one_B, false_B = np.array([1, 1]), np.zeros(2, bool)
    for at, tokens, active, message in (
        (full, one_B, None, "position 6 exceeds the state's capacity 6"),
        (state, one_B[:1], None, r"tokens_B must be integers \[2\], got int64 \[1\]"),
        (state, one_B, one_B, r"active_B must be boolean \[2\], got int64 \[2\]"),
        (state, one_B, false_B[:1], r"active_B must be boolean \[2\], got bool \[1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            decode_step(config, params, at, tokens, active)
    assert_array_equal(decode_step(config, params, full, one_B, false_B).positions_B, [6, 6])
    gone = state.fork(np.array([0, 1]))
    gone.positions_B.delete()
    for call in (decode_step, extend):
        with pytest.raises(ValueError, match="the state's arrays were donated to another call"):
            call(config, params, gone, one_B if call is decode_step else one_B[:, None])


def test_a_step_within_the_prefix_is_refused_or_nan():
    """Its earlier tokens have not attended to the rest of the prefix: every later logit would be another."""
    config, params = model(dataclasses.replace(PREFIX, mask="Prefix(4) | Causal()"))
    read = jax.jit(functools.partial(prefill, config, capacity=8))
    step = jax.jit(lambda state, ids: decode_step(config, params, state, ids))
    state, ids = read(params, np.array([[1, 2, 3]])), np.array([4])
    with pytest.raises(ValueError, match="row 0 of the state has 3 tokens, fewer than the prefix of 4"):
        decode_step(config, params, state, ids)
    for _ in range(3):  # behind the prefix, too
        state = step(state, ids)
        assert np.isnan(state.logits_BV).all()
    whole = np.array([[1, 2, 3, 4, 5]])
    found = step(read(params, whole[:, :4]), whole[:, 4]).logits_BV
    assert_allclose(found, apply(config, params, whole).logits[:, -1], atol=2e-5)


LONG = {
    "softmax": {"num_heads": 4},
    "window": {"num_heads": 4, "mask": "SlidingWindow(1024)"},
    "mla": {"num_heads": 4},
    "linear": {"num_heads": 4},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_the_plan_of_a_long_prompt_is_little_more_than_weights_and_cache(name):
    mixer = make_config("softmax" if name == "window" else name, **LONG[name])
    config = ModelConfig(vocab_size=4096, d_model=256, num_layers=6, mixers=(mixer,))
    plan = planned(config, 2**15)
    assert plan.peak <= 1.3 * (plan.weights + plan.cache), plan


def test_pieces_are_shorter_where_weights_and_caches_are_small():
    linear = ModelConfig(vocab_size=4096, d_model=256, num_layers=6, mixers=(make_config("linear"),))
    assert [checked_chunk(linear, None, B, 0) for B in (1, 2)] == [448, 256]
    assert checked_chunk(linear, None, 1, 2**25) == 512
    assert checked_chunk(linear, 7, 9, 0) == 7


def test_latents_expanded_in_blocks_give_the_same(monkeypatch):
    """With a last block that overlaps the one before, empty blocks, and a row without tokens."""
    config, params = model(
        make_config("mla", num_heads=2, latent_dim=8, head_dim=8, rotary_dim=4, rope=RoPE())
    )
    rng = np.random.default_rng(0)
    tokens, positions = padded([(rng.integers(0, 31, n), 0) for n in (24, 11, 0)], 24)
    first = prefill(config, params, tokens, positions, capacity=CAPACITY)
    rows = [(rng.integers(0, 31, n), first) for n, first in ((13, 24), (0, 11), (9, 0))]
    whole = extend(config, params, first, *padded(rows, 13))
    monkeypatch.setattr(parts, "EXPANDED", 12)
    monkeypatch.setattr(mla, "EXPANDED", 12)
    begun = prefill(config, params, tokens, positions, capacity=CAPACITY)
    assert_allclose(begun.logits_BV, first.logits_BV, atol=2e-6, rtol=1e-6)
    blocks = extend(config, params, first, *padded(rows, 13))
    assert_allclose(blocks.logits_BV, whole.logits_BV, atol=2e-6, rtol=1e-6)
    past = padded([(np.zeros(13, int), first) for first in (CAPACITY, 11, 0)], 13)
    run = functools.partial(apply, config, params)
    lost = jax.jit(lambda at: run(past[0], first.caches, ctx=Context(at)).logits)(past[1])
    assert np.isnan(lost[0, -1]).all() and np.isfinite(lost[1:]).all()
