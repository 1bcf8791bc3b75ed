"""Compares a step of the Mosaic GPU kernels, in machine code, with one of JAX's own attention for Hopper.

python -m tests.sass_report [NAME ...] [--kernels forward q kv fused] [--jax] [--json FILE]

NAME is a configuration of tests/aot_gpu.py; no GPU is needed, only what that needs. The loop that a computing
warpgroup stays in is found in the SASS, and in it the path of most wgmma instructions, which is what all
steps but a row's last run. Counts are of that path, per thread and tile of 64 x 128 scores, 128 being keys in
the forward and in dQ and queries in dK and dV. From them, in cycles per tile of one warpgroup:

  tensor, mufu, fp32, alu, issue   busy cycles of that unit. Warpgroups share the units and each has a tile:
                                   at best a tile takes the largest of these.
  alone                            one warpgroup by itself: in-order issue, stalls and scoreboards as ptxas
                                   scheduled them, typical latencies, every barrier open.
  bare                             of these the cycles in which none of its own products is in flight.
  together                         all warpgroups of a thread block at once; in the forward they take turns.

Two warpgroups hide each other's bare cycles while bare <= tensor. It is a model: no card has confirmed it.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests import aot_gpu

# Columns by what an opcode starts with; the first that matches counts.
COLUMNS = {
    "HGMMA": "HGMMA", "MUFU": "MUFU", "FFMA": "FFMA", "FMUL": "FMUL", "FADD": "FADD", "FMNMX": "FMNMX",
    "F2FP": "F2FP", "SHFL": "SHFL", "matrix LDS": "LDSM|STSM", "LDS": "LDS|STS", "wait": "WARPGROUP",
    "barrier": "SYNCS|BAR|MEMBAR|FENCE", "select": "FSEL|FSETP|ISETP|SEL|PLOP|PRMT",
    "branch": "BRA|BSSY|BSYNC", "uniform": "U[A-Z]|R2UR|S2UR|VOTEU",
    "integer": "IMAD|IADD|LEA|SHF|LOP|MOV|VIADD|IABS|CS2R|I2F",
}  # fmt: skip
FP32 = ("FFMA", "FMUL", "FADD")  # a cycle for a warp
ALU = ("FMNMX", "F2FP", "select", "integer")  # two, half the lanes
LATENCY = {
    "MUFU": 18,
    "SHFL": 24,
    "LDS": 30,
    "LDSM": 33,
    "SYNCS": 22,
    "LDG": 40,
    "LDC": 30,
    "BAR": 24,
    "MEMBAR": 30,
}
WGMMA_LATENCY = 32  # of a product beyond the cycles it keeps the tensor cores
LINE = re.compile(r"\s*([\d&-]+):([\d-]):([\d-]):[Y-]:(\d+)\s+/\*[0-9a-f]+\*/\s+(.*?)\s*$")
JAX = {"forward": ("forward", 0), "q": ("backward", 0), "kv": ("backward", 1)}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of SASS: scoreboards it waits for, those it sets, cycles until the next may issue."""

    waits: str
    sets: str
    stall: int
    text: str

    @property
    def opcode(self) -> str:
        return re.sub(r"^@!?U?P\w+\s+", "", self.text).split()[0]

    @property
    def columns(self) -> int:
        """Of a wgmma instruction: n of m64 n k16; else 0."""
        found = re.match(r"HGMMA\.64x(\d+)x16", self.opcode)
        return int(found[1]) if found else 0

    @property
    def busy(self) -> int:
        """Cycles a wgmma keeps the tensor cores: its arithmetic, or its operands at 128 bytes a cycle.

        The right one comes from shared memory, the left one, 64 x 16, from there or from registers.
        """
        left = 64 if re.search(r"HGMMA\S+ R\d+, gdesc", self.text) else 0
        return max(self.columns // 2, (left + self.columns) * 16 * 2 // 128)


def loops(path: Path) -> list[list[Instruction]]:
    """The loops with products, outermost ones without an inner one, in program order: their longest paths."""
    code, labels, found = [], {}, []
    for line in path.read_text().splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif at := LINE.match(line):
            code.append(Instruction(at[1], at[2] + at[3], int(at[4]), at[5]))
    target = [labels.get(m[1]) if (m := re.search(r"BRA.*`\((\.L_\w+)\)", x.text)) else None for x in code]
    for end, start in enumerate(target):
        if start is not None and start <= end:
            body = code[start : end + 1]
            if any(x.columns for x in body) and not any(x.opcode == "EXIT" for x in body):
                found.append((start, end))
    inner = [a for a in found if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in found)]
    return [_path(code, target, start, end) for start, end in inner]


