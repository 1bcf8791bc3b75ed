"""The memory that XLA plans for reading a long prompt, beside that of weights and cache."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attention_jax.caches import CacheOptions
from attention_jax.generation import prefill
from attention_jax.mixers import make_config
from attention_jax.model import ModelConfig, init_params, init_state, prepare_for_decoding

_LENGTH = 2**15


class Plan(NamedTuple):
    """Bytes of a prefill at its peak (arguments, outputs, temporaries), of the weights and of the cache."""

    peak: int
    weights: int
    cache: int


def planned(config: ModelConfig, length: int, batch: int = 1, prefill_chunk: int | None = None) -> Plan:
    """The plan for prompts of `length` tokens; compiles the program and runs nothing."""
    params = jax.eval_shape(
        lambda key: prepare_for_decoding(config, init_params(config, key)), jax.random.key(0)
    )
    tokens_BT = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    read = functools.partial(prefill, config, capacity=length, prefill_chunk=prefill_chunk)
    plan = jax.jit(read).lower(params, tokens_BT).compile().memory_analysis()
    peak = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
    caches = jax.eval_shape(lambda: init_state(config, batch, length, cache=CacheOptions()))
    return Plan(peak - plan.alias_size_in_bytes, _bytes(params), _bytes(caches))


def prefill_memory(args) -> list[dict[str, Any]]:
    """One row per mechanism: a model of 6 x 256 reads --length tokens, by default 32,768."""
    length, rows = args.length or _LENGTH, []
    for kind, options in (
        ("softmax", {"num_heads": 4}),
        ("softmax", {"num_heads": 4, "mask": "SlidingWindow(1024)"}),
        ("mla", {"num_heads": 4}),
        ("linear", {"num_heads": 4}),
    ):
        config = ModelConfig(
            vocab_size=4096, d_model=256, num_layers=6, mixers=(make_config(kind, **options),)
        )
        plan = planned(config, length)
        name = f"{kind} {options.get('mask', '')}".strip()
        ratio = plan.peak / (plan.weights + plan.cache)
        print(
            f"{name:30} peak {plan.peak / 2**20:8.1f} MiB  weights {plan.weights / 2**20:6.1f}  "
            f"cache {plan.cache / 2**20:7.1f}  ratio {ratio:5.2f}",
            flush=True,
        )
        rows.append({"name": f"ours {name}", "length": length, **plan._asdict(), "ratio": ratio})
    return rows


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
