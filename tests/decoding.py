"""Models that decode, by name, and cached decoding in few compiled programs, for tests/test_decoding.py.

found_RTV holds the logits of cached decoding by row and position, NaN where none were computed.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.caches import DEFAULT_CACHE, CacheOptions, KVCache
from attention_jax.generation import DecodeState, decode_step, prefill
from attention_jax.masks import Causal, Sinks, SlidingWindow
from attention_jax.mixers import AttentionConfig, Context, GatedDeltaNetConfig, MixerConfig
from attention_jax.model import EncoderConfig, ModelConfig, apply, encode, init_state
from attention_jax.positions import RoPE
from tests.mixers import CROSS, D_MODEL, MIXERS
from tests.params import random_params

VOCAB, ROWS, LENGTH, SOURCE = 61, 3, 40, 6
# Longer than the rings, as long as one, shorter than all but one; padded on the left to PROMPT.
LENGTHS, PROMPT = (11, 4, 7), 11
PIECE = 8
_TOLERANCE = 1e-5
_RING = (SlidingWindow(5) | Sinks(2)) & Causal()


@dataclasses.dataclass(frozen=True)
class Decodes:
    """Mixers that are tiled over a model's layers, and further options of the model."""

    mixers: tuple[MixerConfig, ...]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def config(self, length: int) -> ModelConfig:
        """The model for rows of `length` tokens; the table's horizon and chunks are for short rows."""
        usual = {"horizon": length} if length <= LENGTH else {"horizon": length, "chunk_size": None}
        mixers = tuple(
            dataclasses.replace(
                mixer,
                **{
                    field.name: usual[field.name]
                    for field in dataclasses.fields(mixer)
                    if field.name in usual
                },
            )
            for mixer in self.mixers
        )
        options = {"num_layers": max(2, len(mixers)), "mlp_width": 32, "tie_embeddings": False} | self.options
        # Logits of up to 10, and no tied embeddings, with which greedy tokens repeat the last one.
        return ModelConfig(vocab_size=VOCAB, d_model=D_MODEL, mixers=mixers, init_std=0.3, **options)


# Every row of the mixers' table, every kind that takes a mask in a ring with pins, an encoder's memory, a
# model with states of several kinds, and scanned layers, whose states are stacked.
DECODES = {name: Decodes((row.config,)) for name, row in MIXERS.items()}
DECODES |= {
    f"{name}-ring": Decodes((dataclasses.replace(row.config, mask=_RING),))
    for name, row in MIXERS.items()
    if row.config.takes_mask and name in ("gqa-rope", "gated", "forgetting", "differential", "mla")
}
DECODES |= {
    "cross": Decodes(
        (AttentionConfig(num_heads=4, rope=RoPE()), CROSS),
        {"encoder": EncoderConfig(num_layers=1, mixers=(AttentionConfig(num_heads=4, rope=RoPE()),))},
    ),
    "hybrid": Decodes(tuple(MIXERS[name].config for name in ("window-sinks", "mla", "gated-deltanet"))),
    "scanned": Decodes(
        (AttentionConfig(num_kv_heads=2, rope=RoPE(), mask=_RING), GatedDeltaNetConfig(chunk_size=8)),
        {"num_layers": 4, "scan_layers": True},
    ),
}


