"""Sampling: filters, penalties and biases against float64, the options that are refused."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from attention_jax.generation import Sampling, adjust, choose, sample
from attention_jax.generation.arrays import pack
from tests.reference.sampling import adjusted, distribution, nucleus

GREEDY = Sampling(temperature=0)


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
    row = pack([Sampling(**options)], len(logits))
    sorted_1V, order_1V = choose.keep(jnp.asarray(logits, jnp.float32)[None], row)
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
        row = pack([Sampling(top_p=top_p)], len(z))
        found = int(choose.nucleus(jnp.asarray(z)[None], row.top_p_B, row.rest_p_B).sum())
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


ROWS = (
    (Sampling(), [], [], 0),
    (Sampling(repetition_penalty=1.7), [0, 1], [2, 2], 2),
    (Sampling(presence_penalty=0.5, frequency_penalty=-0.25), [3, 3], [1, 4, 4, 4], 4),
    (Sampling(logit_bias={5: 2.5, 0: -math.inf}), [1], [], 0),
    (Sampling(min_tokens=3, stop_ids=(6, 1)), [1], [2, 2], 2),
    (Sampling(min_tokens=3, stop_ids=(6, 1)), [1], [2, 2, 2], 3),
    (Sampling(0.5, 3, 0.9, 0.1, 2.0, 1.0, 0.5, {1: -1.0}, 9, stop_ids=(0,)), [1, 2], [3, 1], 2),
)


def histories(V):
    prompt, counts = np.zeros((len(ROWS), V), bool), np.zeros((len(ROWS), V), np.int32)
    for i, (_, before, output, _) in enumerate(ROWS):
        prompt[i, before] = True
        np.add.at(counts[i], output, 1)
    return prompt, counts, np.array([row[3] for row in ROWS], np.int32)


def test_penalties_biases_and_bans_are_those_of_float64():
    """And a row that asks for none keeps its bits beside others that do."""
    z = np.random.default_rng(0).normal(size=(len(ROWS), 8)).astype(np.float32) * 3
    found = np.asarray(jax.jit(adjust)(z, pack([row[0] for row in ROWS], 8), *histories(8)))
    for i, (s, prompt, output, generated) in enumerate(ROWS):
        wanted = adjusted(
            z[i], prompt, output, s.repetition_penalty, s.presence_penalty, s.frequency_penalty, s.logit_bias,
            s.stop_ids if generated < s.min_tokens else (),
        )  # fmt: skip
        np.testing.assert_allclose(found[i], wanted, rtol=1e-6, err_msg=str(s))
    assert_array_equal(found[0], z[0])
    untouched = [Sampling()] * len(ROWS)
    assert_array_equal(jax.jit(adjust)(z, pack(untouched, 8), *histories(8)), z)


def test_the_neighbours_of_a_row_change_no_draw():
    rows = [GREEDY, Sampling(0.7), Sampling(1.0, top_k=3), Sampling(1.3, top_p=0.8), Sampling(min_p=0.2)]
    z = np.random.default_rng(1).normal(size=(5, 40)).astype(np.float32)
    keys = jax.random.split(jax.random.key(3), 5)
    beside = sample(z, pack(rows, 40), keys)
    for i, row in enumerate(rows):
        assert sample(z[i : i + 1], row, keys[i : i + 1])[0] == beside[i], row
    others = jax.random.split(jax.random.key(3, impl="rbg"), 5)
    beside = sample(z, Sampling(), others)
    assert all(sample(z[i : i + 1], Sampling(), others[i : i + 1])[0] == beside[i] for i in range(5))
    with pytest.raises(ValueError, match="sample applies temperature and filters alone"):
        sample(z, Sampling(presence_penalty=1.0), keys)


def test_sampled_counts_pass_a_chi_square_test():
    """Penalties, bias, temperature and all filters together, against the float64 distribution."""
    s, prompt, output, _ = ROWS[-1]
    z = np.array([3.0, 7.4, 2.0, 4.0, 0.9, 1.1, -1.0, 0.5], np.float32)
    left = adjusted(z, prompt, output, 2.0, 1.0, 0.5, s.logit_bias, s.stop_ids)
    p = distribution(left, s.temperature, s.top_k, s.top_p, s.min_p)
    prompt_BV, counts_BV, generated_B = (x[-1:] for x in histories(8))
    arrays = pack([s], 8)
    found = adjust(jnp.asarray(z)[None], arrays, prompt_BV, counts_BV, generated_B)
    keys = jax.random.split(jax.random.key(0), count := 4000)
    rows = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape[1:])), arrays)
    counts = np.bincount(np.asarray(sample(jnp.tile(found, (count, 1)), rows, keys)), minlength=8)
    kept = p > 0
    assert kept.sum() == 3 and (counts[~kept] == 0).all()
    # The 99.9 % quantile with 2 degrees of freedom.
    assert ((counts - count * p)[kept] ** 2 / (count * p[kept])).sum() < 13.8


def test_log_probabilities_are_those_of_float64():
    z = np.random.default_rng(2).normal(size=(3, 30)).astype(np.float32) * 5
    rows = pack([Sampling(logprobs=0), Sampling(), Sampling(logprobs=20)], 30)
    token, ids, top = map(np.asarray, choose.log_probabilities(jnp.asarray(z), jnp.array([4, 0, 29]), rows))
    z64 = z.astype(np.float64)
    wanted = z64 - np.log(np.exp(z64).sum(-1, keepdims=True))
    np.testing.assert_allclose(token, wanted[np.arange(3), [4, 0, 29]], rtol=1e-6, atol=1e-6)
    assert_array_equal(ids, np.argsort(-z, axis=-1, kind="stable")[:, :20])
    np.testing.assert_allclose(top, np.take_along_axis(wanted, ids, 1), rtol=1e-6, atol=1e-6)


BAD = [
    {"temperature": -1}, {"temperature": math.nan}, {"temperature": "0.8"}, {"temperature": True},
    {"temperature": 1e-40}, {"temperature": 9e37}, {"top_k": 0}, {"top_k": 2.5}, {"top_k": True},
    {"top_p": 0.0}, {"top_p": math.nan}, {"top_p": True}, {"min_p": 1.5}, {"min_p": [0.1]},
    {"repetition_penalty": 0}, {"repetition_penalty": math.inf}, {"presence_penalty": math.nan},
    {"frequency_penalty": "1"}, {"frequency_penalty": 101}, {"logit_bias": 3}, {"logit_bias": {"a": 1}},
    {"logit_bias": {1: math.nan}}, {"logit_bias": {1: math.inf}}, {"logit_bias": {1: 1e39}},
    {"logit_bias": [(1, 2.0), (1, 3.0)]}, {"min_tokens": -1}, {"min_tokens": 1.0}, {"max_tokens": 0},
    {"min_tokens": 5, "max_tokens": 4}, {"seed": -1}, {"seed": 2**32}, {"seed": "a"}, {"stop_ids": 3},
    {"stop_ids": "ab"}, {"stop_ids": (1.5,)}, {"stop": "end"}, {"stop": ("",)}, {"stop": (b"x",)},
    {"stop": ("x",) * 65}, {"stop": ("x" * 4097,)}, {"logprobs": -1}, {"logprobs": 21}, {"n": 0},
    {"n": True},
]  # fmt: skip


@pytest.mark.parametrize("arguments", BAD, ids=str)
def test_bad_sampling(arguments):
    name = next(iter(arguments))
    with pytest.raises(ValueError, match=rf"\A{name}[^\n]+\Z") as error:
        Sampling(**arguments)
    assert len(str(error.value)) < 200
