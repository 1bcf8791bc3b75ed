"""What a run's numbers depend on outside its configuration: packages, jax's settings, the device.

`record` is saved in versions.json and in every checkpoint. A setting that changes random numbers, dtypes or
the precision of matrix products (`SETTINGS`) must be what it was when a checkpoint was made; any other
difference is reported.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
from typing import Any

import jax

from train.processor import first_core

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
#: What changes the order of sums and the compiler's choices; flags and another platform may change more.
LAST_BITS = ("python", *_PACKAGES, "device", "devices", "processor")
#: Settings that change random numbers, dtypes or the precision of matrix products.
SETTINGS = (
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_random_seed_offset",
    "jax_high_dynamic_range_gumbel",
    "jax_enable_x64",
    "jax_default_dtype_bits",
    "jax_numpy_dtype_promotion",
    "jax_default_matmul_precision",
    "NVIDIA_TF32_OVERRIDE",
)
# Other settings that may change numbers, most of them in the last bits.
_COMPILER = (
    "jax_allow_f16_reductions",
    "jax_softmax_custom_jvp",
    "jax_disable_jit",
    "jax_disable_most_optimizations",
    "jax_optimization_level",
    "jax_exec_time_optimization_effort",
    "jax_enable_pgle",
)
_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
# Flags that only say what is written where, or how many threads compile; the number of devices has a record
# of its own.
_NO_MATTER = re.compile(
    r"--(xla_dump|xla_log|xla_hlo_profile|xla_gpu_force_compilation_parallelism|xla_cpu_parallel_codegen"
    r"|xla_force_host_platform_device_count|xla_gpu_enable_llvm_module_compilation_parallelism)"
)


def record() -> dict[str, Any]:
    """Names to JSON scalars: Python, packages, settings, flags and the device. A jax without a setting has
    no entry for it.
    """
    found: dict[str, Any] = {"python": platform.python_version()}
    found |= {package: importlib.metadata.version(package) for package in _PACKAGES}
    for name in (*SETTINGS, *_COMPILER):
        if name.isupper():
            found[name] = os.environ.get(name)
        elif hasattr(jax.config, name):
            found[name] = _scalar(getattr(jax.config, name))
    found |= {name: _flags(os.environ.get(name, "")) for name in _VARIABLES}
    device = jax.devices()[0]
    found |= {"platform": device.platform, "device": device.device_kind, "devices": jax.device_count()}
    if device.platform == "cpu":
        found["processor"] = _processor()
    return found


def differences(saved: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """The names that both records have, with "was OLD and is NEW", where they differ.

    A record of an earlier version lacks names: they are not compared.
    """
    return {
        name: f"was {_show(old)} and is {_show(now[name])}"
        for name, old in saved.items()
        if name in now and now[name] != old
    }


def _scalar(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _show(value: Any) -> str:
    return "not set" if value in (None, "") else str(value)


def _flags(text: str) -> str:
    """The flags that may change numbers, sorted; of a flag given twice the last one counts."""
    given = {}
    for flag in text.split():
        if not _NO_MATTER.match(flag):
            given[flag.partition("=")[0]] = flag
    return " ".join(given[name] for name in sorted(given))


def _processor() -> str:
    """The architecture and a hash of its instruction sets, on which the order of XLA's sums depends."""
    core = first_core()
    if not core:
        return platform.machine()
    names = " ".join(sorted(core.get("flags", core.get("Features", "")).split()))
    return f"{platform.machine()} {hashlib.sha256(names.encode()).hexdigest()[:12]}"
