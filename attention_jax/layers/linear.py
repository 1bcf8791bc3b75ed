"""Linear projections as single matrix products, their layout for decoding, and GELU in both of its forms."""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax.dtypes import accumulator


def linear(
    features_in: int,
    features_out: int,
    *,
    use_bias: bool = False,
    dtype=jnp.float32,
    kernel_init,
    bias_init=nnx.initializers.zeros_init(),  # noqa: B008 (a function)
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """A layer y = x W (+ b) over the last axis, with float32 parameters, computed in `dtype`."""
    return nnx.Linear(
        features_in,
        features_out,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=kernel_init,
        bias_init=bias_init,
        dot_general=_flat_dot_general,
        rngs=rngs,
    )


def fused_linear(
    linears: Sequence[nnx.Linear | PreparedMember], x: jax.Array, *, only_prepared: bool = False
) -> list[jax.Array]:
    """[f(x) for f in linears] as one wider matrix product, forward and backward.

    In a prepared model the layers of one call have one kernel (`prepare_linears`). Otherwise their kernels
    are concatenated in every call.

    only_prepared: never concatenate kernels; for wide layers, where that takes longer than it saves.
    """
    if (calls := _CALLS.get()) is not None:
        calls.append(tuple(linears))
    if (group := _common_group(linears)) is not None:
        y = group(x)
    elif only_prepared or not all(isinstance(f, nnx.Linear) for f in linears):
        return [f(x) for f in linears]
    else:
        dtype = linears[0].dtype
        kernel = jnp.concatenate([f.kernel[...] for f in linears], axis=1).astype(dtype)
        y = matmul(x.astype(dtype), kernel)
        if linears[0].use_bias:
            bias = jnp.concatenate([f.bias[...] for f in linears]).astype(dtype)
            y = y + jnp.broadcast_to(bias, y.shape)
    return jnp.split(y, list(itertools.accumulate(f.out_features for f in linears))[:-1], axis=-1)


class PreparedLinear(nnx.Module):
    """y = x K^T (+ b) with K [F, D]: one or several projections of x, laid out once for many products.

    The rows of K are contiguous, so that a matrix-vector product reads the weights once, in order. The
    numbers are those of `linear`: x and K in `dtype`, sums in float32 or a wider `dtype`, y in `dtype`. K has
    been rounded to `dtype` and may be stored in a wider dtype.
    """

    def __init__(self, kernel_FD: nnx.Param, bias_F: nnx.Param | None = None, *, dtype: Any):
        self.kernel, self.bias, self.dtype = kernel_FD, bias_F, dtype
        self.out_features = kernel_FD.shape[0]

    def __call__(self, x: jax.Array) -> jax.Array:
        """y [..., F], the outputs of all projections one after another."""
        y = self.product(x).astype(self.dtype)
        return y if self.bias is None else y + jnp.broadcast_to(self.bias[...].astype(self.dtype), y.shape)

    def product(self, x: jax.Array) -> jax.Array:
        """x K^T without the bias, in the wider of float32 and `dtype`, [..., F]."""
        kernel_FD = self.kernel[...]
        x = x.astype(self.dtype).astype(kernel_FD.dtype)
        y_FR = jax.lax.dot_general(
            kernel_FD,
            x.reshape(-1, x.shape[-1]),
            (((1,), (1,)), ((), ())),
            preferred_element_type=accumulator(self.dtype),
        )
        return y_FR.T.reshape(*x.shape[:-1], kernel_FD.shape[0])


class PreparedMember(nnx.Module):
    """One of the projections of a `PreparedLinear`, in the place of the `linear` that it was."""

    def __init__(self, group: PreparedLinear, start: int, out_features: int):
        self.group, self.start, self.out_features, self.dtype = group, start, out_features, group.dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """y [..., F_i], from a copy of its rows of the common kernel."""
        rows = slice(self.start, self.start + self.out_features)
        bias = None if self.group.bias is None else nnx.Param(self.group.bias[rows])
        return PreparedLinear(nnx.Param(self.group.kernel[rows]), bias, dtype=self.dtype)(x)


def prepare_linears(
    linears: Sequence[nnx.Linear], *, storage_dtype: Any = None
) -> list[PreparedLinear | PreparedMember]:
    """Projections of the same input, laid out for decoding with one common kernel.

    storage_dtype: the dtype in which the kernel is stored after rounding; that of the computation by default.
    """
    dtype, use_bias = linears[0].dtype, linears[0].use_bias
    kernel_FD = jnp.concatenate([f.kernel[...] for f in linears], axis=1).T.astype(dtype)
    bias_F = nnx.Param(jnp.concatenate([f.bias[...] for f in linears])) if use_bias else None
    group = PreparedLinear(nnx.Param(kernel_FD.astype(storage_dtype or dtype)), bias_F, dtype=dtype)
    if len(linears) == 1:
        return [group]
    starts = itertools.accumulate((f.out_features for f in linears), initial=0)
    return [PreparedMember(group, start, f.out_features) for start, f in zip(starts, linears, strict=False)]


def kernel_rows(f: nnx.Linear | PreparedLinear) -> jax.Array:
    """The kernel [out, in] of a projection, rounded to the dtype of its computation."""
    return f.kernel[...] if isinstance(f, PreparedLinear) else f.kernel[...].T.astype(f.dtype)


@contextlib.contextmanager
def recorded_calls() -> Iterator[list[tuple[nnx.Linear, ...]]]:
    """The layers of every call of `fused_linear` within the context: those that read the same input."""
    calls: list[tuple[nnx.Linear, ...]] = []
    token = _CALLS.set(calls)
    try:
        yield calls
    finally:
        _CALLS.reset(token)


_CALLS: contextvars.ContextVar[list | None] = contextvars.ContextVar("_CALLS", default=None)


def _common_group(linears: Sequence[Any]) -> PreparedLinear | None:
    """The group whose members, all of them and in their order, are the given layers; else None."""
    group = getattr(linears[0], "group", None)
    if not all(isinstance(f, PreparedMember) and f.group is group for f in linears):
        return None
    starts = itertools.accumulate((f.out_features for f in linears), initial=0)
    widths_end = [f.start for f in linears] + [group.out_features]
    return group if widths_end == list(starts) else None


def matmul(x: jax.Array, kernel: jax.Array, *, precision=None, preferred_element_type=None) -> jax.Array:
    """x [..., D] @ kernel [D, F] as one matrix product of [rows, D].

    The weight gradient then contracts a single leading axis, which needs no copy on any backend. For two
    axes, XLA's CPU backend first writes transposed copies of both factors on a single thread.
    """
    y = jax.lax.dot_general(
        x.reshape(-1, x.shape[-1]),
        kernel,
        (((1,), (0,)), ((), ())),
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def gelu(x: jax.Array) -> jax.Array:
    """x Phi(x), with Phi the normal distribution function (Hendrycks & Gimpel 2016, arXiv 1606.08415).

    Computed with erf, which is vectorised on CPUs. `jax.nn.gelu` uses erfc, which is three times slower there
    and no more accurate after the multiplication by x in float32.
    """
    return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def gelu_tanh(x: jax.Array) -> jax.Array:
    """x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2, an approximation of `gelu`, from the same paper.

    GPT-2, Gemma and Phi are trained with it. It differs from `gelu` by up to 5e-4.
    """
    return 0.5 * x * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))))


def _flat_dot_general(x, kernel, dimension_numbers, precision=None, preferred_element_type=None, **kwargs):
    """`matmul` with the signature of `jax.lax.dot_general`, for nnx.Linear."""
    assert dimension_numbers == (((x.ndim - 1,), (0,)), ((), ())) and not any(kwargs.values())
    return matmul(x, kernel, precision=precision, preferred_element_type=preferred_element_type)