class Decoder:
    """A model with random parameters behind jitted functions that all tests of it share."""

    def __init__(self, decodes: Decodes, length: int = LENGTH, rows: int = ROWS):
        self.config = decodes.config(length)
        self.params = jax.tree.map(jnp.asarray, random_params(self.config))
        self.tokens_RT = np.random.default_rng(5).integers(0, VOCAB, (rows, length)).astype(np.int32)
        self.memory = self._memory(rows) if self.config.encoder else {}
        self._whole = jax.jit(
            lambda params, tokens, memory: apply(self.config, params, tokens, ctx=Context(**memory)).logits
        )
        self._prefill = jax.jit(
            functools.partial(prefill, self.config, capacity=length), static_argnames="cache"
        )
        self._step = jax.jit(functools.partial(decode_step, self.config))
        self._piece = jax.jit(
            lambda params, tokens, state, ctx: apply(self.config, params, tokens, state, ctx=ctx)[:2]
        )

    def _memory(self, rows: int) -> dict[str, Any]:
        source = np.random.default_rng(6).integers(0, VOCAB, (rows, SOURCE)).astype(np.int32)
        positions = np.where(np.arange(SOURCE) < SOURCE - np.arange(rows)[:, None], np.arange(SOURCE), -1)
        memory_BSD = jax.jit(functools.partial(encode, self.config))(self.params, source, positions)
        return {"memory_BSD": memory_BSD, "memory_positions_BS": jnp.asarray(positions)}

    def uncached(self, tokens_RT: np.ndarray, rows: Any = slice(None)) -> np.ndarray:
        """The logits of whole rows; rows: whose memories they read."""
        memory = {name: x[rows] for name, x in self.memory.items()}
        return np.asarray(self._whole(self.params, tokens_RT, memory))

    def rounding(self, tokens_RT: np.ndarray, rows: Any = slice(None)) -> np.ndarray:
        """float32 [R, T]: how far uncached logits move if half of the parameters are rounded once more."""
        expected_RTV, params, moved = self.uncached(tokens_RT, rows), self.params, []
        rng = np.random.default_rng(7)
        for _ in range(6):
            steps = jax.tree.map(lambda x: rng.choice([-1, 0, 1], x.shape), params)
            self.params = jax.tree.map(
                lambda x, n: np.asarray(x * (1 + n * 2.0**-24), np.float32), params, steps
            )
            moved.append(np.abs(self.uncached(tokens_RT, rows) - expected_RTV).max(-1))
        self.params = params
        return np.max(moved, axis=0)

    def prompted(self, lengths: Any, cache: CacheOptions = DEFAULT_CACHE) -> tuple[DecodeState, np.ndarray]:
        """The state after the first lengths[r] tokens of each row, padded on the left, and found_RTV."""
        width, found_RTV = max(lengths), self.nothing()
        slots_RP = np.arange(width) - width + np.array(lengths)[:, None]
        tokens_RP = np.take_along_axis(self.tokens_RT, np.maximum(slots_RP, 0), axis=1)
        state = self._prefill(self.params, tokens_RP, np.maximum(slots_RP, -1), cache=cache, **self.memory)
        for r, length in enumerate(lengths):
            found_RTV[r, length - 1] = state.logits_BV[r]
        return state, found_RTV

    def stepped(
        self, state: DecodeState, tokens_RT: np.ndarray, found_RTV: np.ndarray, ends_R: Any = LENGTH
    ) -> DecodeState:
        """The state after the tokens before ends_R[r] of each row, one at a time, noted in found_RTV."""
        while (active_R := (at_R := np.asarray(state.positions_B)) < ends_R).any():
            last = tokens_RT.shape[1] - 1
            token_R = np.take_along_axis(tokens_RT, np.minimum(at_R, last)[:, None], axis=1)[:, 0]
            state = self._step(self.params, state, token_R, active_R)
            found_RTV[active_R, at_R[active_R]] = np.asarray(state.logits_BV)[active_R]
        return state

    def in_pieces(self, counts: list[tuple[int, ...]]) -> np.ndarray:
        """found_RTV of rows that are fed counts[i][r] tokens at once, each piece padded to PIECE slots."""
        found_RTV, at_R = self.nothing(), np.zeros(ROWS, np.int32)
        state = init_state(self.config, ROWS, LENGTH)
        for i, count_R in enumerate(counts):
            # Empty slots stand before the tokens in one piece, behind them in the next.
            slots_RC = np.arange(PIECE) - (PIECE - np.array(count_R)[:, None]) * (i % 2)
            real_RC = (slots_RC >= 0) & (slots_RC < np.array(count_R)[:, None])
            positions_RC = np.where(real_RC, at_R[:, None] + slots_RC, -1)
            tokens_RC = np.take_along_axis(self.tokens_RT, np.maximum(positions_RC, 0), axis=1)
            ctx = Context(positions_BT=positions_RC, **(self.memory if i == 0 else {}))
            logits_RCV, state = self._piece(self.params, tokens_RC, state, ctx)
            rows, slots = np.nonzero(real_RC)
            found_RTV[rows, positions_RC[rows, slots]] = np.asarray(logits_RCV)[rows, slots]
            at_R += np.array(count_R)
        return found_RTV

    def greedy(self, lengths: Any, new: int) -> np.ndarray:
        """tokens_RT with `new` greedy tokens after the first lengths[r] of each row."""

        @jax.jit
        def run(params, state):
            def step(state, _):
                token_R = jnp.argmax(state.logits_BV, axis=-1).astype(jnp.int32)
                return decode_step(self.config, params, state, token_R), token_R

            return jax.lax.scan(step, state, length=new)[1]

        new_NR = np.asarray(run(self.params, self.prompted(lengths)[0]))
        tokens_RT = self.tokens_RT.copy()
        for r, length in enumerate(lengths):
            tokens_RT[r, length : length + new] = new_NR[:, r]
        return tokens_RT

    def nothing(self) -> np.ndarray:
        """found_RTV before the first token."""
        return np.full((*self.tokens_RT.shape, VOCAB), np.nan, np.float32)


def forked(state: DecodeState, rows: Any) -> DecodeState:
    """The state whose row i is a copy of row rows[i]."""
    rows = np.asarray(rows)
    caches = [cache.fork(rows) for cache in state.caches]
    return DecodeState(caches, state.positions_B[rows], state.logits_BV[rows])


def rings(caches: list) -> list[int]:
    """The lengths of the rings that wrap."""
    found = jax.tree.leaves(caches, is_leaf=lambda x: isinstance(x, KVCache))
    return [cache.ring for cache in found if isinstance(cache, KVCache) and cache.wraps]


def check(
    decoder: Decoder, found_RTV: np.ndarray, first_R: Any, tokens_RT: Any = None, rows: Any = slice(None)
) -> None:
    """Assert that row r has logits from position first_R[r] on, equal to the uncached ones of tokens_RT.

    An error of 1e-5, or of 1e-5 of the largest logit where that exceeds 1. More is allowed only where
    one more rounding of the parameters moves the same token's uncached logits as far.
    """
    tokens_RT = decoder.tokens_RT if tokens_RT is None else tokens_RT
    expected_RTV = decoder.uncached(tokens_RT, rows)
    largest = np.abs(expected_RTV).max()
    assert np.isfinite(largest) and 1 < largest < 20, largest
    for r, first in enumerate(first_R):
        error_T = np.abs(found_RTV[r, first:] - expected_RTV[r, first:]).max(-1)
        assert np.isfinite(error_T).all(), f"row {r}: no logits at {first + np.argmax(np.isnan(error_T))}"
        if (error_T > _TOLERANCE * largest).any():
            rounding_T = decoder.rounding(tokens_RT, rows)[r, first:]
            worst = np.argmax(error_T - np.maximum(_TOLERANCE * largest, rounding_T))
            assert error_T[worst] <= max(_TOLERANCE * largest, rounding_T[worst]), (
                f"row {r}, position {first + worst}: error {error_T[worst]:.3g}, largest logit "
                f"{largest:.3g}, moved by rounding {rounding_T[worst]:.3g}"
            )
