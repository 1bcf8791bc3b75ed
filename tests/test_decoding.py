"""Cached decoding gives the logits of the uncached forward, for every mechanism that has a state."""

import jax
import numpy as np
import pytest

from attention_jax.caches import CacheOptions, load, save
from attention_jax.generation import DecodeState
from attention_jax.model import fingerprint
from tests.decoding import DECODES, LENGTH, LENGTHS, PROMPT, ROWS, Decoder, check, forked, rings

# A ring with pins, latents, and a recurrence with a convolution in one model.
FAST = ("hybrid",)


def names(fast: tuple[str, ...]) -> list:
    """The names of all models, marked as slow but for those in `fast`."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in DECODES]


@pytest.fixture(scope="module", params=names(FAST))
def decoder(request):
    return Decoder(DECODES[request.param])


def test_a_ragged_batch(decoder):
    """Prompts of three lengths, then a token at a time until all rows are full, past every ring's wrap."""
    state, found = decoder.prompted(LENGTHS)
    assert all(4 * ring <= LENGTH for ring in rings(state.caches))
    decoder.stepped(state, decoder.tokens_RT, found)
    check(decoder, found, np.array(LENGTHS) - 1)


def test_a_prefill_in_pieces(decoder):
    """Of other sizes in every row, none in some, longer and shorter than rings, chunks and convolutions."""
    counts = [(8, 3, 5), (8, 0, 1), (1, 8, 8), (7, 2, 2), (8, 8, 0), (0, 8, 8), (8, 3, 8), (0, 8, 8)]
    assert np.sum(counts, axis=0).tolist() == [LENGTH] * ROWS
    check(decoder, decoder.in_pieces(counts), [0] * ROWS)


def test_after_a_fork(decoder):
    """Rows are permuted, dropped and copied after the rings have wrapped; copies continue differently."""
    rows, ends = np.array([2, 0, 2]), np.array(LENGTHS) + 13
    state, found = decoder.prompted(LENGTHS)
    state = decoder.stepped(state, decoder.tokens_RT, found, ends)
    first = ends[rows]
    known = np.arange(LENGTH) < first[:, None]
    other = np.random.default_rng(8).integers(0, decoder.config.vocab_size, (ROWS, LENGTH))
    tokens = np.where(known, decoder.tokens_RT[rows], other).astype(np.int32)
    found = decoder.nothing()
    decoder.stepped(forked(state, rows), tokens, found)
    check(decoder, found, first, tokens, rows)


# More than one token of a convolution's inputs, and rows that take back nothing.
SPARE, BACK = 5, (3, 0, 5)


def beside_and_back(decoder):
    """Two states after the same tokens: one has also seen BACK[r] others in each row and taken them back."""
    plain, _ = decoder.prompted(LENGTHS, cache=CacheOptions(spare=SPARE))
    plain = decoder.stepped(plain, decoder.tokens_RT, decoder.nothing(), np.array(LENGTHS) + 13)
    start_R, other = np.asarray(plain.positions_B), (decoder.tokens_RT + 1) % decoder.config.vocab_size
    back, ends = plain, start_R + np.array(BACK)
    back = decoder.stepped(back, other, decoder.nothing(), ends)
    assert (np.asarray(back.positions_B) == ends).all()
    return plain, DecodeState(
        [cache.rewind(np.array(BACK)) for cache in back.caches], plain.positions_B, plain.logits_BV
    )


@pytest.mark.parametrize("decoder", names(()), indirect=True)
def test_after_a_rewind(decoder):
    """Every later logit is that of a state that never saw the tokens, bit for bit."""
    plain, back = beside_and_back(decoder)
    first = np.asarray(plain.positions_B)
    expected, found = decoder.nothing(), decoder.nothing()
    decoder.stepped(plain, decoder.tokens_RT, expected)
    decoder.stepped(back, decoder.tokens_RT, found)
    np.testing.assert_array_equal(found, expected)
    check(decoder, found, first)


def test_after_saving_and_loading(decoder, tmp_path):
    """The loaded state has the same bits and goes on with the same programs."""
    state, found = decoder.prompted(LENGTHS)
    model = fingerprint(decoder.config, decoder.params)
    save(tmp_path / "state", state.caches, model=model)
    loaded = load(tmp_path / "state", model=model)
    assert jax.tree.structure(loaded) == jax.tree.structure(state.caches)
    jax.tree.map(np.testing.assert_array_equal, loaded, state.caches)
    decoder.stepped(DecodeState(loaded, state.positions_B, state.logits_BV), decoder.tokens_RT, found)
    check(decoder, found, np.array(LENGTHS) - 1)


@pytest.mark.parametrize("name", names(()))
def test_a_single_prompt(name):
    decoder = Decoder(DECODES[name], rows=1)
    state, found = decoder.prompted((PROMPT,))
    decoder.stepped(state, decoder.tokens_RT, found)
    check(decoder, found, [PROMPT - 1])


@pytest.mark.parametrize(("name", "new"), [
    *((name, 128) for name in FAST), *(pytest.param(name, 512, marks=pytest.mark.slow) for name in DECODES)
])  # fmt: skip
def test_greedy_tokens_are_the_uncached_ones(name, new):
    """The uncached forward reads the cached tokens, so that one near-tie does not end the comparison."""
    lengths = (7, 3)
    decoder = Decoder(DECODES[name], length=max(lengths) + new, rows=2)
    tokens_RT = decoder.greedy(lengths, new)
    logits_RTV = decoder.uncached(tokens_RT)
    seen = set()
    for r, length in enumerate(lengths):
        found_N, logits_NV = tokens_RT[r, length : length + new], logits_RTV[r, length - 1 :][:new]
        best_N2 = np.sort(logits_NV, axis=-1)[:, -2:]
        clear_N = best_N2[:, 1] - best_N2[:, 0] > 1e-4
        assert clear_N.mean() > 0.95
        np.testing.assert_array_equal(found_N[clear_N], logits_NV.argmax(-1)[clear_N])
        seen |= set(found_N.tolist())
    assert len(seen) > 3, seen
