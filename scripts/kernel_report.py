"""What the TPU compiler makes of our kernels and of JAX's splash attention.

    python scripts/kernel_report.py --topology v5e:2x2 --widths 64 128

Shapes and blocks are equal. No TPU is needed, only libtpu. A bundle is what a
TPU core issues in a cycle. Cycles without an instruction are scheduled and then
folded into delays, so code has fewer bundles than cycles: cycles are the cost
of a live block as the compiler sees it, bundles count its instructions. Busy is
the share of cycles in which the matrix units are taken. Where a kernel has two
bodies, the first is that of full blocks, the second that of partial ones.

The backward of splash attention has two forms: one kernel for dQ and one for
dK and dV, whose costs add up, and one kernel for all three that writes a
partial dQ per key block to HBM.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from train import command_line
from train.commands.types import Count, Counts, MaybePath, MaybeText

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Body:
    """A region of a kernel's schedule without branches that multiplies matrices: what a live block runs.

    Spills and fills are registers written to memory and read back.
    """

    bundles: int
    cycles: int
    spills: int
    fills: int
    busy: float


def bodies(folder: Path, kernel: str) -> list[Body]:
    """The bodies of the kernel whose dumped name contains `kernel`, in program order."""
    (final,) = _dumps(folder, kernel, "final_bundles")
    prefix = re.sub(r"\d+-final_bundles\.txt$", "", final.name)
    # Before empty bundles are folded into delays.
    (scheduled,) = _dumps(folder, prefix, "packed-bundles-post-ra")
    (used,) = _dumps(folder, prefix, "pre-delay_hlo-static-per-bundle-utilization")
    names, capacity, rows = _utilization(used)
    bundles, found = _regions(final), []
    for number, (start, end) in _leaves(_regions(scheduled)):
        total = [sum(column) for column in zip(*rows[start : end + 1], strict=True)]
        sums, cycles = dict(zip(names, total, strict=True)), end - start + 1
        if sums["MATMUL"]:
            first, last = bundles[number]
            busy = round(sums["MATMUL"] / (capacity["MATMUL"] * cycles), 3)
            found.append(Body(last - first + 1, cycles, sums["VSTORE:SPILL"], sums["VLOAD:FILL"], busy))
    return found


def _dumps(folder: Path, name: str, ending: str) -> list[Path]:
    return [x for x in folder.glob(f"*-{ending}.txt") if name in x.name]


def _utilization(path: Path) -> tuple[list[str], dict[str, int], list[list[int]]]:
    """(slots by name, how many a bundle has of each, how many each bundle uses)."""
    lines = path.read_text().splitlines()
    names = next(line for line in lines if line.startswith("MATMUL")).replace(" ", "").split(",")
    numbers = [[int(x) for x in line.split()] for line in lines if re.fullmatch(r"[\d\s]*\d[\d\s]*", line)]
    return names, dict(zip(names, numbers[0], strict=True)), numbers[1:]


def _regions(path: Path) -> dict[str, tuple[int, int]]:
    """First and last bundle of each region, by its number, which is the same in all dumps of a kernel."""
    spans: dict[str, list[int | None]] = {}
    for line in path.read_text().splitlines():
        at = re.match(r"\s*(0x[0-9a-f]+|0)\s", line)
        for which, number in re.findall(r"(Start|End) region (\d+)", line) if at else ():
            spans.setdefault(number, [None, None])[which == "End"] = int(at[1], 16)
    return {number: (a, b) for number, (a, b) in spans.items() if a is not None and b is not None}


def _leaves(regions: dict[str, tuple[int, int]]) -> list[tuple[str, tuple[int, int]]]:
    """The regions that hold no other region, in program order."""
    spans = regions.values()
    found = [(number, (a, b)) for number, (a, b) in regions.items()
             if not any(a <= x and y <= b and (x, y) != (a, b) for x, y in spans)]  # fmt: skip
    return sorted(found, key=lambda x: x[1])


def _compile(system: str, topology: str, length: int, width: int) -> None:
    """In a process of its own: libtpu reads its flags once."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh(np.array(devices[:1]), ("x",))
    N, K = 2, 1
    sharding = NamedSharding(mesh, PartitionSpec())

    def shape(*sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, jnp.bfloat16, sharding=sharding)

    if system == "ours":
        attend = _ours
        arguments = [shape(1, length, n, width) for n in (N, K, K, N)]
    else:
        attend = _splash(length, width, fused=system == "splash fused")
        arguments = [shape(n, length, width) for n in (N, K, K, N)]

    def both(q, k, v, dout):
        out, vjp = jax.vjp(attend, q, k, v)
        return out, vjp(dout)

    from attention_jax.ops.softmax import mosaic_tpu

    with mosaic_tpu.forced(False), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(both).lower(*arguments)
    lowered.compile()


