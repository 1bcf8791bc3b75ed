"""Cross-compiles the Mosaic GPU kernels for an H100 and reports registers, spills and instructions.

    python -m tests.aot_gpu                  the table of docs/results/h100-kernels.md, all configurations
    python -m tests.aot_gpu NAME ... --json  some of them, as JSON

Needs the CUDA plug-in packages of the installed jax: jax-cuda13-plugin, jax-cuda13-pjrt, nvidia-cuda-nvcc,
nvidia-nvvm and, for machine code, nvidia-cuda-nvdisasm. A compiler that meets the wrong target may abort the
process: run this in a process of its own.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import importlib.util
import json
import multiprocessing
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

TARGET = pathlib.Path(__file__).parent / "aot" / "h100_sxm.txtpb"
KERNELS = ("forward", "q", "kv", "fused")


@dataclasses.dataclass(frozen=True)
class Config:
    """One compilation: a call at a real size, and which of its kernels."""

    kernels: tuple[str, ...] = KERNELS
    widths: tuple[int, int] = (128, 128)
    heads: tuple[int, int] = (16, 4)
    lengths: tuple[int, int] = (4096, 4096)
    mask: str = "Causal()"
    extras: tuple[str, ...] = ()  # softcap, alibi, forget, gate, positions, segments, sinks, dropout, array
    dtype: str = "bfloat16"
    tiles: dict[str, tuple[int, ...]] | None = None  # kernel: arguments of Tiles in place of the table's


WIDE = {
    "64": (64, 64), "96": (96, 96), "192-128": (192, 128), "192": (192, 192), "256-192": (256, 192),
    "256": (256, 256),
}  # fmt: skip
_TWO = ("forward", "q", "kv")  # the fused backward learns no bias
MARK = -12345  # a number that "128 where" compares differences of positions with, which are signed
_BIGBIRD = "BigBird(64, 3, 1, 2) & Causal()"
_EVERYTHING = ("positions", "segments", "sinks", "alibi", "softcap", "dropout")
CONFIGS = {
    "128 full": Config(mask="Full()"),
    "128 causal": Config(),
    "64 full": Config(widths=(64, 64), mask="Full()"),
    **{f"{name} causal": Config(widths=w) for name, w in WIDE.items()},
    "128 causal fp16": Config(dtype="float16"),
    "128 odd lengths": Config(lengths=(4001, 3999), mask="Full()"),
    "128 window": Config(mask="SlidingWindow(1024)"),
    "128 prefix or chunks": Config(mask="(Prefix(100) | Chunked(512)) & ~Dilated(4, 3)"),
    "128 bigbird": Config(mask=_BIGBIRD),
    "128 longformer": Config(mask="Longformer(512, (0, 100, 2000))"),
    "128 dense": Config(mask="dense"),
    "128 array": Config(extras=("array",)),
    "128 named tokens": Config(mask=f"Longformer(512, {tuple(range(0, 4096, 50))})"),
    "64 bigbird": Config(widths=(64, 64), mask=_BIGBIRD),
    "64 array": Config(widths=(64, 64), extras=("array",)),
    "64 odd lengths": Config(widths=(64, 64), lengths=(4001, 3999), mask="Full()"),
    "64 dropout": Config(widths=(64, 64), extras=("dropout",)),
    "64 alibi positions segments": Config(widths=(64, 64), extras=("alibi", "positions", "segments")),
    "64 bigbird softcap": Config(widths=(64, 64), mask=_BIGBIRD, extras=("softcap",)),
    "96 odd lengths": Config(widths=(96, 96), lengths=(4001, 3999), mask="Full()"),
    "256 array": Config(widths=(256, 256), extras=("array",)),
    "256 bigbird": Config(widths=(256, 256), mask=_BIGBIRD),
    "256 array positions segments": Config(widths=(256, 256), extras=("array", "positions", "segments")),
    "128 bigbird dropout": Config(mask=_BIGBIRD, extras=("dropout",)),
    "128 bigbird softcap alibi": Config(mask=_BIGBIRD, extras=("softcap", "alibi")),
    "256 bigbird dropout": Config(widths=(256, 256), mask=_BIGBIRD, extras=("dropout",)),
    "128 array dropout": Config(extras=("array", "dropout")),
    "256 array dropout": Config(widths=(256, 256), extras=("array", "dropout")),
    "256 bigbird positions segments": Config(
        widths=(256, 256), mask=_BIGBIRD, extras=("positions", "segments")
    ),
    "128 where": Config(("forward", "kv"), mask="where"),
    "128 softcap": Config(extras=("softcap",)),
    "128 alibi": Config(extras=("alibi",)),
    "128 sinks": Config(extras=("sinks",)),
    "128 segments": Config(extras=("segments",)),
    "128 positions segments": Config(extras=("positions", "segments")),
    "128 dropout": Config(extras=("dropout",)),
    **{
        f"{name} forget": Config(_TWO, WIDE.get(name, (128, 128)), extras=("forget",))
        for name in ("64", "128", "256")
    },
    "128 gate": Config(_TWO, extras=("gate",)),
    **{
        f"{name} forget everything": Config(
            _TWO, WIDE.get(name, (128, 128)), extras=("forget", *(x for x in _EVERYTHING if x != "alibi"))
        )
        for name in ("64", "128", "192", "256")
    },
    "128 forget bigbird": Config(_TWO, mask=_BIGBIRD, extras=("forget",)),
    "128 forget array": Config(_TWO, extras=("forget", "array")),
    "128 everything": Config(extras=_EVERYTHING),
    **{
        f"{name} everything": Config(widths=WIDE[name], extras=_EVERYTHING)
        for name in ("64", "96", "192", "256")
    },
}


def missing() -> str | None:
    """What keeps this machine from compiling for a GPU."""
    if importlib.util.find_spec("jax_plugins") is None or not any(
        importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)
    ):
        return (
            "no CUDA plug-in of jax here (jax-cuda13-plugin, jax-cuda13-pjrt, nvidia-cuda-nvcc, nvidia-nvvm)"
        )
    return None


def _call(config: Config, dtype: Any):
    """(a function of arrays that makes the SoftmaxCall, the shapes of those arrays)."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from attention_jax.biases import ALiBi
    from attention_jax.masks import Dense, Predicate, parse
    from attention_jax.mixers.forgetting import ForgetBias
    from attention_jax.ops.softmax.common import SoftmaxCall
    from tests.cases import Gate

    (T, S), (H, M), (N, K) = config.lengths, config.widths, config.heads
    shapes = {"q_BTNH": (2, T, N, H), "k_BSKH": (2, S, K, H), "v_BSKM": (2, S, K, M)}
    shapes = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}
    if "positions" in config.extras:
        shapes["q_positions_BT"] = jax.ShapeDtypeStruct((2, T), jnp.int32)
        shapes["k_positions_BS"] = jax.ShapeDtypeStruct((2, S), jnp.int32)
    if "segments" in config.extras:
        shapes["q_segments_BT"] = jax.ShapeDtypeStruct((2, T), jnp.int32)
        shapes["k_segments_BS"] = jax.ShapeDtypeStruct((2, S), jnp.int32)
    if "sinks" in config.extras:
        shapes["sink_logits_N"] = jax.ShapeDtypeStruct((N,), jnp.float32)
    if "dropout" in config.extras:
        shapes["dropout_words"] = jax.ShapeDtypeStruct((2,), jnp.uint32)
    if "array" in config.extras:
        shapes["mask_BNTS"] = jax.ShapeDtypeStruct((2, N, T, S), jnp.bool_)
    per_token = [jax.ShapeDtypeStruct((2, n, *more), jnp.float32) for n in (T, S) for more in ((), (N,))]
    if "forget" in config.extras:
        shapes["bias"] = ForgetBias(per_token[1], per_token[3], per_token[3])
    if "gate" in config.extras:
        weight, row = (jax.ShapeDtypeStruct((n,), x) for n, x in ((N, jnp.float32), (2, jnp.int32)))
        shapes["bias"] = Gate(weight, per_token[0], per_token[2], row)
    masks = {
        "dense": lambda: Dense(np.random.default_rng(0).random((T, S)) < 0.5),
        "where": lambda: Predicate(lambda q, k: jnp.where(k < 4, 0, k - q) > MARK),
    }
    names = {f.name for f in dataclasses.fields(SoftmaxCall)}
    fixed = dict.fromkeys(names - shapes.keys()) | {
        "mask": masks.get(config.mask, lambda: parse(config.mask))(),
        "scale": H**-0.5,
        "softcap": 30.0 if "softcap" in config.extras else None,
        "dropout_rate": 0.1 if "dropout" in config.extras else 0.0,
    }
    if "alibi" in config.extras:
        fixed["bias"] = ALiBi(N)
    return lambda arrays: SoftmaxCall(**fixed | arrays), shapes


