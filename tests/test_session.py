"""`Session`: its turns are those of one long prompt, however they end, and nothing is read twice."""

import dataclasses

import jax
import numpy as np
import pytest

from attention_jax import AttentionConfig, ModelConfig, RoPE
from attention_jax.caches import CacheOptions, load, save
from attention_jax.generation import DraftModel, NGram, Sampling, Session, generate, loop
from attention_jax.masks import Causal, Prefix
from attention_jax.mixers import GatedDeltaNetConfig
from tests.params import random_params

GREEDY = Sampling(temperature=0)


class Letters:
    """A tokenizer with a character per id."""

    def decode(self, ids):
        return "".join(chr(65 + i) for i in ids)


def model(*mixers, **options):
    config = ModelConfig(
        vocab_size=29, d_model=16, num_layers=len(mixers), mixers=mixers, init_std=0.5, **options
    )
    params = random_params(config)
    return config, jax.device_put(params, jax.devices()[0])  # committed, as those of a checkpoint


FULL = model(AttentionConfig(num_heads=2, rope=RoPE()))
# A ring without spare slots, and a recurrent state: neither can go back.
MIXED = model(
    AttentionConfig(num_heads=2, rope=RoPE(), mask="SlidingWindow(5)"), GatedDeltaNetConfig(num_heads=2)
)
RING = model(AttentionConfig(num_heads=2, rope=RoPE(), mask="SlidingWindow(5)"))
MODELS = {"full": FULL, "mixed": MIXED}


@pytest.fixture
def read(monkeypatch):
    """The numbers of tokens that were read, call by call."""
    counts, start = [], loop.start

    def counting(config, params, prompts, **options):
        counts.extend(map(len, prompts))
        return start(config, params, prompts, **options)

    monkeypatch.setattr(loop, "start", counting)
    return counts


def said(session, tokens, count=12, **options):
    parts = session.say(tokens, max_new_tokens=count, **({"sampling": GREEDY} | options))
    return np.concatenate([part.tokens for part in parts]).tolist()


def expected(name, tokens, count=12, **options):
    [done] = generate(
        *MODELS[name], [tokens], max_new_tokens=count, capacity=64, **({"sampling": GREEDY} | options)
    )
    return done.tokens.tolist()


@pytest.mark.parametrize("name", MODELS)
def test_turns_are_those_of_one_prompt_and_read_nothing_again(read, name):
    session = Session(*MODELS[name], capacity=64, tokenizer=Letters())
    counts, programs = [], set()
    for turn in ([1, 2, 3], [4, 5], [6], []):
        whole = [*session.tokens.tolist(), *turn]
        found = said(session, turn)
        counts.append(read[-1])
        assert found == expected(name, whole)
        programs.add((loop._start._cache_size(), loop._advance._cache_size()))
    assert counts == [3, 2, 1, 0] and len(programs) == 1
    assert len(session.tokens) == session.state.positions_B[0] == 54
    assert said(session, [7], count=9) and len(session.tokens) == 64  # exactly the capacity
    with pytest.raises(ValueError, match="a prompt of 65 tokens and 1 new ones exceed the capacity 64"):
        session.say([8], max_new_tokens=1, sampling=GREEDY)
    assert len(session.tokens) == 64


@pytest.mark.parametrize("name", MODELS)
def test_a_turn_that_is_cut_leaves_exactly_its_tokens(read, name):
    session = Session(*MODELS[name], capacity=64, tokenizer=Letters())
    free = expected(name, [1, 2, 3])
    stop = Sampling(temperature=0, stop=(Letters().decode(free[3:5]),))
    cut = said(session, [1, 2, 3], sampling=stop, chunk=12)
    text = session.tokens.tolist()
    assert text == [1, 2, 3, *cut] and free[: len(cut)] == cut and len(cut) < 12
    del read[:]
    assert said(session, [9]) == expected(name, [*text, 9])
    # The last token again; or, of states that cannot go back, those of the turn.
    assert read[0] == (2 if name == "full" else len(text) + 1)

    parts = session.say([4], max_new_tokens=12, sampling=GREEDY, chunk=4)
    next(parts)
    text = session.tokens.tolist()
    session.rewind(2)  # within the turn
    assert list(parts) == [] and session.tokens.tolist() == text[:-2]
    state = session.state
    assert state.positions_B[0] == len(text) - 2
    again = Session(*MODELS[name], capacity=64)
    again.add(text[:-2])
    np.testing.assert_allclose(state.logits_BV, again.state.logits_BV, atol=1e-4)


