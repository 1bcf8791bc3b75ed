"""Recurrent states go back to what they were, bit for bit, over the rows of mixers with such a state."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_array_equal

from attention_jax.caches import CacheOptions
from attention_jax.mixers import Context
from attention_jax.model import ModelConfig, bind, init_state
from tests.harness import Harness
from tests.mixers import D_MODEL, MIXERS
from tests.params import random_params

B, SPARE = 3, 3
BLOCK, PROMPT = SPARE + 1, 9
RECURRENT = {name: row for name, row in MIXERS.items() if "recurrent" in row.impls}
# One row per kind of state: a convolution before either op, a running scale, two sums.
FAST = ("gated-deltanet", "mamba2", "performer", "linear-rope")

each_mixer = pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in RECURRENT]
)
rewind = jax.jit(lambda state, n_B: state.rewind(n_B))


@functools.cache
def harness_of(name: str) -> Harness:
    return Harness(RECURRENT[name].config, batch=B)


class Decoder:
    """A state beside the log of its calls, in which tokens that were taken back become slots without one."""

    def __init__(self, name: str):
        self.harness, self.rng = harness_of(name), np.random.default_rng(3)
        self.state, self.calls, self.count_B = self.empty(), [], np.zeros(B, int)

    def empty(self, spare: int = SPARE):
        mixer = nnx.merge(self.harness.graphdef, self.harness.params)
        return mixer.init_state(B, 24, cache=CacheOptions(spare=spare))

    def step(self, x_BTD, positions_BT, state):
        ctx = Context(positions_BT=jnp.asarray(positions_BT, jnp.int32))
        y_BTD, state = self.harness.call(self.harness.params, x_BTD, state, ctx)
        return np.asarray(y_BTD), state

    def append(self, valid_BT) -> None:
        """Append random tokens, NaN where there is none."""
        valid_BT = np.asarray(valid_BT, bool)
        positions_BT = np.where(valid_BT, self.count_B[:, None] + np.cumsum(valid_BT, 1) - 1, -1)
        x_BTD = self.rng.normal(size=(*valid_BT.shape, D_MODEL)).astype(np.float32)
        x_BTD = np.where(valid_BT[..., None], x_BTD, np.nan)
        y_BTD, self.state = self.step(x_BTD, positions_BT, self.state)
        self.count_B = self.count_B + valid_BT.sum(1)
        self.calls.append((x_BTD, positions_BT, y_BTD))

    def rewind(self, *n_B: int) -> None:
        self.state = rewind(self.state, np.array(n_B, np.int32))
        self.count_B = self.count_B - n_B
        for _, positions_BT, _ in self.calls:
            positions_BT[positions_BT >= self.count_B[:, None]] = -1

    def check(self) -> None:
        """The state and outputs equal those of the same calls without the tokens that were taken back."""
        twin = self.empty()
        for x_BTD, positions_BT, y_BTD in self.calls:
            if (positions_BT >= 0).any():
                expected_BTD, twin = self.step(x_BTD, positions_BT, twin)
                kept_BT = positions_BT >= 0
                assert_array_equal(y_BTD[kept_BT], expected_BTD[kept_BT])
        jax.tree.map(assert_array_equal, self.state.view(), twin.view())
        assert_array_equal(self.state.past.count_B, self.count_B)
        assert np.all(self.state.past.held_B <= twin.past.held_B)


def every(T: int) -> np.ndarray:
    return np.ones((B, T), bool)


def first(T: int, *counts: int) -> np.ndarray:
    """Rows whose first `counts` slots hold a token."""
    return np.arange(T) < np.array(counts)[:, None]


@each_mixer
def test_a_rewound_state_equals_one_that_never_saw_the_tokens(name):
    decoder = Decoder(name)
    decoder.append(first(PROMPT, 9, 5, 1)[:, ::-1])  # left-padded, longer than the block
    decoder.rewind(3, 0, 1)  # row 2: back to the beginning
    decoder.check()
    decoder.append(every(BLOCK))
    decoder.rewind(0, 3, 2)
    decoder.check()
    decoder.rewind(3, 0, 1)  # again, as far as states are left
    decoder.check()
    for valid in ((1, 1, 1), (1, 0, 1), (1, 1, 0)):
        decoder.append(np.array(valid)[:, None])
    decoder.rewind(3, 2, 1)  # across calls
    decoder.check()
    decoder.append(every(1))
    decoder.append(first(BLOCK, 2, 3, 0))
    decoder.rewind(2, 3, 1)  # the whole block, and a token before it
    decoder.check()
    decoder.append(every(BLOCK))
    decoder.append(every(PROMPT))
    decoder.check()


@each_mixer
def test_a_row_that_cannot_go_back_is_nan_and_the_others_are_not(name):
    decoder = Decoder(name)
    decoder.append(every(BLOCK))
    before = decoder.state
    after = rewind(before, np.array([0, 4, -1], np.int32))
    x_BTD = decoder.rng.normal(size=(B, 1, D_MODEL)).astype(np.float32)
    positions_BT = decoder.count_B[:, None]
    y_BTD, _ = decoder.step(x_BTD, positions_BT, after)
    assert_array_equal(np.isnan(y_BTD).all((1, 2)), [False, True, True])
    expected_BTD, _ = decoder.step(x_BTD, positions_BT, before)
    assert_array_equal(y_BTD[0], expected_BTD[0])
    assert_array_equal(after.past.held_B, [3, 0, 0])


def test_slots_without_a_token_change_no_past_state():
    decoder = Decoder("gated-deltanet")
    decoder.append(every(BLOCK))
    for T in (1, BLOCK, PROMPT):
        x_BTD, positions_BT = np.full((B, T, D_MODEL), np.nan, np.float32), np.full((B, T), -1)
        _, after = decoder.step(x_BTD, positions_BT, decoder.state)
        jax.tree.map(assert_array_equal, decoder.state, after)


def test_what_a_state_without_spare_accepts():
    """No further leaves, and a rewind of nothing alone."""
    decoder = Decoder("mamba2")
    plain, spare = decoder.empty(0), decoder.empty()
    assert plain.past is None and len(jax.tree.leaves(plain)) == 2
    assert spare.nbytes == plain.nbytes * (1 + SPARE) + 2 * 4 * B
    jax.tree.map(assert_array_equal, plain.rewind(np.zeros(B, int)), plain)
    rewound = rewind(plain, np.array([0, 1, -2]))
    assert_array_equal(np.isnan(rewound.matrix_BNHM).all((1, 2, 3)), [False, True, True])
    with pytest.raises(
        ValueError, match=r"rewind: row 1 takes back 2 tokens, but its state can take back 0; .* at most 0"
    ):
        plain.rewind(np.array([0, 2, 0]))


def test_a_concrete_number_that_does_not_fit_is_refused():
    decoder = Decoder("gated-deltanet")
    decoder.append(first(BLOCK, 4, 2, 1))
    for n_B, message in {
        (0, 0, 2): "rewind: row 2 takes back 2 tokens, but its state can take back 1; it keeps at most 3",
        (4, 0, 0): "rewind: row 0 takes back 4 tokens, but its state can take back 3",
        (0, -1, 0): "rewind: row 1 takes back -1 tokens",
        (0, 0): "rewind: n_B must be integers [3], got int64 [2]",
        (0.0, 0, 0): "rewind: n_B must be integers [3], got float64 [3]",
    }.items():
        with pytest.raises(ValueError, match=re.escape(message)) as raised:
            decoder.state.rewind(np.array(n_B))
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 200
    with pytest.raises(ValueError, match=r"got float32 \[3\]"):
        rewind(decoder.state, jnp.zeros(B))
    # After a gap in what was kept, states in front of it are out of reach.
    decoder.append(first(PROMPT, 9, 2, 0))
    assert_array_equal(decoder.state.past.held_B, [3, 0, 1])


def test_a_token_past_the_horizon_of_cosformer_is_taken_back_like_any_other():
    decoder = Decoder("cosformer")
    for position in (18, 19, 20):
        x_B1D = decoder.rng.normal(size=(B, 1, D_MODEL)).astype(np.float32)
        y_B1D, decoder.state = decoder.step(x_B1D, np.full((B, 1), position), decoder.state)
        if position == 18:
            expected = decoder.state
    assert np.isnan(y_B1D).all()
    jax.tree.map(assert_array_equal, decoder.state.rewind(np.full(B, 2)).view(), expected.view())


def test_stacked_states_of_layers_go_back_together():
    """A state with a layer axis in front goes back in all layers, and so do its forks."""
    mixers = (MIXERS["lightning"].config,)
    config = ModelConfig(vocab_size=11, d_model=16, num_layers=2, mixers=mixers)
    params = random_params(config)
    tokens_BT = np.random.default_rng(0).integers(0, 11, (B, BLOCK))

    @jax.jit
    def run(state, positions_BT):
        return bind(config, params).run(tokens_BT, state, ctx=Context(positions_BT))[:2]

    def stack(states):
        return jax.tree.map(lambda *layers: jnp.stack(layers), *states)

    def unstack(state):
        return [jax.tree.map(lambda x: x[layer], state) for layer in range(2)]  # noqa: B023 (used at once)

    n_B = np.array([0, 3, 1])
    kept_BT = np.where(np.arange(BLOCK) < (BLOCK - n_B)[:, None], np.arange(BLOCK), -1)
    empty = init_state(config, B, 24, cache=CacheOptions(spare=SPARE))
    taken_back = stack(run(empty, np.tile(np.arange(BLOCK), (B, 1)))[1])
    never_seen = stack(run(empty, kept_BT)[1])
    assert taken_back.matrix_BNHM.ndim == 5
    with pytest.raises(ValueError, match="row 1 takes back 4 tokens, but its state can take back 3"):
        taken_back.rewind(np.array([0, 4, 0]))
    forked, taken_back = taken_back.fork(np.array([1, 1])), rewind(taken_back, n_B)
    later_BT = np.arange(BLOCK) + (BLOCK - n_B)[:, None]
    for a, b in zip(
        *(jax.tree.leaves(run(unstack(s), later_BT)[0]) for s in (taken_back, never_seen)), strict=True
    ):
        assert_array_equal(a, b)
    jax.tree.map(assert_array_equal, taken_back.view(), never_seen.view())
    matrix_LBNHM = forked.rewind(np.array([3, 3])).matrix_BNHM
    for row in (0, 1):
        assert_array_equal(matrix_LBNHM[:, row], never_seen.matrix_BNHM[:, 1])


@pytest.mark.parametrize("length", [1, BLOCK])
def test_a_loop_over_steps_copies_no_ring(length):
    """In the compiled loop, rings are changed by updates in place alone."""
    decoder = Decoder("gated-deltanet")
    harness, x_BTD = decoder.harness, jnp.ones((B, length, D_MODEL))

    @functools.partial(jax.jit, donate_argnums=1)
    def loop(params, state, steps):
        def body(i, carry):
            x_BTD, state = carry
            ctx = Context(jnp.broadcast_to(i * length + jnp.arange(length), (B, length)))
            return harness.run(params, x_BTD, state, ctx)

        return jax.lax.fori_loop(0, steps, body, (x_BTD, state))

    text = loop.lower(harness.params, decoder.state, 5).compile().as_text()
    for ring in jax.tree.leaves(decoder.state.past.arrays):
        made = set(re.findall(rf"= f32\[{','.join(map(str, ring.shape))}\]\S* ([\w-]+)\(", text))
        assert made & {"dynamic-update-slice", "scatter"}
        assert made <= {"dynamic-update-slice", "scatter", "parameter", "get-tuple-element", "fusion"}, made