def _program(config: Config, kernel: str):
    import jax.numpy as jnp

    from attention_jax.ops.softmax.mosaic_gpu import backward_fused, backward_kv, backward_q, forward, plan
    from attention_jax.ops.softmax.mosaic_gpu.config import HopperTileSizes

    dtype = jnp.dtype(config.dtype)
    make, shapes = _call(config, dtype)
    tiles = HopperTileSizes(*config.tiles[kernel]) if config.tiles and kernel in config.tiles else None

    plans = {"forward": plan.forward_plan, "q": plan.backward_q_plan, "fused": plan.fused_plan}
    run = {
        "forward": lambda cut, *rest: forward.forward(cut),
        "q": backward_q.gradient_q,
        "kv": backward_kv.gradient_kv,
        "fused": backward_fused.gradients_fused,
    }[kernel]
    chosen = []

    def program(arrays):
        call = plan.clean(make(arrays))
        B, T, _, N, _, _, M = call.sizes
        saved = jnp.zeros((B, N, plan.round_up(T, 128)), jnp.float32)
        cut = plans.get(kernel, plan.backward_kv_plan)(call, tiles)
        chosen[:] = [cut.tiles]
        return run(cut, jnp.zeros((B, T, N, M), dtype), saved, saved)

    return program, shapes, chosen


