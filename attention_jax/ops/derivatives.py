"""Derivatives that an implementation does not have are refused in one line.

An op with a `jax.custom_vjp` has no forward mode, and a loop of traced length no reverse mode. JAX says so in
the words of its own internals and, under `jax.jit`, only while compiling. Two identities say it in ours:

    reverse_only(message, x)    the derivative of what follows is taken in reverse mode alone
    forward_only(message, x)    ... in forward mode alone
    none(message, x)            ... in no mode

Each is a linear primitive on the tangents, which JAX either evaluates (forward mode) or transposes (reverse
mode). Whichever is refused raises NotImplementedError with the message. Values are passed through untouched,
so that a program which takes no refused derivative is the same with and without.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def reverse_only(message: str, tree: Any) -> Any:
    """The pytree; forward mode (jvp, jacfwd, linearize) through it raises NotImplementedError(message)."""
    return _marked(_reverse_p, message, tree)


def forward_only(message: str, tree: Any) -> Any:
    """The pytree; reverse mode (grad, vjp, jacrev) through it raises NotImplementedError(message)."""
    return _marked(_forward_p, message, tree)


def none(message: str, tree: Any) -> Any:
    """The pytree; any derivative through it raises NotImplementedError(message)."""
    return _marked(_none_p, message, tree)


def no_forward_mode(impl: str, op: str, *, use: str) -> str:
    """The message of `reverse_only` for an implementation; use: another one that has forward mode."""
    return (
        f"impl={impl!r} of {op} has no forward-mode derivative (jvp, jacfwd, linearize): use impl={use!r}, "
        "or reverse mode (grad, and jvp of grad)"
    )


def _marked(primitive: Primitive, message: str, tree: Any) -> Any:
    leaves, treedef = jax.tree.flatten(tree)
    learned = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.floating)]
    # Together: one that is not differentiated has no tangent then, and not that of an outer derivative.
    for i, x in zip(learned, _identity(primitive, message, *(leaves[i] for i in learned)), strict=True):
        leaves[i] = x
    return jax.tree.unflatten(treedef, leaves)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _identity(primitive: Primitive, message: str, *leaves: jax.Array) -> tuple[jax.Array, ...]:
    del primitive, message
    return leaves


def _identity_jvp(primitive: Primitive, message: str, leaves, tangents):
    found = [
        t if isinstance(t, SymbolicZero) else primitive.bind(t, x, message=message)
        for x, t in zip(leaves, tangents, strict=True)
    ]
    return tuple(leaves), tuple(found)


_identity.defjvp(_identity_jvp, symbolic_zeros=True)


def _refuse(*args: Any, message: str, **params: Any) -> Any:
    del args, params
    raise NotImplementedError(message)


def _keep(tangent: Any, x: Any, *, message: str) -> Any:
    del x, message
    return tangent


def _marker(name: str, *, evaluates: bool, transposes: bool) -> Primitive:
    """A primitive of (tangent, x) that is the identity of the tangent, or a refusal.

    x is what the tangent belongs to: a tangent that itself depends on x is about to be evaluated.
    """
    primitive = Primitive(name)
    evaluate = _keep if evaluates else _refuse

    def jvp(primals, tangents, *, message):
        if not (evaluates or isinstance(tangents[1], ad.Zero)):
            raise NotImplementedError(message)
        out = primitive.bind(*primals, message=message)
        zero = isinstance(tangents[0], ad.Zero)
        return out, tangents[0] if zero else primitive.bind(tangents[0], primals[1], message=message)

    def transpose(cotangent, tangent, x, *, message):
        del tangent, x
        if not transposes:
            raise NotImplementedError(message)
        return [cotangent, None]

    def batch(args, axes, *, message):
        return primitive.bind(*args, message=message), axes[0]

    primitive.def_impl(evaluate)
    primitive.def_abstract_eval(_keep)
    ad.primitive_jvps[primitive] = jvp
    ad.primitive_transposes[primitive] = transpose
    batching.primitive_batchers[primitive] = batch
    lowered = mlir.lower_fun(_keep, multiple_results=False) if evaluates else _refuse
    mlir.register_lowering(primitive, lowered)
    return primitive


_reverse_p = _marker("reverse_only", evaluates=False, transposes=True)
_forward_p = _marker("forward_only", evaluates=True, transposes=False)
_none_p = _marker("no_derivative", evaluates=False, transposes=False)
