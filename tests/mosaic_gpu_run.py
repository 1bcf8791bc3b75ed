"""Runs one attention problem through the interpreted Mosaic GPU kernels, in a process of its own.

    python -m tests.mosaic_gpu_run '{"lengths": [150, 200], "dtype": "bfloat16"}' [fused]

Outputs and gradients are compared with float64 by tests.problems.check; then races are read out. It
prints "fused" if a backward ran as one kernel. The process fails, or hangs where a barrier is missed: whoever
starts it sets a limit.
"""

from __future__ import annotations

import json
import os
import sys

# An interpreted warpgroup that waits holds a thread of XLA's pool, which has one per core: two kernels at
# once would hang on two cores.
os.environ.setdefault("NPROC", "16")

from tests import conftest, mosaic_gpu_shim  # noqa: F401 (conftest: quick compilation, full precision)


def main(words: dict, kind: str) -> None:
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from attention_jax.ops.softmax import MosaicGPUConfig, mosaic_gpu
    from attention_jax.ops.softmax.mosaic_gpu import backward_fused
    from tests.cases import OpCase
    from tests.problems import check

    case = OpCase(**{name: tuple(x) if isinstance(x, list) else x for name, x in words.items()})
    mosaic_gpu_shim.install()
    config = MosaicGPUConfig(deterministic=kind != "fused")
    fused, calls = backward_fused.gradients_fused, []
    backward_fused.gradients_fused = lambda *arguments: calls.append("fused") or fused(*arguments)
    params = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
    with mosaic_gpu.any_platform(), plgpu.force_gpu_interpret_mode(params):
        check(case, config)
    assert not gpu_callbacks.get_races().races_found, "the interpreter found races"
    print(*set(calls))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "two kernels")
