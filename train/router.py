"""What the training step does for mixtures of experts: their losses, their load, and the correction bias.

The losses of all layers are added to the loss whose gradient is taken. The bias follows the load without a
gradient: b_e += rate sign(1 / E - load_e) (Wang et al. 2024, arXiv 2408.15664).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from attention_jax.feed_forwards import ExpertsConfig
from attention_jax.model import ModelConfig


def experts_of(model: ModelConfig) -> dict[int, ExpertsConfig]:
    """The config of each layer that is a mixture of experts, by its index."""
    period = model.period
    layers = ((i, period[i % len(period)].feed_forward) for i in range(model.num_layers))
    return {i: config for i, config in layers if isinstance(config, ExpertsConfig)}


def captured(model: ModelConfig) -> frozenset[str]:
    """The names to capture: none in a model without experts."""
    layers = experts_of(model).values()
    names = {"router_load"} if layers else set()
    return frozenset(names | ({"router_losses"} if any(c.router.has_losses for c in layers) else set()))


def collect(aux: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """router_load: the load [E] of each layer with experts; router_loss: the sum of all layers' losses."""
    found: dict[str, Any] = {}
    if loads := [layer["router_load"] for layer in aux if "router_load" in layer]:
        found["router_load"] = loads
    if losses := [layer["router_losses"] for layer in aux if "router_losses" in layer]:
        found["router_loss"] = sum(jnp.sum(x) for x in losses)
    return found


def metrics(found: dict[str, Any]) -> dict[str, jax.Array]:
    """router_loss, and router_load: the largest share of an expert in any layer, times E; 1 if even."""
    shown = {"router_loss": found["router_loss"]} if "router_loss" in found else {}
    if "router_load" in found:
        shown["router_load"] = jnp.max(jnp.stack([x.size * jnp.max(x) for x in found["router_load"]]))
    return shown


def move_biases(model: ModelConfig, params: Any, found: dict[str, Any], finite: jax.Array) -> Any:
    """The parameters with each correction bias moved towards an even load, where the step is finite."""
    layers = experts_of(model)
    if not any(config.router.bias_rate for config in layers.values()):
        return params
    stacks, period = dict(params["stacks"]), len(model.period)
    for (i, config), load_E in zip(layers.items(), found["router_load"], strict=True):
        rate, name = config.router.bias_rate, str(i % period)
        if rate:
            step_E = jnp.where(finite, rate * jnp.sign(1 / load_E.size - load_E), 0)
            mlp = dict(stacks[name]["mlp"])
            mlp["router_bias"] = mlp["router_bias"].at[i // period].add(step_E)
            stacks[name] = stacks[name] | {"mlp": mlp}
    return params | {"stacks": stacks}
