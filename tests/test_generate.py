"""Generation: cached = uncached, the same request anywhere gives the same tokens, filters, errors."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from attention_jax.caches import CacheOptions
from attention_jax.generation import DecodeState, Sampling, decode_step, extend, prefill, requests, stream
from attention_jax.generation import generate as generate_completions
from attention_jax.mixers import AttentionConfig, Context, CosformerConfig, CrossAttentionConfig
from attention_jax.model import EncoderConfig, ModelConfig, apply, encode, init_state, language_model
from attention_jax.positions import RoPE
from tests import marks
from tests.marks import Row
from tests.params import random_params

GREEDY = Sampling(temperature=0)


def generate(*args, **options):
    """The new tokens of each prompt."""
    done = generate_completions(*args, **options)
    assert [c.request for c in done] == list(range(len(args[2]))) and not any(c.error for c in done)
    return [c.tokens for c in done]


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
    # Tokens within the prefix would have to attend to those that come later.
    state, refused = prefill(config, params, prompt[None, :3], capacity=64), "row 0 of the state has 3 tokens"
    with pytest.raises(ValueError, match=refused):
        extend(config, params, state, prompt[None, 3:])
    with pytest.raises(ValueError, match=refused):
        generate(config, params, [prompt[3:]], state=state, max_new_tokens=1, sampling=GREEDY)


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


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_no_kind_of_key_makes_requests_depend_on_each_other(small, impl):
    """Under vmap, JAX draws the numbers of all keys of these kinds from the first one."""
    options = {"max_new_tokens": 8, "key": jax.random.key(4, impl=impl), "sampling": Sampling(2.0)}
    a, b = np.arange(5), np.arange(30, 50)
    together = generate(*small, [a, b], **options)
    assert_array_equal(generate(*small, [b], request_ids=[1], **options)[0], together[1])
    seeded = options | {"sampling": Sampling(2.0, seed=3)}
    plain = seeded | {"key": jax.random.key(0)}
    assert_array_equal(generate(*small, [a, b], **seeded)[1], generate(*small, [b], **plain)[0])


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
    for chunk, sizes in ((4, [4, 4, 4, 4, 4, 1]), (70, [21])):
        pieces = list(stream(*small, [[1, 2], [3]], chunk=chunk, **arguments))
        assert [len(p[0].tokens) for p in pieces] == sizes
        assert [p[1].finish_reason for p in pieces] == [None] * (len(sizes) - 1) + ["length"]
        for row in range(2):
            assert_array_equal(np.concatenate([p[row].tokens for p in pieces]), whole[row])


def test_eos_ends_a_row_and_leaves_the_others(small):
    free = generate(*small, [[1, 2], [3, 4, 5]], max_new_tokens=30, sampling=GREEDY)
    eos = int(free[0][7])
    first = int(np.flatnonzero(free[0] == eos)[0])
    stopped = generate(*small, [[1, 2], [3, 4, 5]], max_new_tokens=30, sampling=GREEDY, eos_id=eos)
    assert_array_equal(stopped[0], free[0][:first])
    hits = np.flatnonzero(free[1] == eos)
    assert_array_equal(stopped[1], free[1][: hits[0]] if len(hits) else free[1])


def test_capacity_is_checked_before_compiling(small, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("compiled")

    monkeypatch.setattr("attention_jax.generation.loop._start", never)
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


def test_logits_that_are_not_finite_end_their_request_alone(small):
    """An embedding that is NaN poisons the rows that read it, from the token on that does."""
    config, params = model(AttentionConfig(num_heads=4, rope=RoPE()), tie_embeddings=False)
    broken = params | {"embed": {"embedding": params["embed"]["embedding"].copy()}}
    broken["embed"]["embedding"][60] = np.nan
    for sampling in (GREEDY, Sampling(1.0)):
        arguments = {"max_new_tokens": 3, "sampling": sampling, "key": jax.random.key(0)}
        bad, good = generate_completions(
            config, broken, [[60], [1]], request_ids=[7, 3], logits_fn=never_60, **arguments
        )
        assert (bad.finish_reason, len(bad.tokens), good.finish_reason) == ("error", 0, "length")
        assert "NaN, inf or all -inf for request 7" in bad.error
        whole, _ = generate(config, params, [[1], [2]], request_ids=[3, 7], logits_fn=never_60, **arguments)
        assert_array_equal(good.tokens, whole)
    bad, _ = generate_completions(config, broken, [[60], [1]], max_new_tokens=3, sampling=GREEDY)
    assert bad.error == "the model's logits are NaN, inf or all -inf for request 0"


def never_60(tokens_BC, logits_BV):
    return logits_BV.at[:, 60].set(-jnp.inf)


def test_scan_layers_decode_too(small):
    config, params = small
    scanned = dataclasses.replace(config, scan_layers=True)
    arguments = {"max_new_tokens": 12, "sampling": GREEDY}
    expected = generate(config, params, [[9, 8]], **arguments)
    assert_array_equal(generate(scanned, params, [[9, 8]], **arguments), expected)
