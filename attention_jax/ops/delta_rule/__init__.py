"""The delta rule: a linear recurrence that corrects what the state answers to a key. `delta_rule`."""

from attention_jax.ops.delta_rule.api import delta_rule, delta_weights

__all__ = ["delta_rule", "delta_weights"]
