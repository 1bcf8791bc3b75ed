"""Speculative decoding: the tokens of plain decoding for every state, lookup, the model's distribution."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from attention_jax.caches import CacheOptions
from attention_jax.generation import DraftModel, NGram, Sampling, generate, prefill
from attention_jax.generation.drafts import lookup
from attention_jax.mixers import AttentionConfig, CrossAttentionConfig, make_config, mixer_kinds
from attention_jax.model import EncoderConfig, ModelConfig, apply
from attention_jax.positions import RoPE
from tests import marks
from tests.marks import Row
from tests.params import random_params

PROMPTS = [np.arange(19) % 5, np.array([7, 3, 7, 3, 7, 3]), np.arange(9)]
# One greedy, one with filters, one with penalties and log-probabilities.
MIXED = [
    Sampling(temperature=0),
    Sampling(temperature=0.4, top_k=5),
    Sampling(temperature=0.7, repetition_penalty=1.2, presence_penalty=0.1, logprobs=2),
]
OPTIONS = {"max_new_tokens": 70, "capacity": 96, "sampling": MIXED, "key": jax.random.key(1)}
WINDOW = AttentionConfig(num_heads=2, mask="SlidingWindow(12) | Sinks(2)", rope=RoPE())
DELTA = make_config("gated_deltanet", num_heads=2, convolution=3)
NSA = {"compress_block": 4, "compress_stride": 2, "select_block": 4, "select_count": 3, "window": 8}
MODELS = {
    "window-delta": Row((WINDOW, DELTA)),
} | {
    kind: Row((make_config(kind, **NSA if kind == "nsa" else {}),), slow=True)
    for kind, config in mixer_kinds().items()
    if config.direction != "bidirectional" and not config.reads_memory
}  # fmt: skip


def model(*mixers, vocab_size=31, seed=0, num_layers=2, **options):
    config = ModelConfig(
        vocab_size=vocab_size,
        d_model=32,
        num_layers=num_layers,
        mixers=mixers,
        init_std=0.3,
        **options,
    )
    return config, random_params(config, seed=seed)


def speculators(config, params):
    return NGram(num_tokens=5, shortest=1), DraftModel(config, random_params(config, seed=3), num_tokens=3)


@pytest.mark.parametrize("by", ["lookup", pytest.param("model", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", marks.params(MODELS))
def test_the_tokens_are_those_of_plain_decoding(name, by):
    """Three windows long, every row with other options and another number of accepted drafts."""
    config, params = model(*MODELS[name].value)
    plain = generate(config, params, PROMPTS, **OPTIONS)
    speculation = speculators(config, params)[by == "model"]
    found = generate(config, params, PROMPTS, speculation=speculation, **OPTIONS)
    for a, b in zip(plain, found, strict=True):
        assert_array_equal(a.tokens, b.tokens)
        assert a.finish_reason == b.finish_reason == "length" and a.drafts is None
        drafted, kept = b.drafts
        assert 0 <= kept <= drafted
    assert_allclose(found[2].logprobs, plain[2].logprobs, atol=2e-5)
    assert_array_equal(found[2].top_ids, plain[2].top_ids)


def test_a_draft_model_that_is_the_model_is_always_right(small):
    """Also sampled, with the same random numbers; it does not know the penalties of drafted tokens."""
    config, params = small
    found = generate(config, params, PROMPTS, speculation=DraftModel(config, params, 3), **OPTIONS)
    for drafted, kept in (c.drafts for c in found[:2]):
        assert drafted == kept >= 50


@pytest.fixture(scope="module")
def small():
    return model(WINDOW, DELTA)


def test_rows_end_where_they_end_in_plain_decoding(small):
    """At a stop id, which may be a draft, a stop string, or their most tokens."""

    class Letters:
        def decode(self, ids):
            return "".join(chr(97 + i) if i < 26 else "." for i in ids)

    config, params = small
    plain = generate(
        config, params, PROMPTS, max_new_tokens=40, capacity=96, sampling=Sampling(0), tokenizer=Letters()
    )
    stop_id, text = int(plain[0].tokens[20]), plain[1].text
    sampling = [
        Sampling(0, stop_ids=(stop_id,), min_tokens=3),
        Sampling(0, stop=(text[11:14],)),
        Sampling(0.8, max_tokens=13),
    ]
    options = OPTIONS | {"max_new_tokens": 40, "sampling": sampling, "tokenizer": Letters()}
    plain = generate(config, params, PROMPTS, **options)
    assert [c.finish_reason for c in plain] == ["stop", "stop", "length"]
    for speculation in speculators(config, params):
        found = generate(config, params, PROMPTS, speculation=speculation, **options)
        for a, b in zip(plain, found, strict=True):
            assert_array_equal(a.tokens, b.tokens)
            assert (a.text, a.finish_reason, a.stop) == (b.text, b.finish_reason, b.stop)


def test_sampled_tokens_have_the_distribution_of_the_model():
    """Chi-square over all triples of 7 tokens, 4,000 samples of a prompt; the draft is another model."""
    config, params = model(AttentionConfig(num_heads=2, rope=RoPE()), vocab_size=7, seed=1, num_layers=1)
    draft = DraftModel(config, random_params(config, seed=2), num_tokens=2)
    prompt, n, temperature = np.array([1, 5, 2]), 4000, 1.5
    found = generate(
        config, params, [prompt], max_new_tokens=3, sampling=Sampling(temperature, n=n),
        key=jax.random.key(5), speculation=draft,
    )  # fmt: skip
    assert 0.1 < sum(c.drafts[1] for c in found) / sum(c.drafts[0] for c in found) < 0.9
    triples = np.array(list(itertools.product(range(7), repeat=3)))
    rows = np.concatenate([np.tile(prompt, (343, 1)), triples], axis=1)
    logits = (
        np.asarray(jax.jit(lambda t: apply(config, params, t).logits)(rows), np.float64)[:, 2:5] / temperature
    )
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = n * np.exp(np.take_along_axis(log_p, triples[..., None], -1).sum((1, 2)))
    counts = np.bincount([c.tokens @ [49, 7, 1] for c in found], minlength=343)
    common = expected > 5
    pairs = [(counts[common], expected[common]), (counts[~common].sum(), expected[~common].sum())]
    chi2 = sum(((c - e) ** 2 / e).sum() for c, e in pairs)
    # Mean `common.sum()`, variance twice that: 5 standard deviations.
    assert chi2 < common.sum() + 5 * np.sqrt(2 * common.sum()), chi2


def reference_lookup(tokens, count, longest, shortest):
    """The definition, one suffix length after another."""
    for n in range(min(longest, len(tokens) - 1), shortest - 1, -1):
        for end in range(len(tokens) - 2, n - 2, -1):
            if list(tokens[end - n + 1 : end + 1]) == list(tokens[-n:]):
                follows = list(tokens[end + 1 :])
                return [follows[i % len(follows)] for i in range(count)]
    return None


def test_lookup_is_its_definition():
    rng, C = np.random.default_rng(0), 40
    texts = [rng.integers(0, 3, rng.integers(1, C + 1)) for _ in range(60)] + [
        np.arange(C),
        np.tile([4, 5], 20),
    ]
    tokens = np.full((len(texts), C), -1, np.int32)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text
        tokens[row, len(text) :] = rng.integers(-1, 3, C - len(text))  # what is behind the text is ignored
    lengths = np.array(list(map(len, texts)))
    drafts, found = jax.jit(lambda t, n: lookup(t, n, count=6, longest=4, shortest=2))(tokens, lengths)
    expected = [reference_lookup(text, 6, 4, 2) for text in texts]
    assert_array_equal(found, [e is not None for e in expected])
    for row in np.flatnonzero(found):
        assert_array_equal(drafts[row], expected[row])


def test_a_row_without_success_proposes_less_and_less():
    proposer = NGram(num_tokens=2)
    own = proposer.start([], np.arange(3), 8, 4)
    pauses = []
    for _ in range(8):
        count, kept = jnp.array([2, 2, 0]), jnp.array([0, 1, 0])
        own = proposer.settle(own, jnp.ones(3, bool), count, kept)
        pauses.append(own[:, 1].tolist())
    assert [row[0] for row in pauses] == [1, 2, 4, 8, 16, 32, 32, 32]
    assert all(row[1:] == [0, 0] for row in pauses)
    assert proposer.settle(own, jnp.ones(3, bool), count, jnp.array([1, 1, 0]))[0].tolist() == [0, 32]


@pytest.mark.slow
def test_with_a_source():
    mixers = (AttentionConfig(num_heads=2, rope=RoPE()), CrossAttentionConfig(num_heads=2))
    config, params = model(*mixers, encoder=EncoderConfig(num_layers=1))
    options = {"sources": [np.arange(9), np.arange(5)], "max_new_tokens": 30, "sampling": Sampling(0)}
    plain, found = (
        generate(config, params, [[1], [2, 3]], speculation=s, **options)
        for s in (None, NGram(3, shortest=1))
    )
    for a, b in zip(plain, found, strict=True):
        assert_array_equal(a.tokens, b.tokens)


def test_from_a_state(small):
    """The tokens are those of one prompt in plain decoding, whose programs other tests compile."""
    config, params = small
    cache, before = CacheOptions(spare=5), np.arange(9)
    read = jax.jit(prefill, static_argnums=0, static_argnames=("capacity", "cache"))
    state = read(config, params, np.stack([before] * 3), capacity=96, cache=cache)
    options = {"max_new_tokens": 30, "sampling": Sampling(0), "state": state, "cache": cache}
    prompts = [np.concatenate([before, prompt]) for prompt in PROMPTS]
    again = OPTIONS | {"max_new_tokens": 30, "sampling": Sampling(0), "prefill_chunk": 19}
    plain = generate(config, params, prompts, **again)
    found = generate(config, params, PROMPTS, speculation=NGram(5, shortest=1), **options)
    for a, b in zip(plain, found, strict=True):
        assert_array_equal(a.tokens, b.tokens)
    with pytest.raises(
        ValueError, match=r"the state can take back 5 tokens and 6 are drafted: .*\(spare=6\)"
    ):
        generate(config, params, PROMPTS, speculation=NGram(6), **options)
    with pytest.raises(ValueError, match="a draft model has not read the tokens of state: pass state=None"):
        generate(config, params, PROMPTS, speculation=DraftModel(config, params, 2), **options)


def test_errors(small):
    config, params = small
    for options, message in {
        (("num_tokens", 0),): r"num_tokens must be an integer in \[1, 64\], got 0",
        (("num_tokens", 2.0),): r"num_tokens must be an integer in \[1, 64\], got 2.0",
        (("longest", 257),): r"longest must be an integer in \[1, 256\], got 257",
        (("longest", 2), ("shortest", 3)): "shortest 3 must be <= longest 2",
    }.items():
        with pytest.raises(ValueError, match=message):
            NGram(**dict(options))
    other, other_params = model(AttentionConfig(num_heads=2), vocab_size=30)
    for speculation, message in (
        ("ngram", "speculation must be an NGram, a DraftModel or None, got 'ngram'"),
        (
            DraftModel(other, other_params),
            "draft model has 30 token ids and the model 31: .* same vocabulary",
        ),
        (DraftModel(config, {}), "parameter /?embed is missing"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(config, params, [[1]], max_new_tokens=2, sampling=Sampling(0), speculation=speculation)
    bidirectional = ModelConfig(vocab_size=31, d_model=32, num_layers=2, causal=False)
    with pytest.raises(ValueError, match="a draft model must be causal and without an encoder"):
        DraftModel(bidirectional, params)


def test_a_draft_model_of_the_same_limit_drafts_up_to_it():
    """Its drafts may not reach past its learned positions; a shorter draft model is refused by name."""
    config, params = model(AttentionConfig(num_heads=2), max_positions=24)
    options = {"max_new_tokens": 20, "sampling": Sampling(0)}
    prompts = [[1, 2, 3, 4], [5]]
    plain = generate(config, params, prompts, **options)
    found = generate(config, params, prompts, speculation=DraftModel(config, params, 3), **options)
    for a, b in zip(plain, found, strict=True):
        assert_array_equal(a.tokens, b.tokens)
    assert found[1].drafts[1] > 10
    short = DraftModel(*model(AttentionConfig(num_heads=2), max_positions=16), 3)
    with pytest.raises(ValueError, match="the draft model's max_positions 16 is below the capacity 24"):
        generate(config, params, prompts, speculation=short, **options)
