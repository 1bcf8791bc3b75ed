"""How tests run: a core per worker, quick compilation, full precision of matrix products everywhere."""

import atexit
import importlib.metadata
import os
import shutil
import signal
import tempfile

# Each pytest-xdist worker gets a core of its own, before jax counts them: two runtimes whose threads spin
# for each other's cores take several times as long.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

# Nearly all time goes into compiling programs that run once. LLVM's optimisations make that two to four
# times longer; XLA's own passes stay on. Tests of what users run ask for them again (tests.problems.USERS).
_QUICK = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if int(importlib.metadata.version("jax").split(".")[1]) < 11:
    _QUICK += " --xla_cpu_use_fusion_emitters=false"  # the older emitters, which later versions lack
else:
    _QUICK += " --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_QUICK}".strip()

# A shell ignores SIGINT for what it runs in the background, nohup SIGHUP; programs started here inherit that.
for number, usual in {
    signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL,
}.items():  # fmt: skip
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)

# What commands in processes of their own compile is kept for the session, in a folder that workers share:
# never in the user's.
if not worker:
    os.environ["ATTENTION_JAX_COMPILATION_CACHE"] = tempfile.mkdtemp(prefix="attention_jax-compiled-")
    atexit.register(shutil.rmtree, os.environ["ATTENTION_JAX_COMPILATION_CACHE"], ignore_errors=True)

import jax  # noqa: E402 (after the environment it reads)
import pytest  # noqa: E402

# Shared modules whose assertions show their values as those of test modules do.
pytest.register_assert_rewrite("tests.problems", "tests.promises", "tests.runs")

jax.config.update("jax_default_matmul_precision", "highest")