def _path(code: list[Instruction], target: list[int | None], start: int, end: int) -> list[Instruction]:
    """From start to end by the branches that pass the most products."""
    value, after = {end: 0}, {}
    for i in range(end - 1, start - 1, -1):
        aside = target[i] if target[i] is not None and i < target[i] <= end else None
        always = code[i].opcode == "BRA" and not code[i].text.startswith("@")
        choices = ([] if always and aside is not None else [i + 1]) + ([] if aside is None else [aside])
        after[i] = max(choices, key=lambda j: value[j])
        value[i] = value[after[i]] + code[i].columns
    path = [start]
    while path[-1] != end:
        path.append(after[path[-1]])
    return [code[i] for i in path]


def counts(path: Sequence[Instruction]) -> collections.Counter:
    """Instructions by column."""
    kinds = (next((n for n, p in COLUMNS.items() if re.match(p, x.opcode)), "other") for x in path)
    return collections.Counter(kinds)


class _Warp:
    """One warp of a warpgroup that repeats a path: in order, stalls and scoreboards as ptxas set them."""

    def __init__(self, path: Sequence[Instruction], units: dict[str, float], turns: bool):
        self.path, self.units = path, units
        self.now = self.bare = self.at = 0
        self.boards: dict[str, int] = {}
        self.groups: list[float] = []  # when each product issued so far is done
        self.marks: list[tuple[int, int]] = []  # (now, bare) at the start of each round
        self.takes, self.passes = _turn(path) if turns else (None, None)

    def ready(self) -> float:
        """When the next instruction can issue."""
        x = self.path[self.at]
        times = [self.now, self.units["port"], *(self.boards.get(b, 0) for b in re.findall(r"\d", x.waits))]
        if self.at == self.takes:
            times.append(self.units["turn"] if self.units["holder"] is None else math.inf)
        if wait := re.search(r"DEPBAR\.LE gsb0, 0x(\d+)", x.text):
            times += self.groups[: max(0, len(self.groups) - int(wait[1]))]
        return max(times)

    def issue(self) -> None:
        """The next instruction."""
        if self.at == 0:
            self.marks.append((self.now, self.bare))
        x, units, was, now = self.path[self.at], self.units, self.now, self.ready()
        if self.at == self.takes:
            units["holder"] = self
        units["port"] = now + 1
        self.bare += max(0, now + x.stall - max(was, units["tensor"]))
        if x.columns:
            units["tensor"] = max(units["tensor"], now) + x.busy
            if "gsb0" in x.text:
                self.groups.append(units["tensor"] + WGMMA_LATENCY)
        kind = x.opcode.split(".")[0]
        ready = now + LATENCY.get(kind, 10)
        if kind == "MUFU":  # a quarter of the lanes of an eighth: 8 cycles for a warp
            units["mufu"] = max(units["mufu"], now) + 8
            ready = units["mufu"] + LATENCY[kind] - 8
        for board in re.findall(r"\d", x.sets):
            self.boards[board] = max(self.boards.get(board, 0), ready)
        if self.at == self.passes:
            units["turn"], units["holder"] = now + LATENCY["SYNCS"], None
        self.now, self.at = now + x.stall, (self.at + 1) % len(self.path)


def _turn(path: Sequence[Instruction]) -> tuple[int, int]:
    """(first, last) product of a turn on the tensor cores, which ends where the exponentials begin."""
    marks = [i for i, x in enumerate(path) if x.columns or x.opcode.startswith("MUFU.EX2")]
    edges = [(i, j) for i, j in zip(marks, marks[1:] + marks[:1], strict=True)]
    first = [j for i, j in edges if path[j].columns and not path[i].columns]
    last = [i for i, j in edges if path[i].columns and not path[j].columns]
    return first[0], last[0]