def test_an_interruption_within_a_call_leaves_what_was_seen(monkeypatch):
    session = Session(*FULL, capacity=64)
    parts = session.say([1, 2], max_new_tokens=12, sampling=GREEDY, chunk=4)
    seen = next(parts).tokens.tolist()
    real = loop._advance

    def interrupted(*arguments):
        real(*arguments)  # the carry is donated, and its result is lost
        raise KeyboardInterrupt

    interrupted._cache_size = real._cache_size
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "_advance", interrupted)
        next(parts)
    assert session.tokens.tolist() == [1, 2, *seen]
    assert said(session, [3]) == expected("full", [1, 2, *seen, 3])


def test_rewind_fork_save_and_load(tmp_path):
    session = Session(*FULL, capacity=64)
    said(session, [1, 2, 3])
    other, text = session.fork(), session.tokens.tolist()
    for count in (5, 1, 0):
        session.rewind(count)
    assert other.tokens.tolist() == text and session.tokens.tolist() == text[:-6]
    assert said(session, []) == expected("full", text[:-6])
    session.rewind(len(session.tokens))
    assert said(session, [5]) == expected("full", [5])
    save(tmp_path / "state", {"state": other.state, "tokens": other.tokens}, model="m")
    loaded = Session(*FULL, capacity=64, **load(tmp_path / "state", model="m"))
    assert said(loaded, [7]) == said(other, [7]) == expected("full", [*text, 7])

    ring, fresh = (Session(*RING, capacity=64, cache=CacheOptions(spare=3)) for _ in range(2))
    said(ring, [1, 2, 3])
    text = ring.fork().tokens.tolist()
    ring.rewind(2)
    assert said(ring, [4]) == said(fresh, [*text[:-2], 4])
    ring.fork()  # ends the turn
    before = ring.tokens.tolist()
    with pytest.raises(ValueError, match="rewind"):
        ring.rewind(9)
    assert ring.tokens.tolist() == before


def test_penalties_and_lookup_know_the_whole_text():
    session, other = (Session(*FULL, capacity=64) for _ in range(2))
    penalised = Sampling(temperature=0, repetition_penalty=5.0)
    cycle = [1, 2, 3, 4, 5, 6, 7, 8] * 3
    said(session, cycle, count=1)
    text = session.tokens.tolist()
    assert said(session, [9], sampling=penalised) == expected("full", [*text, 9], sampling=penalised)

    def drafts(tokens):
        always = Sampling(temperature=0, logit_bias={5: 100.0})
        parts = other.say(tokens, max_new_tokens=2, sampling=always, speculation=NGram(2))
        return list(parts)[-1].drafts

    assert drafts(cycle[:4]) == (0, 0)
    other.add(cycle)
    assert drafts(cycle[:4])[0] == 1  # behind 3, 4, 5, which the turn itself has once


def test_what_is_refused():
    session, other = (Session(*FULL, capacity=64) for _ in range(2))
    other.add([1, 2])
    state = other.state
    for call, message in [
        (lambda: session.state, "the text has 0 tokens, and the model needs at least 1: say more"),
        (lambda: session.say([29], max_new_tokens=1, sampling=GREEDY), "token id 29 is outside"),
        (lambda: session.say([1], max_new_tokens=1, sampling=Sampling(0, n=2)), "with n=1"),
        (lambda: session.say([1], max_new_tokens=1, speculation=DraftModel(*FULL)), "a draft model"),
        (lambda: session.rewind(1), r"count must be in \[0, 0\], the tokens, got 1"),
        (lambda: Session(*FULL, capacity=64, tokens=[1]), "1 tokens without the state"),
        (lambda: Session(*FULL, capacity=0), "capacity must be an integer >= 1, got 0"),
        (
            lambda: Session(FULL[0], FULL[1], capacity=32, state=state, tokens=[1, 2]),
            "capacity 32 is not that",
        ),
        (lambda: Session(*FULL, capacity=64, state=state, tokens=[1]), "has read 2 tokens, and 1 are given"),
        (
            lambda: Session(*MIXED, capacity=64, state=state, tokens=[1, 2]),
            "1 layers or stacks, and the model 2",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    config, params = FULL
    limited = dataclasses.replace(config, max_positions=8)
    with pytest.raises(ValueError, match="capacity 9 exceeds the model's max_positions 8: lower it"):
        Session(limited, params, capacity=9)
    mixers = (dataclasses.replace(config.mixers[0], mask=Causal() | Prefix(4)),)
    prefix = dataclasses.replace(config, mixers=mixers)
    with pytest.raises(ValueError, match="has 2 tokens, and the model needs at least 4"):
        Session(prefix, params, capacity=16).say([1, 2], max_new_tokens=1, sampling=GREEDY)
