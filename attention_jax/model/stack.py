"""Layers: a block, and stacks of blocks applied unrolled or by `lax.scan`.

    h' = h + mixer(norm(h)),   h'' = h' + mlp(norm(h'))

Layer i runs mixer i mod P of P mixers. Parameters are stacked per place in that period: stack p holds layers
p, p + P, p + 2P, ... with a leading layer axis. The same layout is applied unrolled (faster on a CPU) or by
`lax.scan` over whole periods (compiles faster).
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax.layers import gelu, linear
from attention_jax.mixers import Context, MixerConfig
from attention_jax.model.config import ModelConfig


class MLP(nnx.Module):
    """down(act(gate(x)) * up(x)), or down(gelu(up(x))): Shazeer 2020 (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, *, dtype, rngs: nnx.Rngs):
        D, F = config.d_model, config.hidden_width
        common = {"use_bias": config.use_bias, "dtype": dtype, "rngs": rngs}
        self.kind = config.mlp
        if config.mlp != "gelu":
            self.gate = linear(D, F, kernel_init=init(config), **common)
        self.up = linear(D, F, kernel_init=init(config), **common)
        self.down = linear(F, D, kernel_init=_out_init(config), **common)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        up_BTF = self.up(x_BTD)
        if self.kind == "gelu":
            return self.down(gelu(up_BTF))
        act = nnx.silu if self.kind == "swiglu" else gelu
        return self.down(act(self.gate(x_BTD)) * up_BTF)


