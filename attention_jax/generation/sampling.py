"""`Sampling`: how the tokens of one request are chosen, and when it ends."""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
from collections.abc import Mapping
from typing import Any

import numpy as np

# The smallest normal number of float32: a processor may round smaller ones to 0, such as the reciprocal of a
# larger temperature than its own.
_SMALLEST = float(np.finfo(np.float32).tiny)
_LARGEST = float(np.finfo(np.float32).max)
TOP_LOGPROBS = 20  # the largest `logprobs`: a program reports as many for every request that asks for any
_MOST_STOPS = 64
_MOST_STOP_CHARACTERS = 4096
_MOST_SAMPLES = 2**12
_SEEDS = 2**32


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the tokens of one request are chosen, and when it ends; the names are those of vLLM.

    The logits of the model pass through these steps, in this order:

    1. `repetition_penalty` r (arXiv 1909.05858) divides positive logits of ids in the prompt or the output by
       r and multiplies negative ones by it; `frequency_penalty` is subtracted once per occurrence in the
       output, `presence_penalty` once if there is any.
    2. `logit_bias` maps ids to numbers that are added; -inf bans an id. Ids that would end the request are
       banned until it has `min_tokens` tokens.
    3. `temperature` divides; 0 selects the largest logit (greedy).
    4. `top_k` keeps the k most probable tokens. `top_p` keeps the fewest most probable tokens with a total
       probability of at least p (arXiv 1904.09751); 1 keeps all. `min_p` keeps tokens of at least min_p
       times the largest probability (arXiv 2407.01082). Of equally probable tokens those of the smallest ids
       are kept.

    max_tokens: the most tokens; None is `max_new_tokens` of the call. min_tokens: no stop id and no stop
      string ends the request before it has as many.
    seed: an integer in [0, 2^32) that determines the random numbers of the request alone; None derives them
      from the key of the call and the request's id.
    stop_ids: ids that end the request, beside the call's `eos_id`. stop: strings that end it.
    logprobs: n in [0, 20] also reports the log-probability of each token and of the n most probable ones.
      They are those of the model: log-softmax of its logits, before step 1 and before `logits_fn`.
    n: the number of samples.

    Raises: ValueError for an option of another type or outside its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    max_tokens: int | None = None
    seed: int | None = None
    stop_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    n: int = 1

    def __post_init__(self):
        self._check_distribution()
        _check_integer("min_tokens", self.min_tokens, 0)
        _check_integer("max_tokens", self.max_tokens, 1, none=True)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens {self.min_tokens} is larger than max_tokens {self.max_tokens}: lower it"
            )
        _check_integer("seed", self.seed, 0, _SEEDS - 1, none=True)
        _check_integer("logprobs", self.logprobs, 0, TOP_LOGPROBS, none=True)
        _check_integer("n", self.n, 1, _MOST_SAMPLES)
        for name in ("top_k", "min_tokens", "max_tokens", "seed", "logprobs", "n"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, operator.index(value))  # sums of NumPy's integers may overflow
        # Tuples, so that the object is hashable.
        object.__setattr__(self, "logit_bias", _bias(self.logit_bias))
        object.__setattr__(self, "stop_ids", _stop_ids(self.stop_ids))
        object.__setattr__(self, "stop", _stop_strings(self.stop))

    def _check_distribution(self) -> None:
        temperature = _number("temperature", self.temperature)
        if not 0 <= temperature <= 1 / _SMALLEST:
            raise ValueError(f"temperature must be in [0, {1 / _SMALLEST:.3g}], got {self.temperature}")
        if 0 < temperature < _SMALLEST:
            raise ValueError(
                f"temperature {self.temperature} is below {_SMALLEST:.3g}, the smallest normal float32; 0 "
                "selects the largest logit"
            )
        if self.top_k is not None:
            if isinstance(self.top_k, bool) or not isinstance(self.top_k, numbers.Integral):
                raise ValueError(f"top_k must be an integer >= 1, got {self.top_k!r}")
            if self.top_k < 1:
                raise ValueError(f"top_k must be >= 1, got {self.top_k}")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < _number(name, value) <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {value}")
        if not 0.01 <= _number("repetition_penalty", self.repetition_penalty) <= 100:
            raise ValueError(f"repetition_penalty must be in [0.01, 100], got {self.repetition_penalty}")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            if not -100 <= _number(name, value) <= 100:
                raise ValueError(f"{name} must be in [-100, 100], got {value}")

    def filtered(self, vocab_size: int) -> bool:
        """Whether top-k, top-p or min-p is on."""
        top_k = self.top_k is not None and self.top_k < vocab_size
        return top_k or self.top_p not in (None, 1) or self.min_p is not None

    @property
    def penalised(self) -> bool:
        """Whether any penalty is on."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def is_integer(value: Any) -> bool:
    """True for an integer of any type but bool."""
    if isinstance(value, bool):
        return False
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def _number(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{name} must be a number, got {value!r}")
    return float(value)


def _check_integer(name: str, value: Any, low: int, high: int | None = None, *, none: bool = False) -> None:
    if none and value is None:
        return
    if not is_integer(value) or value < low or (high is not None and value > high):
        allowed = f">= {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{name} must be an integer {allowed}{' or None' if none else ''}, got {value!r}")


def _bias(bias: Any) -> tuple[tuple[int, float], ...]:
    try:
        rows = [(token, value) for token, value in (bias.items() if hasattr(bias, "items") else bias)]
    except (TypeError, ValueError):
        raise ValueError(f"logit_bias must map token ids to numbers, got {bias!r}") from None
    for token, value in rows:
        if not is_integer(token):
            raise ValueError(f"logit_bias must map token ids to numbers, got the id {token!r}")
        value = _number(f"logit_bias[{token}]", value)
        if math.isnan(value) or value > _LARGEST or -math.inf < value < -_LARGEST:
            raise ValueError(f"logit_bias[{token}] must be a finite float32, or -inf to ban it, got {value}")
    if len({int(token) for token, _ in rows}) < len(rows):
        raise ValueError("logit_bias names a token id twice: give each id one number")
    return tuple((int(token), float(value)) for token, value in rows)


def _stop_ids(ids: Any) -> tuple[int, ...]:
    if isinstance(ids, str | bytes) or not hasattr(ids, "__iter__"):
        raise ValueError(f"stop_ids must be a tuple of token ids, got {ids!r}")
    for token in (ids := tuple(ids)):
        if not is_integer(token):
            raise ValueError(f"stop_ids must hold token ids, got {token!r}")
    return tuple(int(token) for token in ids)


def _stop_strings(stop: Any) -> tuple[str, ...]:
    if isinstance(stop, str | bytes) or not hasattr(stop, "__iter__"):
        raise ValueError(f"stop must be a tuple of strings, got {stop!r}: write ({stop!r},)")
    stop = tuple(stop)
    if len(stop) > _MOST_STOPS:
        raise ValueError(f"stop has {len(stop)} strings; give at most {_MOST_STOPS}")
    for index, text in enumerate(stop):
        if not isinstance(text, str):
            raise ValueError(f"stop must hold strings, got {text!r} at {index}")
        if not text:
            raise ValueError(f"stop string {index} is empty and would end every text: leave it out")
        if len(text) > _MOST_STOP_CHARACTERS:
            raise ValueError(
                f"stop string {index} has {len(text)} characters; give at most {_MOST_STOP_CHARACTERS}"
            )
    return stop
