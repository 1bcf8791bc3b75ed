"""Generation: cached = uncached, the same request anywhere gives the same tokens, filters, errors."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from attention_jax.caches import CacheOptions
from attention_jax.generation import (
    DecodeState,
    Sampling,
    decode_step,
    generate,
    prefill,
    requests,
    sample,
    stream,
)
from attention_jax.generation import sampling as sampling_lib
from attention_jax.mixers import AttentionConfig, Context, CosformerConfig, CrossAttentionConfig
from attention_jax.model import EncoderConfig, ModelConfig, apply, encode, init_state, language_model
from attention_jax.positions import RoPE
from tests import marks
from tests.marks import Row
from tests.params import random_params
from tests.reference.sampling import distribution, nucleus

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


def test_the_bits_of_a_request_id():
    """They are those of `fold_in` of the 32-bit word, of every type of integer."""
    ids = [0, 5, 2**31, 2**32 - 1]
    for given in (ids, np.array(ids), np.array(ids, np.uint32), [np.int64(n) for n in ids]):
        found = requests.checked_request_ids(given, 4)
        assert found.dtype == np.uint32 and found.tolist() == ids
    key = jax.random.key(3)
    words = jax.vmap(lambda n: jax.random.key_data(jax.random.fold_in(key, n)))(found)
    wanted = [jax.random.key_data(jax.random.fold_in(key, np.uint32(n))) for n in ids]
    assert_array_equal(words, wanted)
    assert len({tuple(row) for row in np.asarray(words).tolist()}) == 4


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


def kept(logits, **options):
    """The probabilities [V] that the filters of `sample` leave, of logits whose largest is 0."""
    sorted_1V, order_1V = sampling_lib._kept(jnp.asarray(logits, jnp.float32)[None], Sampling(**options))
    p = np.exp(np.asarray(sorted_1V[0], np.float64))
    out = np.zeros(len(logits))
    out[np.asarray(order_1V[0])] = p / p.sum()
    return out


EDGES = {
    "ties at every border": np.zeros(8),
    "ties below the largest": np.array([-1.0, 0, -1, -1, 0, -2, -1, -1]),
    "masked ids": np.array([-np.inf, 0, -np.inf, -3e38, -0.5, -np.inf, -np.inf, -9]),
    "one id": np.array([0, *[-np.inf] * 7]),
    "far apart": -np.array([60.0, 0, 20, 80, 100, 40, 103, 87]),
    "near": -np.array([1, 0, 2, 5, 7, 3, 4, 6]) * np.finfo(np.float32).eps,
}


@pytest.mark.parametrize("name", EDGES)
def test_the_filters_keep_what_float64_keeps(name):
    """Also exact ties at the border of each filter, of which the smallest ids are kept."""
    z = EDGES[name].astype(np.float32)
    top_p = [1.0, 0.9999999, 0.75, 0.625, 0.5, 0.25, 0.126, 1e-7]
    rows = [{"top_k": n} for n in (1, 2, 3, 7, 8, 9)] + [{"top_p": p} for p in top_p]
    rows += [{"min_p": p} for p in (1.0, 0.9, 0.3, 1e-9, 1e-30)]
    for options in [*rows, {"top_k": 5, "top_p": 0.6}, {"top_k": 6, "top_p": 0.9, "min_p": 0.4}]:
        wanted, found = distribution(z, **options), kept(z, **options)
        assert_array_equal(found > 0, wanted > 0, err_msg=f"{options}")
        np.testing.assert_allclose(found, wanted, rtol=1e-6, err_msg=f"{options}")


@pytest.mark.parametrize("scale", [4.0, *(pytest.param(s, marks=pytest.mark.slow) for s in (0.0, 1.0, 12.0))])
def test_a_nucleus_of_128k_ids_is_that_of_float64(scale):
    """A cumulative sum in float32 reaches 1 thousands of tokens too early."""
    z = (scale * np.random.default_rng(0).normal(size=128_256)).astype(np.float32)
    z = -np.sort(-(z - z.max()))
    for top_p in (1e-7, 0.1, 0.5, 0.7, 0.9, 0.999, 0.999999, 0.9999999):
        found = int(sampling_lib._nucleus(jnp.asarray(z)[None], top_p).sum())
        # The borders within a relative 4e-6 of the smaller part, that of float32's rounding.
        less = 4e-6 * min(top_p, 1 - top_p)
        assert nucleus(z, top_p - less) <= found <= nucleus(z, top_p + less), top_p


def test_a_top_p_of_1_is_no_filter():
    logits = 4 * np.random.default_rng(0).normal(size=4096).astype(np.float32)
    assert_array_equal(draws(logits, Sampling(1.0, top_p=1.0), 20), draws(logits, Sampling(1.0), 20))
    assert (kept(logits - logits.max(), top_p=1.0, top_k=5000) > 0).all()


def test_ties_do_not_let_more_tokens_in():
    assert set(draws(np.zeros(5, np.float32), Sampling(1.0, top_k=2)).tolist()) == {0, 1}


@pytest.mark.parametrize("temperature", [1e-4, 1e-30, 1.2e-38, 8e37])
def test_the_smallest_and_largest_temperatures(temperature):
    """Logits at the distance of the temperature, ties, ids of no probability, and quotients that overflow."""
    t = np.float32(min(temperature, 1e30))
    for logits in (
        np.array([5, 9, 9, -3e38, -np.inf], np.float32),
        np.array([0, -t, -2 * t, -3 * t, -np.inf], np.float32),
        -np.array([9, 5, 5, 3e38, 6], np.float32),
    ):
        tokens = draws(logits, Sampling(temperature))
        wanted = distribution(logits, temperature)
        counts = np.bincount(tokens, minlength=5) / len(tokens)
        assert np.abs(counts - wanted).max() < 0.03 and (counts[wanted == 0] == 0).all()


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.7), Sampling(1.0, 3, 0.9, 0.1)], ids=str)
def test_a_row_without_a_distribution_gives_no_token(sampling):
    rows = np.zeros((5, 6), np.float32)
    rows[0, 2], rows[1], rows[2, 4] = np.nan, -np.inf, np.inf
    rows[3, 1:] = -np.inf
    tokens = sample(jnp.asarray(rows), sampling, jax.random.split(jax.random.key(0), 5))
    assert tokens[:4].tolist() == [-1, -1, -1, 0] and 0 <= tokens[4] < 6


def test_logits_of_another_form_are_refused():
    keys = jax.random.split(jax.random.key(0), 2)
    for logits, what in ((np.zeros(3, np.float32), "3"), (np.zeros((2, 0), np.float32), "2, 0")):
        with pytest.raises(ValueError, match=rf"floating point .B, V., got float32 \[{what}\]$"):
            sample(logits, GREEDY, keys)
    with pytest.raises(ValueError, match="floating point .B, V., got int32"):
        sample(np.zeros((2, 3), np.int32), GREEDY, keys)


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
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens must be an integer >= 1, got 0"),
        ([[1]], {"sampling": Sampling(1.0)}, "needs a key"),
        ([[1]], {"max_new_tokens": 2.5}, "max_new_tokens must be an integer >= 1, got 2.5"),
        ([[1]], {"max_new_tokens": True}, "max_new_tokens must be an integer >= 1, got True"),
        ([[1]], {"capacity": 0}, "capacity must be an integer >= 1, got 0"),
        ([[1]], {"key": 0}, r"key must be one PRNG key such as jax.random.key\(0\), got 0"),
        ([[1]], {"key": np.zeros((2, 2), np.uint32)}, r"key must be one PRNG key .*, got uint32 \[2, 2\]"),
        ([[1]], {"eos_id": [3]}, r"eos_id must be one token id or None, got \[3\]"),
        ([[1]], {"eos_id": np.array(True)}, r"eos_id must be one token id or None, got array\(True\)"),
        ([[1]], {"eos_id": 61}, "eos_id 61 is outside 0..60"),
        ([[1]], {"eos_id": -1}, "eos_id -1 is outside 0..60"),
        ([[1, [2]]], {}, "prompt 0 must be a list of token ids, got nested lists"),
        ([[True]], {}, "prompt 0 must hold integer token ids, got bool"),
        ([["a"]], {}, "prompt 0 must hold integer token ids, got <U1"),
        ([[2**70]], {}, "prompt 0 must hold integer token ids, got object"),
        ("text", {}, "prompts must be a list of lists of token ids, got str"),
        (3, {}, "prompts must be a list of lists of token ids, got int"),
        ([[1]], {"request_ids": [1, 2]}, "request_ids must have one id for each of 1 prompts"),
        ([[1]], {"request_ids": 3}, "request_ids must have one id for each of 1 prompts, got 3"),
        (
            [[1], [1]],
            {"request_ids": [0, 2**32]},
            r"integers in \[0, 4294967296\), got 4294967296 for prompt 1",
        ),
        ([[1], [1]], {"request_ids": [0, 2**64]}, "got 18446744073709551616 for prompt 1"),
        ([[1], [1]], {"request_ids": [0.2, 0.7]}, "request_ids must be integers in .*, got 0.2 for prompt 0"),
        ([[1], [1]], {"request_ids": np.array([0.0, 1.0])}, "got 0.0 for prompt 0"),
        ([[1], [1]], {"request_ids": ["a", "b"]}, "got 'a' for prompt 0"),
        ([[1], [1]], {"request_ids": [False, True]}, "got False for prompt 0"),
        ([[1], [1]], {"request_ids": [0, -1]}, "got -1 for prompt 1"),
        (
            [[1], [1]],
            {"request_ids": [7, 7]},
            "prompts 0 and 1 have the id 7, and would be sampled with the same",
        ),
    ],
)
def test_bad_calls(small, prompts, options, message):
    with pytest.raises(ValueError, match=message) as error:
        generate(*small, prompts, **({"max_new_tokens": 4, "sampling": GREEDY} | options))
    assert "\n" not in str(error.value)


def test_an_id_outside_the_vocabulary_is_refused_or_seen(small):
    """Known ids give an error; traced ones NaN, negative ids too, which would count from the table's end."""
    config, params = small
    both, weights = model(*SEQ2SEQ["mixers"], encoder=SEQ2SEQ["encoder"])
    message = r"\Atoken id (-1|61|200) is outside 0..60, the model's vocabulary(\Z|\n-)"
    good = np.array([[3, 4]])
    state = DecodeState(init_state(config, 1, 4), jnp.array([2]), None)
    for wrong in (-1, 61, 200):
        ids = np.array([[3, wrong]])
        for call in (
            lambda ids: apply(config, params, ids),
            lambda ids: apply(config, params, jnp.asarray(ids)),
            lambda ids: jax.jit(lambda params: apply(config, params, ids).logits)(params),  # a constant
            lambda ids: prefill(config, params, ids, capacity=4),
            lambda ids: decode_step(config, params, state, ids[:, 1]),
            lambda ids: encode(both, weights, ids),
        ):
            with pytest.raises(ValueError, match=message):
                call(ids)
    empty = Context(positions_BT=np.array([[0, -1]]))  # such a slot may hold any id
    jax.eval_shape(lambda params: apply(config, params, np.array([[3, -1]]), ctx=empty), params)
    jax.eval_shape(
        lambda params: decode_step(config, params, state, np.array([-1]), np.array([False])), params
    )
    with pytest.raises(ValueError, match=r"tokens must hold at least one row and one token, got .1, 0."):
        prefill(config, params, good[:, :0], capacity=4)
    with pytest.raises(ValueError, match="dtype of cached keys and values must be floating point, got int32"):
        prefill(config, params, good, capacity=4, cache=CacheOptions(jnp.int32))

    rows = np.array([[1, 60, 2], [1, -1, 2], [1, 61, 2], [1, 100, 2], [1, -61, 2]])
    found = np.asarray(jax.jit(lambda ids: apply(config, params, ids).logits)(rows))
    assert np.isfinite(found[0]).all() and np.isnan(found[1:, 1:]).all()
    for dtype in (np.int8, np.int16, np.int32, np.uint8, np.uint32):  # also where 300 does not fit
        ids = rows.astype(dtype)
        seen = np.asarray(jax.jit(functools.partial(language_model._checked_ids, vocab_size=300))(ids))
        assert_array_equal(seen, np.where(ids.astype(int) < 0, 300, ids.astype(int)).astype(seen.dtype))


@pytest.mark.parametrize(
    "arguments",
    [
        {"temperature": -1}, {"temperature": math.nan}, {"temperature": "0.8"}, {"temperature": True},
        {"temperature": 1e-40}, {"temperature": 9e37}, {"top_k": 0}, {"top_k": 2.5}, {"top_k": True},
        {"top_p": 0.0}, {"top_p": math.nan}, {"top_p": True}, {"min_p": 1.5}, {"min_p": [0.1]},
    ],
)  # fmt: skip
def test_bad_sampling(arguments):
    with pytest.raises(ValueError, match=r"\A(temperature|top_k|top_p|min_p) [^\n]+\Z"):
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
