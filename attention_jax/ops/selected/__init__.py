"""Attention to chosen blocks of keys, and the choice: `selected_attention` and `choose_blocks`."""

from attention_jax.ops.selected.api import explain, selected_attention, selected_weights
from attention_jax.ops.selected.choose import choose_blocks
from attention_jax.ops.selected.gathered import GatheredConfig

__all__ = ["GatheredConfig", "choose_blocks", "explain", "selected_attention", "selected_weights"]