def cycles(path: Sequence[Instruction], warps: int, turns: bool = False) -> tuple[int, int]:
    """(cycles of a step of each of `warps` that share a scheduler, those without a product in flight).

    turns: the products from one warp's exponentials to its next are not interleaved with another's.
    """
    units: dict[str, Any] = dict.fromkeys(("port", "tensor", "mufu", "turn"), 0) | {"holder": None}
    running, rounds = [_Warp(path, units, turns) for _ in range(warps)], 12 if warps > 1 else 4
    while any(len(w.marks) <= rounds for w in running):
        min(running, key=_Warp.ready).issue()
    (t0, b0), (t1, b1) = running[0].marks[rounds // 2], running[0].marks[rounds]
    return (t1 - t0) * 2 // rounds, (b1 - b0) * 2 // rounds


def measured(path: Sequence[Instruction], block: int, warpgroups: int, turns: bool) -> dict[str, Any]:
    """The row of a loop whose step is 64 x block scores."""
    share = 128 / block
    found = {name: n * share for name, n in counts(path).items()}
    get = lambda *names: sum(found.get(n, 0) for n in names)  # noqa: E731
    (alone, bare), (together, _) = cycles(path, 1), cycles(path, warpgroups, turns)
    model = {
        "tensor": sum(x.busy for x in path if x.columns) * share, "mufu": 8 * get("MUFU"), "fp32": get(*FP32),
        "alu": 2 * get(*ALU), "issue": len(path) * share, "alone": alone * share, "bare": bare * share,
        "together": together * share / warpgroups,
    }  # fmt: skip
    return {"counts": {n: round(found.get(n, 0)) for n in (*COLUMNS, "other")}} | {
        n: round(x) for n, x in model.items()
    }


def _ours(name: str, kernel: str) -> tuple[int, int]:
    """(block, warpgroups that compute)."""
    program, shapes, chosen = aot_gpu._program(aot_gpu.CONFIGS[name], kernel)
    aot_gpu.compile_for_h100(program, shapes)
    return chosen[0].block, chosen[0].warpgroups


def _jax(name: str, direction: str) -> int:
    """JAX's kernels at our blocks: in float16, which they are written for, and without a mask's backward."""
    import types

    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    config = aot_gpu.CONFIGS[name]
    width, (length, _), (N, K) = config.widths[0], config.lengths, config.heads
    attention_mgpu.cuda_versions = types.SimpleNamespace(cuda_runtime_get_version=lambda: 13000)
    block = 128 if width <= 128 else 64
    tuning = attention_mgpu.TuningConfig(
        64, block, 2, causal=config.mask == "Causal()", compute_wgs_bwd=2, block_q_dkv=64, block_kv_dkv=64,
        block_q_dq=64, block_kv_dq=64,
    )  # fmt: skip
    q, k = (jax.ShapeDtypeStruct((2, length, n, width), jnp.float16) for n in (N, K))
    lse = jax.ShapeDtypeStruct((2, N, length), jnp.float32)
    if direction == "forward":
        aot_gpu.compile_for_h100(lambda x: attention_mgpu._attention_forward(*x, tuning, True), (q, k, k))
        return block
    aot_gpu.compile_for_h100(
        lambda x: attention_mgpu._attention_bwd(tuning, True, x[:5], x[5]), (q, k, k, q, lse, q)
    )
    return 64


def _jax_has(name: str, kernel: str) -> bool:
    """Widths that are multiples of 64, and in the backward no mask."""
    config = aot_gpu.CONFIGS[name]
    return config.widths[0] % 64 == 0 and (kernel == "forward" or (kernel in JAX and config.mask == "Full()"))


def _rows(system: str, name: str, kernel: str) -> list[dict[str, Any]]:
    """In a process of its own: jax compiles equal kernels once, and then dumps nothing."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MOSAIC_GPU_DUMP_TO"] = folder
        direction, number = JAX.get(kernel, ("", 0)) if system == "jax" else ("", 0)
        block, warpgroups = (_jax(name, direction), 2) if system == "jax" else _ours(name, kernel)
        code = sorted(Path(folder).glob("*.sass*"))[number]
        logs = sorted(Path(folder).glob("*.ptxas"))[number].read_text()
        registers = max(int(n) for n in re.findall(r"\bR(\d+)\b", code.read_text())) + 1
        spills = sum(map(int, re.findall(r"(\d+) bytes spill", logs)[-2:]))
        start = {"system": system, "name": name, "kernel": kernel, "block": block, "registers": registers}
        model = functools.partial(measured, block=block, warpgroups=warpgroups, turns=kernel == "forward")
        return [start | {"spills": spills} | model(path) for path in loops(code)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", default=["64 full", "128 full", "128 causal"])
    parser.add_argument("--kernels", nargs="+", default=["forward", "q", "kv", "fused"])
    parser.add_argument("--jax", action="store_true", help="JAX's kernels too, where they have the mask")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(argv)
    jobs = [("ours", name, kernel) for name in given.names for kernel in given.kernels]
    if given.jax:
        jobs += [("jax", n, k) for _, n, k in jobs if _jax_has(n, k)]
    jobs.sort(key=lambda job: (given.names.index(job[1]), given.kernels.index(job[2])))
    model, rows = ("tensor", "mufu", "fp32", "alu", "issue", "alone", "bare", "together"), []
    head = ("kernel", "block", "registers", *model, *COLUMNS, "other")
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        for job in jobs:
            for row in pool.submit(_rows, *job).result():
                rows.append(row)
                cells = (" ".join(job), row["block"], row["registers"], *(row[x] for x in model))
                print(f"| {' | '.join(map(str, (*cells, *row['counts'].values())))} |", flush=True)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    # Both must be set before jax starts: no GPU is wanted, and none is checked for.
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    sys.exit(main())
