"""Numeric tests compare with float64: matrix products run in full precision on every platform."""

import os

# Each pytest-xdist worker gets a core of its own, before jax counts them: two runtimes whose threads spin
# for each other's cores take several times as long.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

import jax

jax.config.update("jax_default_matmul_precision", "highest")
