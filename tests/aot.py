"""Cross-compiles REAL_SHAPES for TPUs: `python -m tests.aot TOPOLOGY NAME ...`.

libtpu contains the compiler. It refuses what a chip refuses: too much VMEM, illegal blocks, unknown dtypes.
Every run is a process of its own with a timeout, for a compiler may abort; it prints a line of JSON for each
shape.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parent.parent
# A machine of its own: no metadata server is asked, several processes may load the library.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def missing() -> str | None:
    """Why nothing can be compiled here; None where it can."""
    return None if importlib.util.find_spec("libtpu") else "libtpu is not installed (`make kernels` does it)"


def run(*arguments: str, timeout: float, module: str = "tests.aot", **environment: str) -> list[dict]:
    """Runs `python -m module arguments` from the root; the JSON lines it prints."""
    env = os.environ | ENVIRONMENT | environment | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=ROOT, env=env, timeout=timeout, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, f"{module} {arguments}: exit {done.returncode}\n{done.stderr[-4000:]}"
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@contextlib.contextmanager
def target(topology: str, shape: tuple[int, ...] = (1,), names: tuple[str, ...] = ("x",)):
    """A mesh of that topology's devices; inside, programs are lowered for them."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh

    from attention_jax.ops.softmax import mosaic_tpu

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh(np.array(devices[: int(np.prod(shape))]).reshape(shape), names)
    with mosaic_tpu.forced(False), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield mesh


def program(shape, mesh, spec=None):
    """(a jitted forward and backward of a RealShape's layer through the TPU kernels, its arguments)."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from attention_jax.ops.softmax import mosaic_tpu
    from attention_jax.ops.softmax.api import _checked_call

    spec = PartitionSpec() if spec is None else spec

    def attend(q, k, v):
        call = _checked_call(q, k, v, shape.mask, softcap=shape.softcap)
        why_not = mosaic_tpu.unsupported(call)
        assert why_not is None, why_not
        return mosaic_tpu.attend(call)[0]

    if mesh.size > 1:
        attend = jax.shard_map(attend, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)

    @jax.jit
    def both(q, k, v, dout):
        out, vjp = jax.vjp(attend, q, k, v)
        return out, vjp(dout)

    B, T, S, N, K, H, M = shape.sizes
    sharding = NamedSharding(mesh, spec)
    arguments = [
        jax.ShapeDtypeStruct(x, shape.dtype, sharding=sharding)
        for x in ((B, T, N, H), (B, S, K, H), (B, S, K, M), (B, T, N, M))
    ]
    return both, arguments


def main(topology: str, *names: str) -> None:
    from jax.sharding import PartitionSpec

    from tests.cases import REAL_SHAPES

    for name in names:
        started = time.monotonic()
        split = name.startswith("2x2 ")
        with target(topology, (2, 2) if split else (1,), ("data", "heads") if split else ("x",)) as mesh:
            spec = PartitionSpec("data", None, "heads") if split else None
            both, arguments = program(REAL_SHAPES[name.removeprefix("2x2 ")], mesh, spec)
            lowered = both.lower(*arguments)
        compiled = lowered.compile()
        text = compiled.as_text()
        memory = compiled.memory_analysis()
        print(json.dumps({
            "name": name, "kernels": text.count("tpu_custom_call"), "temporary": memory.temp_size_in_bytes,
            "collectives": sum(text.count(x) for x in ("all-gather(", "all-reduce(", "all-to-all(")),
            "seconds": round(time.monotonic() - started, 1),
        }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
