"""Generation: cached = uncached, the same request anywhere gives the same tokens, filters, errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from attention_jax.generation import Sampling, generate, sample, stream
from attention_jax.mixers import AttentionConfig, Context, CosformerConfig, CrossAttentionConfig
from attention_jax.model import EncoderConfig, ModelConfig, apply, encode
from attention_jax.positions import RoPE
from tests import marks
from tests.marks import Row
from tests.params import random_params

GREEDY = Sampling(temperature=0)


def model(*mixers, **options):
    config = ModelConfig(
        vocab_size=61, d_model=32, num_layers=max(2, len(mixers)), mixers=mixers, init_std=0.3, **options
    )
    return config, random_params(config)


MODELS = {
    "mha": Row((AttentionConfig(num_heads=4),), slow=True),
    "gqa-rope": Row((AttentionConfig(num_heads=4, num_kv_heads=2, rope=RoPE()),), slow=True),
    "mqa-alibi": Row((AttentionConfig(num_heads=4, num_kv_heads=1, bias="alibi"),), slow=True),
    "window": Row((AttentionConfig(num_heads=4, mask="SlidingWindow(32)", rope=RoPE()),), slow=True),
    "mix": Row((
        AttentionConfig(num_heads=4, mask="SlidingWindow(16)", rope=RoPE(), qk_norm="rms"),
        AttentionConfig(num_heads=4, num_kv_heads=1, bias="alibi", sink_logits=True, softcap=20.0),
        AttentionConfig(num_heads=2, mask="SlidingWindow(8) | Sinks(4)", rope=RoPE(layout="interleaved")),
    )),
}  # fmt: skip


@pytest.mark.parametrize("name", marks.params(MODELS))
def test_greedy_equals_the_uncached_argmax_for_256_tokens(name):
    config, params = model(*MODELS[name].value, max_positions=300 if name in ("mha", "mix") else None)
    prompts = [np.arange(1, 20) % 61, np.array([7, 3, 7])]
    new = generate(config, params, prompts, max_new_tokens=256, sampling=GREEDY)
    logits = jax.jit(lambda t: apply(config, params, t)[0])
    for prompt, tokens in zip(prompts, new, strict=True):
        assert len(tokens) == 256 and len(set(tokens.tolist())) > 3
        whole = np.concatenate([prompt, tokens])
        padded = np.pad(whole, (0, 275 - len(whole)))[None]
        expected = np.argmax(logits(padded)[0], -1)[len(prompt) - 1 : len(whole) - 1]
        assert_array_equal(tokens, expected)


SEQ2SEQ = {
    "mixers": (AttentionConfig(num_heads=4, rope=RoPE()), CrossAttentionConfig(num_heads=4, num_kv_heads=2)),
    "encoder": EncoderConfig(num_layers=1, mixers=(AttentionConfig(num_heads=2, rope=RoPE()),)),
}


@pytest.mark.parametrize("scan_layers", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_greedy_from_a_source_equals_the_uncached_argmax(scan_layers):
    config, params = model(*SEQ2SEQ["mixers"], encoder=SEQ2SEQ["encoder"], scan_layers=scan_layers)
    sources, prompts = [np.arange(9), np.arange(20, 51)], [[1], [4, 5, 6]]
    new = generate(config, params, prompts, sources=sources, max_new_tokens=24, sampling=GREEDY)

    @jax.jit
    def logits(tokens, source, positions):
        memory = encode(config, params, source, positions)
        ctx = Context(memory_BSD=memory, memory_positions_BS=positions)
        return apply(config, params, tokens, ctx=ctx)[0]

    for source, prompt, tokens in zip(sources, prompts, new, strict=True):
        whole = np.concatenate([prompt, tokens])
        # Whatever an invalid source slot holds, it is not read.
        padded, positions = np.full((1, 40), 60), np.full((1, 40), -1)
        padded[0, : len(source)], positions[0, : len(source)] = source, np.arange(len(source))
        out = logits(np.pad(whole, (0, 27 - len(whole)))[None], padded, positions)
        expected = np.argmax(out[0], -1)[len(prompt) - 1 : len(whole) - 1]
        assert_array_equal(tokens, expected)
    other = generate(config, params, prompts, sources=sources[::-1], max_new_tokens=24, sampling=GREEDY)
    assert (other[0] != new[0]).any()


def test_sources_and_prefixes_are_checked(small):
    config, params = model(*SEQ2SEQ["mixers"], encoder=SEQ2SEQ["encoder"])
    options = {"max_new_tokens": 4, "sampling": GREEDY}
    with pytest.raises(ValueError, match="with an encoder needs sources, one per prompt"):
        generate(config, params, [[1]], **options)
    with pytest.raises(ValueError, match="2 sources for 1 prompts; give one per prompt"):
        generate(config, params, [[1]], sources=[[1], [2]], **options)
    with pytest.raises(ValueError, match="source 0: token id 61 is outside 0..60"):
        generate(config, params, [[1]], sources=[[61]], **options)
    with pytest.raises(ValueError, match="without an encoder takes no sources"):
        generate(*small, [[1]], sources=[[1]], **options)
    prefix = dataclasses.replace(small[0], mixers=(AttentionConfig(mask="Prefix(3) | Causal()"),))
    with pytest.raises(ValueError, match="prompt 0 has 2 tokens, fewer than the prefix of 3"):
        generate(prefix, small[1], [[1, 2]], **options)


def test_a_prefix_lm_decodes_what_it_computes_in_parallel():
    config, params = model(AttentionConfig(mask="Prefix(5) | Causal()", rope=RoPE()))
    prompt = np.arange(3, 12)
    [tokens] = generate(config, params, [prompt], max_new_tokens=16, sampling=GREEDY)
    whole = np.concatenate([prompt, tokens])
    logits = jax.jit(lambda t: apply(config, params, t)[0])(whole[None])
    assert_array_equal(tokens, np.argmax(logits[0], -1)[len(prompt) - 1 : -1])


@pytest.fixture(scope="module")
def small():
    return model(AttentionConfig(num_heads=4, rope=RoPE()))


def test_a_request_gets_the_same_tokens_in_any_batch_and_slot(small):
    sampling = Sampling(temperature=0.9, top_k=30, top_p=0.95, min_p=0.01)
    key = jax.random.key(4)
    a, b = np.arange(5), np.arange(30, 50)
    together = generate(*small, [a, b], max_new_tokens=24, sampling=sampling, key=key)
    turned = generate(*small, [b, a], max_new_tokens=24, sampling=sampling, key=key, request_ids=[1, 0])
    alone = generate(*small, [b], max_new_tokens=24, sampling=sampling, key=key, request_ids=[1])
    assert_array_equal(turned[1], together[0])
    assert_array_equal(turned[0], together[1])
    assert_array_equal(alone[0], together[1])
    other = generate(*small, [b], max_new_tokens=24, sampling=sampling, key=key, request_ids=[2])
    assert (other[0] != alone[0]).any()


def test_streaming_is_generation_in_pieces(small):
    arguments = {"max_new_tokens": 21, "sampling": Sampling(0.8), "key": jax.random.key(1)}
    whole = generate(*small, [[1, 2], [3]], **arguments)
    pieces = list(stream(*small, [[1, 2], [3]], chunk=4, **arguments))
    assert [len(row) for row in (p[0] for p in pieces)] == [4, 4, 4, 4, 4, 1]
    for row in range(2):
        assert_array_equal(np.concatenate([p[row] for p in pieces]), whole[row])


def test_eos_ends_a_row_and_leaves_the_others(small):
    free = generate(*small, [[1, 2], [3, 4, 5]], max_new_tokens=30, sampling=GREEDY)
    eos = int(free[0][7])
    first = int(np.flatnonzero(free[0] == eos)[0])
    stopped = generate(*small, [[1, 2], [3, 4, 5]], max_new_tokens=30, sampling=GREEDY, eos_id=eos)
    assert_array_equal(stopped[0], free[0][:first])
    hits = np.flatnonzero(free[1] == eos)
    assert_array_equal(stopped[1], free[1][: hits[0]] if len(hits) else free[1])


def draws(logits, sampling, count=4000):
    keys = jax.random.split(jax.random.key(0), count)
    return np.asarray(sample(jnp.tile(jnp.asarray(logits), (count, 1)), sampling, keys))


LOGITS = np.log(np.array([0.05, 0.4, 0.1, 0.3, 0.15], np.float32))


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        (Sampling(0), {1}),
        (Sampling(1.0), {0, 1, 2, 3, 4}),
        (Sampling(1.0, top_k=2), {1, 3}),
        (Sampling(1.0, top_k=99), {0, 1, 2, 3, 4}),
        (Sampling(1.0, top_p=0.69), {1, 3}),
        (Sampling(1.0, top_p=0.71), {1, 3, 4}),
        (Sampling(1.0, top_p=1e-6), {1}),
        (Sampling(1.0, min_p=0.3), {1, 3, 4}),
        (Sampling(1.0, top_k=3, top_p=0.8), {1, 3}),
    ],
)
def test_filters_allow_exactly_what_they_should(sampling, allowed):
    tokens = draws(LOGITS, sampling)
    assert set(tokens.tolist()) == allowed
    if sampling.temperature:
        p = np.exp(LOGITS.astype(np.float64))
        p = np.array([p[i] if i in allowed else 0 for i in range(5)])
        counts = np.bincount(tokens, minlength=5) / len(tokens)
        assert np.abs(counts - p / p.sum()).max() < 0.03


def test_ties_do_not_let_more_tokens_in():
    assert len(set(draws(np.zeros(5, np.float32), Sampling(1.0, top_k=2)).tolist())) == 2


def test_temperature_sharpens():
    p = np.exp(LOGITS.astype(np.float64) / 0.5)
    counts = np.bincount(draws(LOGITS, Sampling(0.5)), minlength=5) / 4000
    assert np.abs(counts - p / p.sum()).max() < 0.03


def test_capacity_is_checked_before_compiling(small, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("compiled")

    monkeypatch.setattr("attention_jax.generation.decode._prefill", never)
    with pytest.raises(ValueError, match="a prompt of 3 tokens and 8 new ones exceed the capacity 10"):
        generate(*small, [[1, 2, 3]], max_new_tokens=8, sampling=GREEDY, capacity=10)
    config, params = model(AttentionConfig(num_heads=4), max_positions=10)
    with pytest.raises(ValueError, match="exceed the model's max_positions 10"):
        generate(config, params, [[1, 2, 3]], max_new_tokens=8, sampling=GREEDY)
    short = dataclasses.replace(config, mixers=(CosformerConfig(num_heads=4, horizon=9),))
    with pytest.raises(ValueError, match="exceed the model's mixers.0.horizon 9"):
        generate(short, params, [[1, 2, 3]], max_new_tokens=7, sampling=GREEDY)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[]], {}, "prompt 0 must be a non-empty list"),
        ([[1], [0, 61]], {}, r"prompt 1: token id 61 is outside 0..60"),
        ([[-1]], {}, r"token id -1 is outside 0..60"),
        ([[0.5]], {}, "must hold integer token ids"),
        ([], {}, "no prompts"),
        ([[1]], {"max_new_tokens": 0}, "must be >= 1"),
        ([[1]], {"sampling": Sampling(1.0)}, "needs a key"),
        ([[1]], {"request_ids": [1, 2]}, "request_ids must have one id for each of 1 prompts"),
    ],
)
def test_bad_calls(small, prompts, options, message):
    with pytest.raises(ValueError, match=message) as error:
        generate(*small, prompts, **({"max_new_tokens": 4, "sampling": GREEDY} | options))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("arguments", [{"temperature": -1}, {"top_k": 0}, {"top_p": 0.0}, {"min_p": 1.5}])
def test_bad_sampling(arguments):
    with pytest.raises(ValueError, match="must be"):
        Sampling(**arguments)


def test_logits_that_are_not_finite_are_an_error_not_token_0(small):
    config, params = small
    broken = params | {"final_norm": {"scale": jnp.full((32,), jnp.nan)}}
    for sampling in (GREEDY, Sampling(1.0)):
        with pytest.raises(ValueError, match="NaN or all -inf for request 7"):
            generate(
                config, broken, [[1]], max_new_tokens=3, sampling=sampling, key=jax.random.key(0),
                request_ids=[7],
            )  # fmt: skip


def test_decoding_compiles_once_per_shape(small):
    from attention_jax.generation.decode import _decode

    generate(*small, [[1, 2]], max_new_tokens=5, sampling=Sampling(0, top_k=7))
    before = _decode._cache_size()
    generate(*small, [[4, 5, 6]], max_new_tokens=9, sampling=Sampling(0, top_k=7))
    assert _decode._cache_size() == before


def test_scan_layers_decode_too(small):
    config, params = small
    scanned = dataclasses.replace(config, scan_layers=True)
    arguments = {"max_new_tokens": 12, "sampling": GREEDY}
    expected = generate(config, params, [[9, 8]], **arguments)
    assert_array_equal(generate(scanned, params, [[9, 8]], **arguments), expected)
