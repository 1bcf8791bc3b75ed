"""Options of single requests in a batch: limits, stops, seeds, samples, states, hooks; what is refused."""

import dataclasses
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from attention_jax.caches import CacheOptions
from attention_jax.generation import DecodeState, Sampling, generate, loop, prefill, score, stream
from attention_jax.mixers import AttentionConfig, LinearAttentionConfig
from attention_jax.model import ModelConfig
from attention_jax.positions import RoPE
from attention_jax.tokenizers import CharTokenizer
from tests.params import random_params

GREEDY = Sampling(0)
KEY = jax.random.key(5)
LETTERS = CharTokenizer(map(chr, range(48, 109)))  # one character for each of 61 ids
MIXERS = (AttentionConfig(num_heads=2, rope=RoPE()), LinearAttentionConfig(num_heads=2))


@pytest.fixture(scope="module")
def small():
    config = ModelConfig(vocab_size=61, d_model=32, num_layers=2, mixers=MIXERS, init_std=0.3)
    return config, random_params(config)


def tokens(*args, **options):
    return [c.tokens.tolist() for c in generate(*args, **options)]


def test_requests_of_all_options_are_what_each_is_alone(small):
    """Beside samples of another prompt: tokens, text, log-probabilities and reasons."""
    samplings = [
        GREEDY,
        Sampling(0.9, seed=3, top_k=8, repetition_penalty=1.3, logprobs=2),
        Sampling(1.1, n=2, frequency_penalty=0.4, max_tokens=5),
        Sampling(0.7, min_p=0.05, logit_bias={7: 4.0, 9: -np.inf}, min_tokens=4, stop_ids=(7,)),
        Sampling(1.0, top_p=0.9, stop=("0", "1", "2", "3", "4")),
    ]
    prompts = [[1, 2], [3], [9] * 70, [4, 5, 6], [7]]
    common = {"max_new_tokens": 20, "key": KEY, "tokenizer": LETTERS, "capacity": 128}
    together = generate(*small, prompts, sampling=samplings, **common)
    assert [(c.request, c.sample) for c in together] == [(0, 0), (1, 0), (2, 0), (2, 1), (3, 0), (4, 0)]
    for i in (1, 2, 3, 4):
        # As many rows as above, for which the loop is compiled.
        greedy = dataclasses.replace(GREEDY, n=6 - samplings[i].n)
        pair = {"sampling": [samplings[i], greedy], "request_ids": [i, 0]}
        for alone in generate(*small, [prompts[i], prompts[0]], **pair, **common):
            wanted = together[0 if alone.request else i + (i > 2) + alone.sample]
            assert_array_equal(alone.tokens, wanted.tokens)
            assert (alone.text, alone.stop, alone.finish_reason) == (
                wanted.text, wanted.stop, wanted.finish_reason,
            )  # fmt: skip
    first, second = together[2:4]
    assert len(first.tokens) == len(second.tokens) == 5 and first.finish_reason == "length"
    assert first.tokens.tolist() != second.tokens.tolist()
    assert together[4].stop == 7 and len(together[4].tokens) >= 4 and 9 not in together[4].tokens
    assert together[5].finish_reason == "stop" and together[5].text == LETTERS.decode(together[5].tokens)[:-1]
    reported = together[1]
    [wanted] = score(*small, [[3, *reported.tokens]])
    assert_allclose(reported.logprobs, wanted, atol=2e-5)
    assert reported.top_ids.shape == reported.top_logprobs.shape == (20, 2)
    assert (reported.top_logprobs[:, 0] >= reported.logprobs).all() and together[0].logprobs is None


def test_a_seed_determines_a_request_alone(small):
    sampling = Sampling(1.0, seed=11)
    options = {"max_new_tokens": 8, "capacity": 128}
    first = tokens(*small, [[1], [1]], sampling=[sampling, sampling], **options)
    again = tokens(*small, [[1], [1]], sampling=[Sampling(1.0), sampling], key=KEY, **options)
    assert first[0] == first[1] == again[1] != again[0]
    legacy = tokens(*small, [[1], [1]], key=jax.random.PRNGKey(5), **options)
    assert legacy == tokens(*small, [[1], [1]], key=KEY, **options)


