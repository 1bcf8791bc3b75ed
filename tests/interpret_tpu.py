"""The TPU kernels in the interpreter, in a process of its own (tests/test_mosaic_tpu.py).

    python -m tests.interpret_tpu [--vmem=BYTES] NUMBER|promises|model ...

checks cases of tests.cases.tpu_cases by number, tests.promises, or a whole language model. The interpreter
raises on reads out of bounds and fills memory that nobody wrote with NaN; races are counted. Blocks are made
small, so that short rows already have empty, full and partial ones.
--vmem: a chip with so little memory that dQ comes in parts.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time

# A test's worker has one core, and so have the processes that it starts. There XLA has one thread, on which
# some programs wait for the interpreter's callbacks, which need it too.
os.environ.pop("PYTEST_XDIST_WORKER", None)
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, range(os.cpu_count() or 1))

import tests.conftest  # noqa: F401 (compile quickly, multiply in full precision)

from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # isort: skip
from jax.experimental.pallas import tpu as pltpu  # isort: skip

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax import AttentionConfig, Context, ModelConfig, RoPE, SlidingWindow, apply
from attention_jax.ops.softmax import MosaicTPUConfig, mosaic_tpu
from tests import problems, promises
from tests.cases import tpu_cases
from tests.params import random_params

PARAMS = pltpu.InterpretParams(
    detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan", dma_execution_mode="on_wait"
)

# The smallest blocks: 128 lanes both ways.
SMALL = MosaicTPUConfig((128, 128), (128, 128))


def check_promises() -> None:
    """What every implementation promises beyond numbers."""
    promises.a_large_common_score_changes_nothing(SMALL)
    for sinks in (False, True):
        promises.rows_without_a_key_give_zero(SMALL, sinks)
    for case in (promises.HOLES, promises.RING):
        promises.an_invalid_slot_changes_no_bit(SMALL, case)
    for case in promises.SEEN:
        promises.a_hidden_key_changes_no_bit(SMALL, case)
    promises.a_hidden_key_may_be_as_large_as_its_dtype(SMALL)


def model() -> None:
    """A language model of two layers over packed documents: with the kernels it is that with `chunked`."""
    mixers = (
        AttentionConfig(num_heads=2, num_kv_heads=1, mask=SlidingWindow(70), rope=RoPE(), sink_logits=True),
        AttentionConfig(num_heads=2, num_kv_heads=1, bias="alibi", softcap=20.0),
    )
    T = 150
    segments = np.array([[0] * 60 + [1] * 80 + [-1] * 10])
    positions = np.array([[*range(60), *range(80), *[-1] * 10]])
    tokens = np.random.default_rng(0).integers(0, 50, (1, T))
    found = {}
    for impl in ("mosaic_tpu", "chunked"):
        layers = tuple(dataclasses.replace(mixer, impl=impl) for mixer in mixers)
        config = ModelConfig(vocab_size=50, d_model=16, num_layers=2, mixers=layers)
        ctx = Context(positions_BT=positions, segment_ids_BT=segments)

        def loss(params, config=config, ctx=ctx):
            logits_BTV = apply(config, params, tokens, ctx=ctx).logits
            return jnp.sum(jnp.where(segments[..., None] < 0, 0, jnp.sin(logits_BTV))), logits_BTV

        found[impl] = jax.jit(jax.grad(loss, has_aux=True))(random_params(config))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *found.values())


def main(*what: str) -> None:
    config = SMALL
    for name in what:
        if name.startswith("--vmem="):
            config = dataclasses.replace(SMALL, vmem_bytes=int(name.removeprefix("--vmem=")))
            continue
        started = time.monotonic()
        with mosaic_tpu.forced(PARAMS):
            if name in ("promises", "model"):
                {"promises": check_promises, "model": model}[name]()
            else:
                problems.check(tpu_cases()[int(name)], config)
        races = interpret_pallas_call.races
        assert races is not None and not races.races_found, f"races in {name}"
        print(json.dumps({"checked": name, "seconds": round(time.monotonic() - started, 1)}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
