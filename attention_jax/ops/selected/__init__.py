"""Attention to chosen blocks of keys, and the choice: `selected_attention` and `choose_blocks`."""

from attention_jax.ops.selected.api import selected_attention, selected_weights
from attention_jax.ops.selected.choose import choose_blocks

__all__ = ["choose_blocks", "selected_attention", "selected_weights"]