def test_streamed_text_is_that_of_the_completion(small):
    """With a stop string that is not in any one chunk, and what would have become one."""
    free = tokens(*small, [[1, 2], [3]], sampling=GREEDY, max_new_tokens=20, capacity=128)[0]
    text = LETTERS.decode(free)
    sampling = dataclasses.replace(GREEDY, stop=(text[6:11], text[3:6] + "~"))
    options = {"sampling": [sampling, GREEDY], "max_new_tokens": 20, "tokenizer": LETTERS, "capacity": 128}
    done = generate(*small, [[1, 2], [3]], **options)
    end = text.find(text[6:11]) + 5
    assert (done[0].text, done[0].stop) == (text[: end - 5], text[6:11])
    assert done[0].tokens.tolist() == free[:end] and done[1].finish_reason == "length"
    parts = list(stream(*small, [[1, 2], [3]], chunk=2, **options))
    for row in (0, 1):
        assert "".join(p[row].text for p in parts) == done[row].text
        assert_array_equal(np.concatenate([p[row].tokens for p in parts]), done[row].tokens)
        assert parts[-1][row].finish_reason == done[row].finish_reason
    assert len(parts) == 10 and [len(p[0].tokens) for p in parts][-1] == 0


def even_only(tokens_BC, logits_BV):
    """No odd ids, and none that is in the row already."""
    rows_B1 = jnp.arange(len(logits_BV))[:, None]
    V = logits_BV.shape[1]
    ids_BC = jnp.where(tokens_BC < 0, V, tokens_BC)  # -1 would be the last id
    used_BV = jnp.zeros(logits_BV.shape, bool).at[rows_B1, ids_BC].set(True, mode="drop")
    return jnp.where(used_BV | (jnp.arange(V) % 2 == 1), -jnp.inf, logits_BV)


def test_logits_fn_sees_prompt_and_output(small):
    options = {"sampling": Sampling(1.0), "key": KEY, "capacity": 64}
    prompts = [[2, 4], list(range(0, 50, 2))]
    found, ended = generate(*small, prompts, logits_fn=even_only, max_new_tokens=28, **options)
    assert len({2, 4, *found.tokens.tolist()}) == 30 and not (found.tokens % 2).any()
    assert ended.finish_reason == "error" and len(ended.tokens) == 6 and "after logits_fn" in ended.error
    with pytest.raises(ValueError, match=r"logits_fn must return float32 \[1, 61\], got float32 \[61\]"):
        generate(*small, [[1]], max_new_tokens=2, sampling=GREEDY, logits_fn=lambda t, z: z[0])


def test_prompts_continue_a_state(small):
    """One state for several prompts, and one each: the tokens of whole prompts; the state does not change."""
    config, params = small
    shared = np.arange(3, 40)
    state = jax.jit(lambda p: prefill(config, p, shared[None], capacity=128))(params)
    before = jax.tree.map(np.asarray, state)
    rests = [[1, 2, 3], []]
    options = {"sampling": Sampling(0.9), "key": KEY, "max_new_tokens": 12}
    found = tokens(*small, rests, state=state, **options)
    assert found == tokens(*small, [[*shared, *rest] for rest in rests], capacity=128, **options)
    jax.tree.map(assert_array_equal, state, before)
    assert found == tokens(*small, rests, state=state.fork(np.array([0, 0])), **options)
    # Exactly at capacity: 37 + 3 + 88 = 128.
    exact, _ = generate(*small, rests, state=state, max_new_tokens=88, sampling=GREEDY)
    assert len(exact.tokens) == 88 and exact.error is None
    other = dataclasses.replace(config, mixers=MIXERS[:1])
    deleted = jax.tree.map(jnp.copy, state)
    deleted.logits_BV.delete()
    for given, model, more, message in (
        (
            state,
            config,
            {"max_new_tokens": 89},
            "request 0: a prompt of 40 tokens and 89 new ones exceed the",
        ),
        (state, other, {}, "layer 1 is a LinearState, not a KVCache"),
        (state, dataclasses.replace(config, num_layers=3), {}, "2 layers or stacks, and the model 3"),
        (
            state,
            config,
            {"cache": CacheOptions("bfloat16")},
            "layer 0 has keys_BKSH float32 .*, not bfloat16",
        ),
        (
            state,
            dataclasses.replace(config, vocab_size=60),
            {},
            r"shape \(1, 61\), and one of this model has",
        ),
        (state.fork(np.array([0, 0])), config, {}, "the state has 2 rows for 1 prompts"),
        (deleted, config, {}, "donated"),
        ({}, config, {}, "must be a DecodeState"),
        (state, config, {"capacity": 64}, "capacity 64 is not that of the state, 128"),
    ):
        arguments = {"max_new_tokens": 4, "sampling": GREEDY, "state": given} | more
        with pytest.raises(ValueError, match=message) as error:
            generate(model, params, rests[:1], **arguments)
        assert "\n" not in str(error.value) and len(str(error.value)) < 200