class Block(nnx.Module):
    """One layer: x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, mixer: MixerConfig, *, causal: bool, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        inits = {"kernel_init": init(config), "out_init": _out_init(config)}
        self.norm1 = make_norm(config, rngs)
        self.mixer = mixer.build(config.d_model, rngs, causal=causal, dtype=dtype, **inits)
        self.norm2 = make_norm(config, rngs)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)
        self.dropout = config.dropout

    def __call__(self, x_BTD: jax.Array, state: Any = None, *, ctx: Context) -> tuple[jax.Array, Any]:
        y_BTD, state = self.mixer(self.norm1(x_BTD), state, ctx=ctx.fold_key(0))
        x_BTD = x_BTD + dropout(y_BTD, self.dropout, ctx.fold_key(1).dropout_key)
        y_BTD = self.mlp(self.norm2(x_BTD))
        return x_BTD + dropout(y_BTD, self.dropout, ctx.fold_key(2).dropout_key), state


def make_stacks(
    config: ModelConfig, mixers: tuple[MixerConfig, ...], num_layers: int, *, causal: bool, rngs: nnx.Rngs
) -> nnx.List:
    """`num_layers` blocks, stacked per place in the period of `mixers`; the remainder rides on the first."""
    period = len(mixers)
    return nnx.List(
        _stacked(
            lambda rngs, mixer=mixer: Block(config, mixer, causal=causal, rngs=rngs),
            len(range(place, num_layers, period)),
            rngs,
        )
        for place, mixer in enumerate(mixers)
    )


def run_stacks(
    config: ModelConfig, stacks: nnx.List, num_layers: int, x_BTD: jax.Array, state: Any, ctx: Context
) -> tuple[jax.Array, Any]:
    """x through all layers, and their states in the form `stack_states` gives."""
    if config.layers == "scan":
        return _scanned(config, stacks, num_layers, x_BTD, state, ctx)
    states = [None] * num_layers if state is None else list(state)
    weights = [_unstacked(stack) for stack in stacks]
    for i in range(num_layers):
        graphdef, layers = weights[i % len(weights)]
        x_BTD, states[i] = _apply(config, graphdef, layers[i // len(weights)], x_BTD, states[i], ctx, i)
    return x_BTD, None if state is None else states


def _scanned(config, stacks, num_layers: int, x_BTD, state, ctx: Context) -> tuple[jax.Array, Any]:
    """`lax.scan` over whole periods, then the remaining layers."""
    period = len(stacks)
    rounds = num_layers // period
    split = [nnx.split(stack) for stack in stacks]
    head = [jax.tree.map(lambda a: a[:rounds], weights) for _, weights in split]
    states = [None] * period if state is None else list(state)
    state_head = [jax.tree.map(lambda a: a[:rounds], s) for s in states]

    def one_round(x_BTD, step):
        index, weights, states = step
        states = list(states)
        for p, (graphdef, _) in enumerate(split):
            layer = index * period + p
            x_BTD, states[p] = _apply(config, graphdef, weights[p], x_BTD, states[p], ctx, layer)
        return x_BTD, states

    x_BTD, out = jax.lax.scan(one_round, x_BTD, (jnp.arange(rounds), head, state_head))
    for p in range(num_layers - rounds * period):
        weights, s = jax.tree.map(lambda a: a[rounds], (split[p][1], states[p]))
        x_BTD, s = _apply(config, split[p][0], weights, x_BTD, s, ctx, rounds * period + p)
        out[p] = jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), out[p], s)
    return x_BTD, None if state is None else out


def _apply(config: ModelConfig, graphdef, weights, x_BTD, state, ctx: Context, layer):
    def run(weights, x_BTD, state, ctx):
        return nnx.merge(graphdef, weights)(x_BTD, state, ctx=ctx)

    if config.remat is not None and state is None:
        run = jax.checkpoint(run, policy=getattr(jax.checkpoint_policies, config.remat))
    return run(weights, x_BTD, state, ctx.fold_key(layer))


def layer_of(stacks: nnx.List, layer: int) -> Block:
    """Layer `layer` as a module of its own."""
    graphdef, layers = _unstacked(stacks[layer % len(stacks)])
    return nnx.merge(graphdef, layers[layer // len(stacks)])


def stack_states(config: ModelConfig, states: list, period: int) -> list:
    """States of all layers in the form `run_stacks` takes: one per layer, or stacked for `layers: scan`."""
    if config.layers == "unrolled":
        return states
    return [jax.tree.map(lambda *leaves: jnp.stack(leaves), *states[p::period]) for p in range(period)]


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """x with entries dropped at `rate` and the rest scaled by 1 / (1 - rate); key None keeps all."""
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), jnp.zeros((), x.dtype))


def _stacked(make, size: int, rngs: nnx.Rngs) -> nnx.Module:
    """`size` modules from `make(rngs)` as one whose parameters have a leading layer axis."""
    keys = jax.random.split(rngs.params(), size)
    weights = jax.lax.map(lambda key: nnx.state(make(nnx.Rngs(key))), keys)
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    return nnx.merge(graphdef, weights)


def _unstacked(stack: nnx.Module) -> tuple[Any, list]:
    """(graphdef, the weights of each layer). `lax.split`, because its transpose is one concatenation."""
    graphdef, weights = nnx.split(stack)
    leaves, treedef = jax.tree.flatten(weights)
    size = leaves[0].shape[0]
    parts = [[a[0] for a in jax.lax.split(leaf, [1] * size)] for leaf in leaves]
    return graphdef, [jax.tree.unflatten(treedef, layer) for layer in zip(*parts, strict=True)]


def make_norm(config: ModelConfig, rngs: nnx.Rngs) -> nnx.Module:
    dtype = jnp.dtype(config.dtype)
    if config.norm == "rmsnorm":
        return nnx.RMSNorm(config.d_model, epsilon=config.norm_eps, dtype=dtype, rngs=rngs)
    return nnx.LayerNorm(
        config.d_model, epsilon=config.norm_eps, use_bias=config.use_bias, dtype=dtype, rngs=rngs
    )


def init(config: ModelConfig):
    return nnx.initializers.normal(config.init_std)


def _out_init(config: ModelConfig):
    return nnx.initializers.normal(config.init_std / math.sqrt(2 * config.num_layers))