@functools.cache
def _mesh():
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh

    topology = topologies.get_topology_desc(
        platform="cuda", target_config=TARGET.read_text(), topology="1x1x1"
    )
    return Mesh(np.array(topology.devices), ("x",), axis_types=(AxisType.Explicit,))


def compile_for_h100(program, shapes):
    """The executable of a function of a pytree of ShapeDtypeStructs."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    sharding = NamedSharding(_mesh(), PartitionSpec())
    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes)
    with jax.set_mesh(_mesh()):
        return jax.jit(program).lower(shapes).compile()


def measure(config: Config, kernel: str) -> dict[str, Any]:
    """What the compiler says of a kernel: registers, spills, shared memory, instructions."""
    folder = pathlib.Path(os.environ["MOSAIC_GPU_DUMP_TO"])
    for old in folder.iterdir():
        old.unlink()
    program, shapes, chosen = _program(config, kernel)
    compile_for_h100(program, shapes)
    (log,) = folder.glob("flash_*.ptxas")
    text = log.read_text()
    code = [p.read_text() for p in folder.glob(f"{log.stem}.sass*")]
    ptx = "".join(p.read_text() for p in folder.glob(f"{log.stem}*.ptx"))
    marks = "|".join(str(MARK + i + wrapped) for i in (0, 1) for wrapped in (0, 2**32))
    compared = re.findall(rf"setp\.\w+\.(\w+)\s[^;]*, (?:{marks});", ptx)
    spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)
    code = code[0] if code else ""
    count = lambda name: len(re.findall(rf"\b{name}", code))  # noqa: E731
    return {
        **dataclasses.asdict(chosen[0]),
        # Registers that a thread asks for when it starts to load, and to compute.
        "asked": sorted({int(n) for n in re.findall(r"setmaxnreg\.\w+\.sync\.aligned\.u32\s+(\d+)", ptx)}),
        "stack": int(spills[1]),
        "spills": int(spills[2]) + int(spills[3]),
        "registers": int(re.search(r"Used (\d+) registers", text)[1]),
        "most_registers": max((int(n) for n in re.findall(r"\bR(\d+)\b", code)), default=-1) + 1,
        "shared": int(
            re.search(r"smem_scratch_bytes=(\d+)", (folder / f"{log.stem}.resources.txt").read_text())[1]
        ),
        # ptxas has ten reasons to serialise wgmma and five to ignore setmaxnreg, each with a code of its own.
        "serialized": "are serialized" in text or "'setmaxnreg' ignored" in text,
        "compared": sorted(set(compared)),
        "code": bool(code),
        **{name: count(name) for name in ("HGMMA", "UTMALDG", "UTMASTG", "UTMAREDG", "LDL", "STL")},
    }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="configurations; all by default")
    parser.add_argument("--kernels", nargs="*", choices=KERNELS, default=KERNELS)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    for name in args.names:
        if name not in CONFIGS:
            parser.error(f"no configuration {name!r}; there are {', '.join(CONFIGS)}")
    import jax

    if not args.json:
        print(f"jax {jax.__version__}")
        print("| configuration | kernel | block x stages | registers | shared memory | spills | wgmma |")
        print("|---|---|---|---|---|---|---|")
    # A process for each configuration: jax 0.12 compiles equal kernels once, and then dumps nothing.
    with concurrent.futures.ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1
    ) as pool:
        for name in args.names or CONFIGS:
            kernels = [kernel for kernel in CONFIGS[name].kernels if kernel in args.kernels]
            for kernel, found in pool.submit(_measured, CONFIGS[name], kernels).result():
                if args.json:
                    print(json.dumps({"name": name, "kernel": kernel, **found}), flush=True)
                else:
                    print(f"| {name} | {kernel} | {_row(found)} |", flush=True)


def _measured(config: Config, kernels: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MOSAIC_GPU_DUMP_TO"] = folder
        return [(kernel, measure(config, kernel)) for kernel in kernels]


def _row(found: dict[str, Any]) -> str:
    size = f"{found['block']} x {found['stages']}" + (", 3 groups" if found["warpgroups"] == 3 else "")
    return f"{size} | {found['most_registers']} | {found['shared']:,} | {found['spills']} | {found['HGMMA']}"


if __name__ == "__main__":
    # Both must be set before jax starts: no GPU is wanted, and none is checked for.
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    os.environ["MOSAIC_GPU_DUMP_TO"] = os.environ.get("MOSAIC_GPU_DUMP_TO", tempfile.gettempdir())
    main(sys.argv[1:])