@pytest.mark.parametrize("requests", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_requests_of_mixed_options_compile_once_per_length_bucket(small, requests, caplog):
    """Two at a time, of random lengths and options: one decoding program per capacity."""
    rng, started, advanced = np.random.default_rng(0), set(), set()
    for program in (loop._start, loop._advance):  # those of other tests
        program.clear_cache()
    seen_start, seen_advance = loop._start._cache_size(), loop._advance._cache_size()
    caplog.set_level(logging.INFO, "attention_jax.generation")
    for _ in range(requests // 2):
        samplings = [
            Sampling(
                temperature=float(rng.choice([0, 0.7, 1.3])),
                top_k=rng.choice([None, 5]),
                top_p=rng.choice([None, 0.9]),
                repetition_penalty=float(rng.choice([1, 1.2])),
                logit_bias=dict.fromkeys(rng.integers(0, 61, rng.integers(0, 9)).tolist(), 1.0),
                stop_ids=tuple(rng.integers(0, 61, rng.integers(0, 4)).tolist()),
                min_tokens=int(rng.integers(0, 3)),
                logprobs=rng.choice([None, 3]),
                seed=int(rng.integers(9)),
            )
            for _ in range(2)
        ]
        prompts = [rng.integers(0, 61, rng.integers(1, 90)) for _ in range(2)]
        new = int(rng.integers(3, 30))
        generate(*small, prompts, max_new_tokens=new, sampling=samplings)
        longest = max(map(len, prompts))
        capacity = -(-(longest + new) // 64) * 64
        started.add((-(-longest // 64), capacity))
        advanced.add(capacity)
        if requests == 60:  # as soon as one program too many is made
            assert loop._advance._cache_size() - seen_advance <= len(advanced)
    new = loop._start._cache_size() - seen_start, loop._advance._cache_size() - seen_advance
    assert 1 <= new[0] <= len(started) and 1 <= new[1] <= len(advanced) == 2
    # The time of each is told.
    told = [record.getMessage() for record in caplog.records]
    what = "decoding for batch 2, capacity 64", "prefill for batch 2, capacity 128, pieces of 128 tokens"
    assert len(told) == sum(new) and sum(line.startswith("compiled decoding for") for line in told) == new[1]
    assert all(any(re.fullmatch(rf"compiled {text} in [0-9.]+ s", line) for line in told) for text in what)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling": "greedy"}, "sampling must be a Sampling, or one for each prompt, got 'greedy'"),
        ({"sampling": [GREEDY]}, "1 samplings for 2 prompts"),
        ({"sampling": [GREEDY, None]}, "request 1: sampling must be a Sampling, got None"),
        ({"sampling": [GREEDY, Sampling()]}, "request 1: sampling at temperature 1.0 needs a key"),
        (
            {"sampling": [GREEDY, Sampling(0, stop_ids=(61,))]},
            "request 1: stop_ids has the id 61, outside 0..60",
        ),
        (
            {"sampling": [GREEDY, Sampling(0, logit_bias={-1: 1})]},
            "request 1: logit_bias has the id -1, outside",
        ),
        (
            {"sampling": [GREEDY, Sampling(0, stop=("x",))]},
            "request 1: the stop string 'x' needs a tokenizer",
        ),
        ({"sampling": [GREEDY, Sampling(0, min_tokens=5)]}, "request 1: min_tokens 5 is larger than the 4"),
        ({"max_new_tokens": None}, "request 0 has no limit: give max_new_tokens, or its max_tokens"),
        ({"tokenizer": 3}, r"tokenizer must have a method decode\(ids\), got int"),
        ({"logits_fn": 3}, "logits_fn must be a function of tokens_BC and logits_BV, got 3"),
        ({"cache": "int8"}, r"cache must be a? ?CacheOptions.*, got 'int8'"),
        ({"key": np.zeros(3, np.uint32)}, r"key must be one PRNG key such as .*, got uint32 \[3\]"),
        (  # sums of int8 overflow
            {"max_new_tokens": np.int8(126), "capacity": np.int8(127)},
            "request 0: a prompt of 2 tokens and 126 new ones exceed the capacity 127",
        ),
        (
            {"sampling": Sampling(0, max_tokens=np.int8(126)), "capacity": 127},
            "request 0: a prompt of 2 tokens and 126 new ones exceed the capacity 127",
        ),
        ({"prefill_chunk": 0}, "prefill_chunk must be an integer >= 1 or None, got 0"),
        ({"prefill_chunk": 2.0}, "prefill_chunk must be an integer >= 1 or None, got 2.0"),
        (
            {"capacity": 6},
            "request 1: a prompt of 3 tokens and 4 new ones exceed the capacity 6: at most 3 new",
        ),
    ],
)
def test_bad_requests_are_named(small, options, message):
    with pytest.raises(ValueError, match=message) as error:
        generate(*small, [[1, 2], [1, 2, 3]], **({"max_new_tokens": 4, "sampling": GREEDY} | options))
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


def test_a_decode_state_knows_its_capacity(small):
    config, params = small
    made = jax.eval_shape(lambda p: prefill(config, p, np.array([[1]]), capacity=40), params)
    assert made.capacity == 40
    assert DecodeState(made.caches[1:], made.positions_B, made.logits_BV).capacity is None