def _ours(q, k, v):
    from attention_jax.masks import Causal
    from attention_jax.ops.softmax import api, mosaic_tpu

    return mosaic_tpu.attend(api._checked_call(q, k, v, Causal()))[0]


def _splash(length: int, width: int, fused: bool) -> Any:
    """Causal splash attention with our blocks."""
    import jax
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    from attention_jax.ops.softmax import MosaicTPUConfig

    (q, k), (q_back, k_back) = (MosaicTPUConfig().blocks(width, 2, backward) for backward in (False, True))
    sizes = splash.BlockSizes(
        block_q=q, block_kv=k, block_kv_compute=k, block_q_dkv=q_back, block_kv_dkv=k_back,
        block_kv_dkv_compute=k_back, block_q_dq=None if fused else q_back,
        block_kv_dq=None if fused else k_back, use_fused_bwd_kernel=fused,
    )  # fmt: skip
    mask = splash.MultiHeadMask([splash.CausalMask((length, length))] * 2)
    with jax.ensure_compile_time_eval():
        return splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)


# What to call, the name its kernels have in the dump, forward or backward.
_KERNELS = {
    "ours": [("forward", "attention_forward"), ("backward", "attention_backward")],
    "splash": [("forward", "splash_mha_fwd"), ("backward", "splash_mha_dq"), ("backward", "splash_mha_dkv")],
    "splash fused": [("backward", "splash_mha_dkv")],
}


def report(topology: str, length: int, width: int) -> list[dict[str, Any]]:
    """A row per kernel: its bodies, full blocks before partial ones where they differ."""
    rows = []
    for system, kernels in _KERNELS.items():
        with tempfile.TemporaryDirectory() as folder:
            environment = os.environ | {
                "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true",
                "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
                "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "PYTHONPATH": str(ROOT),
            }  # fmt: skip
            command = [sys.executable, __file__, "--compile", system, "--topology", topology,
                       "--length", str(length), "--widths", str(width)]  # fmt: skip
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=580)
            if done.returncode:
                raise RuntimeError(f"{system} did not compile: {done.stderr[-2000:]}")
            for direction, name in kernels:
                rows.append({
                    "topology": topology, "width": width, "system": system, "direction": direction,
                    "kernel": name,
                    "bodies": [dataclasses.asdict(x) for x in bodies(Path(folder), name)],
                })  # fmt: skip
    return rows


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line gives."""

    topology: str = "v5e:2x2"  #: the TPU to compile for
    widths: Counts = (64, 128)  #: head widths
    length: Count = 2048  #: tokens
    json: MaybePath = None  #: also write the rows to this file
    #: compile one system and stop; the report calls itself with it
    compile: Annotated[MaybeText, tyro.conf.Suppress] = None


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, the process's own if None; the exit status."""
    return command_line.run(Options, _main, __doc__, argv)


def _main(given: Options) -> None:
    if given.compile:
        _compile(given.compile, given.topology, given.length, given.widths[0])
        return
    rows = [row for width in given.widths for row in report(given.topology, given.length, width)]
    names = ("bundles", "cycles", "spills", "busy")
    print(f"{'chip':9} {'width':>5} {'kernel':20}", *(f"{x:>13}" for x in names), "  per live block")
    for row in rows:
        cells = (" / ".join(str(body[key]) for body in row["bodies"]) for key in names)
        name = f"{row['kernel']}{' fused' * (row['system'] == 'splash fused')}"
        print(f"{row['topology']:9} {row['width']:5} {name:20}", *(f"{x:>13}" for x in cells))
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
