"""Tokens in the order of the experts that they are sent to, and products with one matrix per expert.

`Groups` says which token each row holds and in which row each of a token's choices is computed. There are
four orders:

    ragged     N K rows, sorted by expert; products are `jax.lax.ragged_dot`
    blocked    sorted by expert, each expert's rows padded to whole blocks of M rows, so that a block has one
               matrix. XLA's CPU backend computes ragged_dot as E products of all rows
    single     a loop over N K rows in the order of the tokens; for a few tokens, as in decoding
    capacity   buffers of C rows for each expert and row of the batch, without what does not fit
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

_LEAST_BLOCK = 8


class Groups(NamedTuple):
    """R rows for the choices of N tokens, K each. A row without a choice is 0.

    choices_R: the index (token K + rank) of the choice in each row; N K where it has none.
    place_NK: the row of each choice; R where it has none, for which `combined` adds 0.
    experts: the expert of each block of R / len(experts) rows. sizes_E: of ragged rows alone, instead.
    order: one of the module's orders.
    """

    choices_R: jax.Array
    place_NK: jax.Array
    experts: jax.Array | None
    sizes_E: jax.Array | None
    order: Literal["ragged", "blocked", "single", "capacity"]

    def gathered(self, x_ND: jax.Array, weights_NK: jax.Array | None = None) -> jax.Array:
        """The features of each row's token [R, D], times the weights of the choices if they are given."""
        x_RD = _take(x_ND, self.choices_R // self.place_NK.shape[1])
        if weights_NK is None:
            return x_RD
        return (x_RD * _take(weights_NK.reshape(-1), self.choices_R)[:, None]).astype(x_ND.dtype)

    def combined(self, y_RD: jax.Array, weights_NK: jax.Array | None) -> jax.Array:
        """The sum over each token's choices [N, D], weighted if weights are given, in their dtype."""
        y_NKD = _take(y_RD, self.place_NK)
        if weights_NK is None:
            return y_NKD.sum(axis=1)
        return (y_NKD.astype(weights_NK.dtype) * weights_NK[..., None]).sum(axis=1)

    def product(self, x_RI: jax.Array, kernel_EIO: jax.Array, dtype) -> jax.Array:
        """x W_e of every row, in `dtype`, to which kernels are cast after those in use are selected."""
        R, features_out = x_RI.shape[0], kernel_EIO.shape[2]
        x_RI = x_RI.astype(dtype)
        if self.order == "ragged":
            y_RO = jax.lax.ragged_dot(x_RI, kernel_EIO.astype(dtype), self.sizes_E)
            in_group_R = jnp.arange(R) < self.sizes_E.sum()  # what follows is not defined on every backend
            return jnp.where(in_group_R[:, None], y_RO, jnp.zeros((), y_RO.dtype))
        if self.order == "single":
            return jax.lax.map(
                lambda row: _matmul(row[0][None], kernel_EIO[row[1]].astype(dtype))[0], (x_RI, self.experts)
            )
        kernels = kernel_EIO if self.order == "capacity" else kernel_EIO[self.experts]
        blocks = x_RI.reshape(kernels.shape[0], -1, x_RI.shape[1])
        return jnp.einsum("bmi,bio->bmo", blocks, kernels.astype(dtype)).reshape(R, features_out)

    def biases(self, bias_EO: jax.Array) -> jax.Array:
        """The bias of each row's expert [R, O]."""
        R = self.choices_R.shape[0]
        if self.order == "ragged":
            ends_E = jnp.cumsum(self.sizes_E)
            return _take(bias_EO, jnp.searchsorted(ends_E, jnp.arange(R), side="right"))
        return jnp.repeat(bias_EO[self.experts], R // self.experts.shape[0], axis=0, total_repeat_length=R)


def ragged(experts_NK: jax.Array, num_experts: int) -> Groups:
    """Rows sorted by expert; an expert >= num_experts marks a choice without a row."""
    rank, sizes_E = _ranks(experts_NK.reshape(-1), num_experts)
    place = _starts(sizes_E, experts_NK) + rank.reshape(experts_NK.shape)
    return _groups("ragged", experts_NK.size, place, experts_NK < num_experts, sizes_E=sizes_E)


def blocked(experts_NK: jax.Array, num_experts: int) -> Groups:
    """Rows sorted by expert, in blocks of one expert, or one row per choice where there are at most E."""
    count = experts_NK.size
    if count <= num_experts:
        experts = experts_NK.reshape(-1)
        place = jnp.arange(count).reshape(experts_NK.shape)
        experts = experts.clip(0, num_experts - 1)
        return _groups("single", count, place, experts_NK < num_experts, experts=experts)
    M = max(_LEAST_BLOCK, 2 ** int(math.log2(max(count / (2 * num_experts), 1))))
    num_blocks = -(-count // M) + num_experts
    rank, sizes_E = _ranks(experts_NK.reshape(-1), num_experts)
    padded_E = -(-sizes_E // M) * M
    place = _starts(padded_E, experts_NK) + rank.reshape(experts_NK.shape)
    experts = jnp.searchsorted(jnp.cumsum(padded_E), jnp.arange(num_blocks) * M, side="right")
    experts = experts.clip(0, num_experts - 1)  # blocks after the last one hold no token
    return _groups("blocked", num_blocks * M, place, experts_NK < num_experts, experts=experts)


def with_capacity(experts_NK: jax.Array, num_experts: int, batch: int, capacity: int) -> Groups:
    """The first `capacity` choices of each expert in each row of the batch, by token, then by rank."""
    row_N1 = (jnp.arange(experts_NK.shape[0]) // (experts_NK.shape[0] // batch))[:, None]
    valid_NK = experts_NK < num_experts
    key_NK = jnp.where(valid_NK, experts_NK * batch + row_N1, num_experts * batch)
    rank, _ = _ranks(key_NK.reshape(-1), num_experts * batch)
    rank_NK = rank.reshape(experts_NK.shape)
    place, rows = key_NK * capacity + rank_NK, num_experts * batch * capacity
    experts = jnp.arange(num_experts)
    return _groups("capacity", rows, place, valid_NK & (rank_NK < capacity), experts=experts)


def make_groups(
    experts_NK: jax.Array, num_experts: int, impl: str | None, *, batch: int = 1, capacity: int | None = None
) -> Groups:
    """The rows for these choices: with a capacity, or in the order of `impl` (null: that of the platform)."""
    if capacity is not None:
        return with_capacity(experts_NK, num_experts, batch, capacity)
    impl = impl or ("blocked" if jax.default_backend() == "cpu" else "ragged")
    orders: dict[str, Callable[..., Groups]] = {"blocked": blocked, "ragged": ragged}
    return orders[impl](experts_NK, num_experts)


def _groups(order, rows: int, place_NK, has_row_NK, *, experts=None, sizes_E=None) -> Groups:
    """`Groups` from the row of each choice, if it has one."""
    place_NK = jnp.where(has_row_NK, place_NK, rows).astype(jnp.int32)
    count = place_NK.size
    choices_R = jnp.full(rows, count, jnp.int32)
    choices_R = choices_R.at[place_NK.reshape(-1)].set(jnp.arange(count, dtype=jnp.int32), mode="drop")
    return Groups(choices_R, place_NK, experts, sizes_E, order)


def _ranks(keys_R: jax.Array, num_keys: int) -> tuple[jax.Array, jax.Array]:
    """How many earlier entries have the same key, and the number of entries of each key below num_keys."""
    order = jnp.argsort(keys_R, stable=True)
    sizes = jnp.zeros(num_keys, jnp.int32).at[keys_R].add(1, mode="drop")
    in_order = jnp.arange(keys_R.size, dtype=jnp.int32) - _starts(sizes, keys_R[order])
    return jnp.zeros(keys_R.size, jnp.int32).at[order].set(in_order), sizes


def _starts(sizes_E: jax.Array, experts: jax.Array) -> jax.Array:
    """The first row of each choice's group; of a choice without a group, the end of all."""
    starts = jnp.concatenate([jnp.zeros(1, sizes_E.dtype), jnp.cumsum(sizes_E)])
    return starts[jnp.minimum(experts, sizes_E.size)]


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[index], with 0 where the index is past the end."""
    return x.at[index].get(mode="fill", fill_value=0)


def _matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.dot_general(x, kernel, (((1,), (0,)), ((), ())))
