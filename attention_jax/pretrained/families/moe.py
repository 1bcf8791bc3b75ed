"""What families with a mixture of experts share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from attention_jax.feed_forwards import ExpertsConfig, RouterConfig
from attention_jax.pretrained.description import Description
from attention_jax.pretrained.families.llama import ACTIVATIONS
from attention_jax.pretrained.table import Arrays, Entry, Place, linear, same, stacked, transposed

#: The projections of an expert, by our names.
NAMED = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
NUMBERED = {"gate": "w1", "up": "w3", "down": "w2"}


def experts_table(
    prefix: str = "model.layers.{i}.mlp", names: dict[str, str] = NAMED, *, shared: str | None = None
) -> list[Entry]:
    """The tensors of a router, of its experts, stored one by one under `names`, and of the shared expert."""
    return [
        transposed("mlp/router/kernel", f"{prefix}.gate.weight"),
        same("mlp/router_bias", f"{prefix}.gate.e_score_correction_bias"),
        *(stacked(f"mlp/{o}", f"{prefix}.experts.{{e}}.{t}.weight") for o, t in names.items()),
        *(e for o, t in NAMED.items() if shared for e in linear(f"mlp/shared/{o}", f"{prefix}.{shared}.{t}")),
    ]


def fused(ours: Sequence[str], theirs: str, *, transpose: bool = False, interleaved: bool = False) -> Entry:
    """The first and second projection of all experts, stored as one tensor [E, D, 2 F].

    transpose: it is [E, 2 F, D]. interleaved: their features take turns, instead of one half after the other.
    Biases [E, 2 F] are stored alike.
    """

    def load(arrays: Arrays, place: Place) -> Arrays:
        whole = np.swapaxes(arrays[0], -1, -2) if transpose else arrays[0]
        if whole.shape[-1] % 2:
            raise ValueError(f"its shape is {list(arrays[0].shape)}, of which two projections are no halves")
        if interleaved:
            return [whole[..., ::2], whole[..., 1::2]]
        return np.split(whole, 2, axis=-1)

    def save(arrays: Arrays, place: Place) -> Arrays:
        if interleaved:
            whole = np.stack(arrays, axis=-1).reshape(*arrays[0].shape[:-1], -1)
        else:
            whole = np.concatenate(arrays, axis=-1)
        return [np.swapaxes(whole, -1, -2) if transpose else whole]

    return Entry(tuple(ours), (theirs,), load, save)


def swapped(ours: str, theirs: str) -> Entry:
    """The kernels [E, in, out] of all experts, stored as one tensor [E, out, in]."""

    def swap(arrays: Arrays, place: Place) -> Arrays:
        return [np.swapaxes(x, -1, -2) for x in arrays]

    return Entry((ours,), (theirs,), swap, swap)


def experts(
    d: Description,
    router: RouterConfig = RouterConfig(),  # noqa: B008 (frozen)
    *,
    number: tuple[str, ...] = ("num_local_experts", "num_experts"),
    chosen: str = "num_experts_per_tok",
    width: str = "intermediate_size",
    **options: Any,
) -> ExpertsConfig:
    """The experts of a description.

    number, chosen, width: its keys for E (one of several), K and the width of an expert. router_aux_loss_coef
    sets nothing: the published loss is one product over all layers together, ours is a sum over layers, and a
    loaded model begins without it (`RouterConfig.balance_loss`).
    """
    d.only("router_jitter_noise", 0)
    d.number("router_aux_loss_coef", 0.0)
    d.flag("output_router_logits", False)
    return ExpertsConfig(
        **{
            "num_experts": d.same_integer(*number),
            "experts_per_token": d.integer(chosen),
            "width": d.integer(width),
            "activation": d.one_of("hidden_act", ACTIVATIONS, "silu"),
            "use_bias": False,
            "router": router,
        }
        | options
    )
