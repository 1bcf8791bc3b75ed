"""Multi-query associative recall (MQAR).

    k1 v1 k2 v2 ... kD vD | filler with each key once more;   at a key's second place its value is predicted

The D keys of a row are distinct ids from 1 ... V // 2 - 1, the values distinct ids from V // 2 ... V - 1, and
0 is the blank. After the pairs every second slot may hold a query, slots i = 1 ... S with S = (T - 2 D) // 2:
the keys, first to last, draw their slots without replacement with probabilities p_i ~ i^(alpha - 1). With a
small alpha queries come soon after the pairs, as bigrams recur in text; alpha = 1 is uniform. Only queries
are scored: the target there is the value, which the row itself does not repeat.

Arora et al. 2023, "Zoology: Measuring and Improving Recall in Efficient Language Models" (arXiv 2312.04927),
section 4 and its appendix on synthetics, and the description that comes with the released experiments.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import numpy as np

from attention_jax.choices import check_between, check_choices

# Figure 2 of the paper: (tokens a row, pairs), all with 8192 ids and alpha 0.01.
PAPER_SETTINGS = ((64, 4), (128, 8), (256, 16), (512, 64))


@dataclasses.dataclass(frozen=True)
class MQARConfig:
    """Multi-query associative recall (arXiv 2312.04927): name the value of a key seen before."""

    __pydantic_config__ = {"extra": "forbid", "strict": True}

    kind: Literal["mqar"] = "mqar"  #: the task
    #: key-value pairs a row (D), at most data.sequence_length / 4. The paper's settings (sequence_length,
    #: pairs): (64, 4), (128, 8), (256, 16), (512, 64)
    pairs: int = 8
    vocab_size: int = 8192  #: token ids (V): half of them keys, half values, 0 the blank; the paper has 8192
    alpha: float = 0.01  #: the power law of the queries' places: 1 is uniform, less is sooner after the pairs
    #: what the other slots hold. blank: 0, as in the paper's figure 2; random: any id but 0, keys and values
    #: included
    filler: Literal["blank", "random"] = "blank"
    validation_rows: int = 1024  #: held-out rows, the same ones whatever data.shuffle_seed

    def __post_init__(self):
        check_choices(self)
        for name in ("pairs", "validation_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        least = 2 * self.pairs + 2
        if not least <= self.vocab_size <= 2**31:
            raise ValueError(
                f"vocab_size must lie in [{least}, 2147483648], got {self.vocab_size}: its halves hold the "
                f"blank and the {self.pairs} keys of a row, and their values"
            )
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"alpha must be finite and > 0, got {self.alpha}")
        check_between(self, "alpha", 1e-6, 10, "the places of the queries are powers of their number")
        check_between(self, "validation_rows", 1, 2**24, "every evaluation generates them")

    def check(self, sequence_length: int) -> None:
        """ValueError where the pairs and their queries do not fit rows of this length."""
        if 4 * self.pairs > sequence_length:
            raise ValueError(
                f"pairs {self.pairs} do not fit data.sequence_length {sequence_length}: a pair and its query "
                f"take 4 tokens, so give at most {sequence_length // 4} pairs or rows of {4 * self.pairs}"
            )

    def rows(
        self, first: int, count: int, sequence_length: int, *, seed: int, held_out: bool = False
    ) -> dict[str, np.ndarray]:
        """Rows `first` to `first + count - 1`: tokens and targets (-1: not scored), int32 [B, T]."""
        D, T = self.pairs, sequence_length
        slots = (T - 2 * D) // 2
        sizes = np.cumsum([D, D, slots, T])
        uniform = _uniform(first, count, int(sizes[-1]), (seed, int(held_out)))
        for_keys, for_values, for_slots, for_filler = np.split(uniform, sizes[:-1], axis=1)
        half = self.vocab_size // 2
        keys_BD = 1 + _distinct(for_keys, half - 1)
        values_BD = half + _distinct(for_values, self.vocab_size - half)
        places_BD = 2 * D + 2 * _power_law(for_slots, D, self.alpha)

        tokens_BT = np.zeros((count, T), np.int32)
        if self.filler == "random":
            tokens_BT[:] = 1 + for_filler * (self.vocab_size - 1)
        tokens_BT[:, 0 : 2 * D : 2], tokens_BT[:, 1 : 2 * D : 2] = keys_BD, values_BD
        np.put_along_axis(tokens_BT, places_BD, keys_BD.astype(np.int32), axis=1)
        targets_BT = np.full((count, T), -1, np.int32)
        np.put_along_axis(targets_BT, places_BD, values_BD.astype(np.int32), axis=1)
        return {"tokens": tokens_BT, "targets": targets_BT}


def _uniform(first: int, count: int, width: int, key: tuple[int, int]) -> np.ndarray:
    """[count, width] numbers in [0, 1): row n of them depends on (key, n) alone.

    Philox is a cipher of a counter, four numbers a count: a row owns a range of counts.
    """
    counts = -(-width // 4)
    generator = np.random.Philox(key=np.array(key, np.uint64)).advance(first * counts)
    # The raw bits are the same in every version of NumPy; 53 of them make a float64.
    bits = generator.random_raw(count * counts * 4).reshape(count, -1)[:, :width]
    return (bits >> np.uint64(11)) * 2.0**-53


def _distinct(uniform_BD: np.ndarray, ids: int) -> np.ndarray:
    """D distinct numbers below `ids` in each row, every ordered choice equally likely."""
    B, D = uniform_BD.shape
    chosen_BD = np.empty((B, D), np.int64)
    for d in range(D):
        # The r-th of the numbers not chosen so far: r, and one more for each chosen number at or below it.
        rank_B1 = (uniform_BD[:, d : d + 1] * (ids - d)).astype(np.int64)
        free_below = np.sort(chosen_BD[:, :d], axis=1) - np.arange(d)
        chosen_BD[:, d] = rank_B1[:, 0] + (free_below <= rank_B1).sum(axis=1)
    return chosen_BD


def _power_law(uniform_BS: np.ndarray, draws: int, alpha: float) -> np.ndarray:
    """`draws` distinct slots 0 ... S - 1 of each row, drawn one after another with p_i ~ (i + 1)^(alpha - 1).

    The exponential race: slot i arrives after an exponential time of rate p_i, and the order of arrival is
    that of successive draws without replacement.
    """
    rates_S = np.arange(1, uniform_BS.shape[1] + 1) ** (alpha - 1)
    return np.argsort(-np.log1p(-uniform_BS) / rates_S, axis=1, kind="stable")[:, :draws]
