"""What families with a mixture of experts share."""

from __future__ import annotations

from typing import Any

from attention_jax.feed_forwards import ExpertsConfig, RouterConfig
from attention_jax.pretrained.description import Description
from attention_jax.pretrained.families.llama import ACTIVATIONS
from attention_jax.pretrained.table import Entry, linear, same, stacked, transposed

#: The projections of an expert, by our names.
NAMED = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
NUMBERED = {"gate": "w1", "up": "w3", "down": "w2"}


def experts_table(
    prefix: str = "model.layers.{i}.mlp", names: dict[str, str] = NAMED, *, shared: str | None = None
) -> list[Entry]:
    """The tensors of a router, of its experts under `names`, and of the shared expert."""
    return [
        transposed("mlp/router/kernel", f"{prefix}.gate.weight"),
        same("mlp/router_bias", f"{prefix}.gate.e_score_correction_bias"),
        *(stacked(f"mlp/{o}", f"{prefix}.experts.{{e}}.{t}.weight") for o, t in names.items()),
        *(e for o, t in NAMED.items() if shared for e in linear(f"mlp/shared/{o}", f"{prefix}.{shared}.{t}")),
    ]


def experts(
    d: Description, router: RouterConfig, *, number: str, chosen: str, width: str, **options: Any
) -> ExpertsConfig:
    """The experts of a description. number, chosen, width: its keys for E, K and the width of an expert."""
    return ExpertsConfig(
        num_experts=d.integer(number),
        experts_per_token=d.integer(chosen),
        width=d.integer(width),
        activation=d.one_of("hidden_act", ACTIVATIONS, "silu"),
        use_bias=False,
        router=router,
        **options,
    )
