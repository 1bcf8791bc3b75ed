"""Stacks of layers, applied unrolled or by `lax.scan`.

Layer i is entry i mod P of a period of P blocks. Parameters are stacked by their index in this period: stack p holds the
layers p, p + P, p + 2P, ... with a leading layer axis. The same layout is applied unrolled (faster on a CPU) or
by `lax.scan` over whole periods (compiles faster). A call with a state is always unrolled, and there is one state
per layer: a loop over tokens updates each in place.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax.caches import DEFAULT_CACHE, Cache, CacheOptions, NoState
from attention_jax.mixers import Context, MixerOutput
from attention_jax.model.block import Block
from attention_jax.model.block_config import BlockConfig
from attention_jax.model.config import ModelConfig


def make_stacks(
    config: ModelConfig, period: tuple[BlockConfig, ...], num_layers: int, *, causal: bool, rngs: nnx.Rngs
) -> nnx.List:
    """`num_layers` blocks, stacked by their index in the period.

    If the period does not divide `num_layers`, the first stacks have one layer more.
    """
    return nnx.List(
        _stacked(
            lambda rngs, block=block: Block(config, block, causal=causal, rngs=rngs),
            len(range(place, num_layers, len(period))),
            rngs,
        )
        for place, block in enumerate(period)
    )


class Layers(nnx.Module):
    """The blocks of a model one after another, each with its own parameters: `make_stacks` prepared for decoding."""

    def __init__(self, blocks: list[Block]):
        self.blocks = nnx.List(blocks)


def unstack(stacks: nnx.List, num_layers: int) -> list[Block]:
    """The blocks of all layers, in their order."""
    weights = [_unstacked(stack) for stack in stacks]
    period = len(weights)
    return [nnx.merge(weights[i % period][0], weights[i % period][1][i // period]) for i in range(num_layers)]


def run_stacks(
    config: ModelConfig,
    stacks: nnx.List | Layers,
    num_layers: int,
    x_BTD: jax.Array,
    state: Any,
    ctx: Context,
) -> MixerOutput:
    """The output x of all layers, their states in the form of `init_states`, and the `aux` of each layer."""
    if config.scan_layers and state is None and not isinstance(stacks, Layers):
        return _scanned(config, stacks, num_layers, x_BTD, ctx)
    blocks = stacks.blocks if isinstance(stacks, Layers) else unstack(stacks, num_layers)
    states, aux = [None] * num_layers if state is None else list(state), [{}] * num_layers
    for i, block in enumerate(blocks):
        mix = block.mix if state is not None else _rematerialized(config, *nnx.split(block))
        x_BTD, states[i], aux[i] = mix(x_BTD, states[i], ctx=ctx.fold_key(i))
    return MixerOutput(x_BTD, None if state is None else states, tuple(aux))


def _scanned(config, stacks, num_layers: int, x_BTD, ctx: Context) -> MixerOutput:
    """`lax.scan` over whole periods, then the remaining layers."""
    period = len(stacks)
    rounds = num_layers // period
    split = [nnx.split(stack) for stack in stacks]
    scanned = [jax.tree.map(lambda a: a[:rounds], weights) for _, weights in split]

    def one_period(x_BTD, step):
        index, weights = step
        aux = [{}] * period
        for p, (graphdef, _) in enumerate(split):
            mix = _rematerialized(config, graphdef, weights[p])
            x_BTD, _, aux[p] = mix(x_BTD, None, ctx=ctx.fold_key(index * period + p))
        return x_BTD, aux

    x_BTD, stacked = jax.lax.scan(one_period, x_BTD, (jnp.arange(rounds), scanned))
    aux = [jax.tree.map(lambda a, r=r: a[r], stacked[p]) for r in range(rounds) for p in range(period)]
    for p in range(num_layers - rounds * period):
        graphdef, weights = split[p]
        mix = _rematerialized(config, graphdef, jax.tree.map(lambda a: a[rounds], weights))
        x_BTD, _, last = mix(x_BTD, None, ctx=ctx.fold_key(rounds * period + p))
        aux.append(last)
    return MixerOutput(x_BTD, None, tuple(aux))


def _rematerialized(config: ModelConfig, graphdef: Any, weights: Any):
    """`Block.mix` of a layer in the parallel form, rematerialised if the config has `remat`."""
    if config.remat is None:
        return nnx.merge(graphdef, weights).mix

    def run(weights, x_BTD, ctx):
        return nnx.merge(graphdef, weights).mix(x_BTD, None, ctx=ctx)

    run = jax.checkpoint(run, policy=getattr(jax.checkpoint_policies, config.remat))
    return lambda x_BTD, state, *, ctx: run(weights, x_BTD, ctx)


def init_states(
    config: ModelConfig, batch: int, capacity: int, *, cache: CacheOptions = DEFAULT_CACHE
) -> list:
    """Empty states of all layers, one per layer."""
    period, cache = config.period, cache.of_layer(config.dtype)
    return [
        init_layer_state(config, period[i % len(period)], batch, capacity, cache)
        for i in range(config.num_layers)
    ]


def init_layer_state(
    config: ModelConfig, block: BlockConfig, batch: int, capacity: int, cache: CacheOptions
) -> Cache:
    """The empty state of one layer."""
    if block.mixer is None:
        return NoState()
    return block.mixer.init_state(config.d_model, batch, capacity, causal=config.causal, cache=cache)


def _stacked(make, size: int, rngs: nnx.Rngs) -> nnx.Module:
    """`size` modules from `make(rngs)` as one module whose parameters have a leading layer axis."""
    keys = jax.random.split(rngs.params(), size)
    weights = jax.lax.map(lambda key: nnx.state(make(nnx.Rngs(key))), keys)
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    return nnx.merge(graphdef, weights)


def _unstacked(stack: nnx.Module) -> tuple[Any, list]:
    """The graphdef and the weights of each layer; uses `lax.split`, whose transpose is one concatenation."""
    graphdef, weights = nnx.split(stack)
    leaves, treedef = jax.tree.flatten(weights)
    size = leaves[0].shape[0]
    parts = [[a[0] for a in jax.lax.split(leaf, [1] * size)] for leaf in leaves]
    return graphdef, [jax.tree.unflatten(treedef, layer) for layer in zip(*parts, strict=True)]
