"""Whether a decoding state is one of a given model."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from attention_jax.caches import CacheOptions, MemoryCache
from attention_jax.generation.decode import DecodeState, check_kept
from attention_jax.model import ModelConfig, init_state


def check_state(config: ModelConfig, state: Any, requests: int, cache: CacheOptions) -> None:
    """ValueError for what is no state of this model, with these cache options, for so many requests."""
    if not isinstance(state, DecodeState):
        raise ValueError(
            f"state must be a DecodeState from prefill, extend or decode_step, got {type(state).__name__}"
        )
    check_kept(state)
    rows = len(state.positions_B)
    if rows not in (1, requests):
        raise ValueError(f"the state has {rows} rows for {requests} prompts; give one row, or one per prompt")
    for name, wanted in (("positions_B", (rows,)), ("logits_BV", (rows, config.vocab_size))):
        if (shape := tuple(getattr(state, name).shape)) != wanted:
            raise ValueError(f"the state's {name} has the shape {shape}, and one of this model has {wanted}")
    capacity = state.capacity or 1  # states of a constant size have no capacity
    template = jax.eval_shape(lambda: init_state(config, rows, capacity, cache=cache))
    if not isinstance(state.caches, list) or len(state.caches) != len(template):
        size = len(state.caches) if isinstance(state.caches, list) else type(state.caches).__name__
        raise ValueError(f"the state has {size} layers or stacks, and the model {len(template)}")
    for layer, (given, wanted) in enumerate(zip(state.caches, template, strict=True)):
        if (difference := _difference(given, wanted)) is not None:
            raise ValueError(
                f"the state is not one of this model with this `cache`: layer {layer} {difference}"
            )


def _difference(given: Any, wanted: Any) -> str | None:
    """What the state of a layer has and this model's has not; None if they are alike."""
    if type(given) is not type(wanted):
        return f"is a {type(given).__name__}, not a {type(wanted).__name__}"
    if not dataclasses.is_dataclass(given):
        return None if _form(given) == _form(wanted) else f"has {_form(given)}, not {_form(wanted)}"
    for field in dataclasses.fields(given):
        a, b = getattr(given, field.name), getattr(wanted, field.name)
        if dataclasses.is_dataclass(a) or dataclasses.is_dataclass(b):
            if (difference := _difference(a, b)) is not None:
                return difference
        elif _form(a, given) != _form(b, given):
            return f"has {field.name} {_form(a, given)}, not {_form(b, given)}"
    return None


def _form(value: Any, owner: Any = None) -> Any:
    """dtypes and shapes of arrays, other values as they are; a memory may have any number of keys."""
    if any(not hasattr(leaf, "shape") for leaf in jax.tree.leaves(value)):
        return value

    def text(leaf: Any) -> str:
        shape = list(leaf.shape)
        if isinstance(owner, MemoryCache):
            shape[-1 if leaf.dtype == jnp.int32 else -2] = "S"
        return f"{leaf.dtype} {shape}"

    return jax.tree.map(text, value)
