"""Numeric tests compare with float64: matrix products run in full precision on every platform."""

import jax

jax.config.update("jax_default_matmul_precision", "highest")
