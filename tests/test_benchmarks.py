"""Benchmarks: whose times are taken how, what a row says, and that no command line of a card is mistaken."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.mosaic.gpu import profiler

import attention_jax
from attention_jax.benchmarks import attention, contestants, eager, kv_cache, timing, torch_peers
from attention_jax.benchmarks.calls import jitted
from attention_jax.benchmarks.case import Case
from attention_jax.benchmarks.kv_cache_plot import spread
from attention_jax.masks import parse
from attention_jax.mixers import make_config
from attention_jax.ops.softmax import mosaic_gpu
from scripts import tune
from tests import sass_report
from tests.params import random_params
from train import command_line
from train.commands import benchmark

ROOT = Path(__file__).parent.parent


def benchmark_options(argv):
    """What a command line of the benchmarks gives."""
    return benchmark.checked(command_line.parse(benchmark.Options, argv))


@pytest.fixture
def card(monkeypatch):
    """A GPU's clock: every program takes 2 ms forward and 7 with a backward, which has a fourth argument."""

    def measure(run):
        return lambda *arguments: (jax.block_until_ready(run(*arguments)), 2.0 + 5.0 * (len(arguments) == 4))

    monkeypatch.setattr(profiler, "measure", measure)
    for module in (attention, timing):
        monkeypatch.setattr(module, "on_gpu", lambda: True)
        monkeypatch.setattr(module, "SETTLE", 0.0)
    monkeypatch.setattr(attention, "matmul_peak", lambda dtype: 1.0)
    caches = timing.jax_clock.cache_clear, timing.machine.cache_clear
    for clear in caches:
        clear()
    yield
    for clear in caches:
        clear()


def test_contestants_take_turns_and_one_that_raises_leaves_the_others_their_times():
    said = []

    def call(name):
        said.append(name)
        if name == "c" or (name == "b" and said.count("b") > 3):
            raise RuntimeError(f"{name} has\na long story")

    calls = {name: functools.partial(call, name) for name in "abc"}
    errors = {}
    times = timing.interleave(calls, 3, errors=errors)
    assert "".join(said) == "aabbc" + "ab" + "ab" + "a"
    assert set(times) == {"a"} and times["a"].shape == (3,)
    assert errors == {"b": "RuntimeError: b has", "c": "RuntimeError: c has"}
    with pytest.raises(RuntimeError, match="c has"):
        timing.interleave({"c": calls["c"]}, 1)


def test_makers_work_side_by_side_and_one_that_raises_gives_its_error():
    errors = {}
    made = timing.at_once({"a": lambda: 1, "b": lambda: 1 // 0, "c": lambda: "no"}, errors)
    assert made == {"a": 1, "c": "no"}
    assert errors == {"b": "ZeroDivisionError: integer division or modulo by zero"}


def test_the_device_clock_gives_a_program_its_arguments(card):
    assert timing.jax_clock() == "CUPTI"
    given = []
    assert timing.device_time(lambda *x: given.append(x), 1, 2, 3, 4) == 7.0 and given == [(1, 2, 3, 4)]


@pytest.mark.parametrize("backward", [False, True])
def test_a_compiled_call_is_timed_with_its_arguments(card, backward):
    call = jitted(lambda q, k, v: q * k + v, *[jnp.ones(3)] * 3, backward=backward)
    assert call.device_time() == 2.0 + 5.0 * backward and len(jax.tree.leaves(call())) == 1 + 3 * backward


def test_without_cupti_a_queue_of_calls_is_timed(card, monkeypatch):
    def refuse(run):
        raise RuntimeError("no CUPTI here")

    monkeypatch.setattr(profiler, "measure", refuse)
    calls = []
    assert timing.device_time(calls.append, 1) >= 0 and len(calls) == 21
    assert timing.machine()["jax clock"] == "wall, 20 calls queued"


def test_events_stand_around_what_was_queued_while_the_gpu_slept():
    said = []
    event = types.SimpleNamespace(record=lambda: said.append("record"), elapsed_time=lambda stop: 3)
    cuda = types.SimpleNamespace(
        Event=lambda enable_timing: event,
        _sleep=lambda cycles: said.append("sleep"),
        synchronize=lambda: said.append("synchronize"),
    )
    assert timing.event_time(types.SimpleNamespace(cuda=cuda), lambda: said.append("run")) == 3.0
    assert said == ["run", "sleep", "record", "run", "record", "synchronize"]


def test_rows_of_a_card(card, monkeypatch, tmp_path, capsys):
    def broken(case, backward):
        raise ValueError("takes no such shape\nat all")

    def timed(case, backward):
        return types.SimpleNamespace(device_time=lambda: 7.0 if backward else 2.0)

    known = {"peer": lambda case, backward: "not today", "ours reference": timed}
    known |= {"ours chunked": broken, "jax.nn": timed}
    monkeypatch.setattr(attention, "contestants", lambda: known)
    monkeypatch.setattr(attention, "ON_GPU", tuple(known))
    arguments = "--lengths 8 --tokens 16 --heads 2 --kv-heads 1 --widths 4 --dtype float32 --rounds 2"
    path = tmp_path / "deep" / "rows.json"
    masks = ["--masks", "Full()", "SlidingWindow(3)"]
    assert benchmark.main(["attention", *arguments.split(), *masks, "--json", str(path)]) == 1
    assert capsys.readouterr().out.count("peer") == 1
    rows = json.loads(path.read_text())["rows"]
    assert [row["name"] for row in rows] == ["ours reference", "ours chunked", "jax.nn"] * 4
    assert all(
        row["error"] == "ValueError: takes no such shape" for row in rows if row["name"] == "ours chunked"
    )
    forward, both, window = rows[2], rows[5], rows[8]
    assert (both["B"], both["N"], both["K"]) == (2, 2, 1)
    assert (forward["median_ms"], both["median_ms"], both["backward_ms"]) == (2.0, 7.0, 5.0)
    work = 4 * 2 * 2 * 8 * 8 * 4
    assert forward["tflops"] == pytest.approx(work / 2e9) and both["tflops"] == pytest.approx(
        3.5 * work / 7e9
    )
    assert both["backward_tflops"] == pytest.approx(2.5 * work / 5e9)
    assert forward["ratio_to_ours reference"] == 1.0 and window["block_time_to_full"] == 1.0
    assert window["tflops"] == pytest.approx(forward["tflops"] * (1 + 2 + 3 * 6) / 64)


def test_slow_contestants_come_after_all_cases_and_time_may_run_out(card, monkeypatch, capsys):
    args = benchmark_options(["attention", "--lengths", "8", "16", "--widths", "4", "2"])
    plan = list(attention._plan(args, ["flex", "torch", "jax.nn", "tokamax"], "float32"))
    assert [(case.H, case.T) for case, *_ in plan] == [(4, 8), (4, 16), (2, 8), (2, 16)] * 2
    assert [takers for _, takers, _ in plan] == [["torch", "jax.nn", "tokamax"]] * 4 + [["flex"]] * 4
    assert [beside for *_, beside in plan] == [[]] * 4 + [["torch", "jax.nn"]] * 4
    args, times = dataclasses.replace(args, seconds=5), iter(range(0, 99, 6))
    monkeypatch.setattr(attention, "time", types.SimpleNamespace(monotonic=lambda: next(times)))
    assert (
        list(attention.attention(args)) == [] and "stopped: the 5 seconds are over" in capsys.readouterr().out
    )


@pytest.mark.parametrize("contestant", [functools.partial(eager._mixer, "softmax"), eager._nnx])
def test_an_eager_step_is_the_last_token_of_a_causal_forward_call_every_time(monkeypatch, contestant):
    monkeypatch.setattr(eager, "_WIDTH", 8)
    x = np.random.default_rng(0).normal(size=(2, 2, 8)).astype(np.float32)
    other = np.concatenate([x[:, :1], -x[:, 1:]], axis=1)
    found = {}
    for name, inputs in (("x", x), ("other", other)):
        monkeypatch.setattr(eager, "_inputs", lambda *sizes, inputs=inputs: jnp.asarray(inputs))
        forward, step = contestant(2, 2, 2)
        found[name] = np.asarray(forward())
        for _ in range(2):
            np.testing.assert_allclose(step(), found[name][:, 1:], atol=1e-6)
    np.testing.assert_allclose(found["x"][:, :1], found["other"][:, :1], atol=1e-6)
    assert np.abs(found["x"][:, 1:] - found["other"][:, 1:]).min() > 1e-4


def test_rows_of_eager_calls(monkeypatch, tmp_path):
    """Every contestant with Flax's as the base, in the order of the sizes, by the CPU's clock."""
    made, taken = [], []

    def pair(B, T, heads, kind="nnx"):
        made.append((kind, B, T, heads))
        return tuple(functools.partial(taken.append, (kind, what)) for what in ("forward", "step"))

    clock = {"nnx": 2.0, "softmax": 1.0}
    monkeypatch.setattr(eager, "_nnx", pair)
    monkeypatch.setattr(eager, "_mixer", lambda kind, *sizes: pair(*sizes, kind=kind))
    monkeypatch.setattr(eager, "cpu_clock", lambda call: call() or clock.get(taken[-1][0], 5.0))
    path = tmp_path / "rows.json"
    assert benchmark.main(["eager", "--rounds", "3", "--json", str(path)]) == 0
    names = ["nnx", *eager.KINDS]
    assert made == [(name, *size, 8) for size in eager.SIZES for name in names]
    assert taken[: 2 * len(names)] == [(name, "forward") for name in names for _ in range(2)]
    assert taken[2 * len(names) : 3 * len(names)] == [(name, "forward") for name in names]
    rows = json.loads(path.read_text())["rows"]
    assert [row["name"] for row in rows] == names * 6
    assert [row["case"] for row in rows[:: len(names)]][:3] == [
        "B=2 T=128 forward", "B=2 T=128 decoding step", "B=2 T=256 forward"
    ]  # fmt: skip
    found = [(row["median_ms"], row["ratio_to_nnx"]) for row in rows[:3]]
    assert found == [(2.0, 1.0), (1.0, 0.5), (5.0, 2.5)]
    for kind in eager.KINDS:
        for heads in (8, 128):
            make_config(kind, num_heads=heads).check(eager._WIDTH, causal=True)

    made.clear()
    assert benchmark.main("eager --lengths 4 --batch 3 --heads 2 --rounds 1".split()) == 0
    assert set(made) == {(name, 3, 4, 2) for name in names}


def test_steps_with_and_without_a_cache_make_the_same_tokens(monkeypatch):
    monkeypatch.setattr(attention_jax, "init_params", lambda config, key: random_params(config))
    args = benchmark_options("kv_cache --d-model 16 --heads 2 --layers 1 --vocabulary 32".split())
    models = kv_cache.contestants(args)
    assert [model.numbers for model in models.values()] == [32, 16, 16, 36]
    # Untied: a model that is not trained repeats its last token otherwise.
    config = dataclasses.replace(models["MLA"].config, tie_embeddings=False, init_std=0.5)
    n, model = 9, models["MLA"]._replace(config=config, params=random_params(config, seed=2))
    run = kv_cache.cached(model, n)
    # The latents, per slot its position, and the newest one.
    assert run.steps == n and run.nbytes == 4 * (n * (model.numbers + 1) + 1)
    tokens = np.asarray(run.whole())
    assert len(set(tokens.tolist())) > 3
    np.testing.assert_array_equal(run.last(), tokens)
    first, second = np.concatenate([[0], tokens[: n - 2]]), tokens[: n - 1]
    assert kv_cache.uncached(model, n - 1, 1, first[None])() == tokens[n - 2]
    # The second repetition reads what the first has made.
    expected = kv_cache.uncached(model, n - 1, 1, second[None])()
    assert kv_cache.uncached(model, n - 1, 2, first[None])() == expected


def test_rows_of_generation_with_and_without_a_cache(monkeypatch, tmp_path, capsys):
    """By stand-ins: a step at n tokens takes 2 ms with a cache and 2 + n ms without."""

    def cached(model, n):
        return kv_cache.Cached(("whole", 2.0 * n), ("last", 2.0 * 3), 3, 4 * model.numbers * n)

    monkeypatch.setattr(attention_jax, "init_params", lambda config, key: random_params(config))
    monkeypatch.setattr(kv_cache, "cached", cached)
    monkeypatch.setattr(kv_cache, "uncached", lambda model, n, repeats: ("step", (2.0 + n) * repeats))
    monkeypatch.setattr(
        kv_cache,
        "interleave",
        lambda calls, rounds: {name: np.full(rounds, call[1]) for name, call in calls.items()},
    )
    monkeypatch.setattr(kv_cache, "wall_clock", lambda call: call[1])
    json_path, png = tmp_path / "rows.json", tmp_path / "times.png"
    arguments = "kv_cache --lengths 5 2 --d-model 16 --heads 2 --layers 3 --vocabulary 32 --rounds 5".split()
    assert benchmark.main([*arguments, "--json", str(json_path), "--plot", str(png)]) == 0
    rows = json.loads(json_path.read_text())["rows"]
    assert [(row["tokens"], row["mechanism"]) for row in rows] == [
        (n, name) for n in (2, 5) for name in ("MHA", "GQA", "MQA", "MLA")
    ]
    row = rows[4]
    assert row["formula_bytes"] == 3 * 4 * 32 * 5 and row["cache_bytes"] == 4 * 32 * 5
    assert row["cached"] == {
        "step_ms": 2.0, "step_quartiles_ms": [2.0, 2.0], "total_ms": 10.0, "tokens_per_s": 500.0
    }  # fmt: skip
    # Between the steps of 4 and 7 ms at 2 and 5 tokens a power of the length.
    power = np.log(7 / 4) / np.log(5 / 2)
    total = 3.0 + 4.0 + 4.0 * 1.5**power + 4.0 * 2.0**power + 7.0
    assert row["uncached"]["step_ms"] == 7.0 and row["uncached"]["total_ms"] == pytest.approx(total)
    assert row["step_ratio"] == 3.5 and row["total_ratio"] == pytest.approx(total / 10)
    assert png.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("MQA") == 2


def test_labels_of_lines_do_not_overlap():
    assert spread([0.1, 0.5], 0.2) == [0.1, 0.5]
    # The last four want 2.5 / 4 on the average, with 0.3 to either side of it.
    np.testing.assert_allclose(spread([0.1, 0.5, 0.5, 0.6, 0.9], 0.2), [0.1, 0.325, 0.525, 0.725, 0.925])


def test_the_cpu_clock_reads_the_time_of_the_process_around_a_call(monkeypatch):
    said = []
    read = iter((1.0, 1.25))
    stand_in = types.SimpleNamespace(process_time=lambda: said.append("clock") or next(read))
    monkeypatch.setattr(timing, "time", stand_in)
    assert timing.cpu_clock(lambda: said.append("call")) == 250.0 and said == ["clock", "call", "clock"]


@pytest.mark.parametrize("text", ["Full()", "Causal()", "SlidingWindow(1)", "SlidingWindow(5)"])
def test_peers_get_the_same_mask(text):
    case = Case(1, 12, 2, 1, 4, parse(text), "float32")
    found = jax.nn.dot_product_attention(*case.inputs, implementation="xla", **contestants.masking(case))
    expected = jax.nn.dot_product_attention(*case.inputs, mask=jnp.asarray(case.dense())[None, None])
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("text", ["SlidingWindow(5, 1)", "Chunked(4)", "SlidingWindow(4) & Sinks(2)"])
def test_peers_get_no_other_mask(text):
    assert contestants.masking(Case(1, 12, 2, 2, 4, parse(text), "float32")) is None


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("Causal()", None),
        ("SlidingWindow(20)", None),
        ("Chunked(24)", None),
        ("(SlidingWindow(20) | Sinks(3)) & Causal()", None),
        ("Longformer(16, (0, 7, 8))", None),
        ("~Dilated(3, 4) & Causal()", None),
        ("BigBird(16, 3, 1, 2) & Causal()", "RandomBlocks as a table of 5 x 5"),
        (f"Global({tuple(range(0, 300, 2))})", "Global as a table of 70 x 70"),
    ],
)
def test_flex_attention_is_given_our_mask(text, note):
    pytest.importorskip("torch", reason="torch is not installed (extra `parity`)")
    from torch.nn.attention import flex_attention as flex

    case = Case(1, 70, 1, 1, 4, parse(text), "float32")
    found, said = torch_peers.rule(case.mask, case.T, "cpu")
    assert said == note
    np.testing.assert_array_equal(
        flex.create_mask(found, None, None, case.T, case.T, device="cpu")[0, 0].numpy(), case.dense()
    )


@pytest.mark.parametrize("kernel", tune._KERNELS)
def test_the_kernels_that_the_tuner_times_can_be_traced(kernel):
    if jax.version.__version_info__ < mosaic_gpu._OLDEST:
        pytest.skip(f"the kernels need a newer jax than {jax.__version__}")
    q = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)
    saved = jax.ShapeDtypeStruct((1, 2, 256), jnp.float32)
    run = functools.partial(tune.kernel_program, "Causal()", kernel, (64, 2, 2))
    with mosaic_gpu.any_platform():
        found = jax.tree.leaves(jax.eval_shape(run, q, q, q, q, saved))
    assert found[0].shape == q.shape


def test_the_tuner_lists_the_fastest_first(card, monkeypatch, tmp_path):
    def kernel_call(H, mask, kernel, size):
        block, stages, _ = size
        if stages == 3:
            raise ValueError("does not fit")
        return types.SimpleNamespace(device_time=lambda: 100 / block)

    monkeypatch.setattr(tune, "kernel_call", kernel_call)
    monkeypatch.setattr(tune, "SETTLE", 0.0)
    same = {"width": 64, "mask": "Full()", "kernel": "q", "spills": 0, "warpgroups": 2}
    rows = [same | {"block": block, "stages": stages} for block, stages in ((32, 3), (32, 2), (64, 2))]
    rows.append(same | {"block": 128, "stages": 2, "spills": 8})
    (tmp_path / "compiled.json").write_text(json.dumps({"rows": rows}))
    command = ["tiles", "--compiled", str(tmp_path / "compiled.json"), "--json", str(tmp_path / "tiles.json")]
    assert tune.main(command) == 1
    found = json.loads((tmp_path / "tiles.json").read_text())["rows"]
    assert [(row["block"], row.get("ms"), row.get("error")) for row in found] == [
        (64, 100 / 64, None), (32, 100 / 32, None), (32, None, "ValueError: does not fit")
    ]  # fmt: skip


@pytest.mark.parametrize("rehearse", [False, True])
def test_command_lines_of_the_card(tmp_path, rehearse):
    """Stand-ins for Python and `timeout` note what they are given: every program understands it."""
    for name, does in {
        "python": f'for x in "$@"; do printf "%s\\0" "$x"; done >>{tmp_path}/said; echo >>{tmp_path}/said',
        "timeout": f'echo "$3" >>{tmp_path}/limits; shift 3; exec "$@"',
        "nvidia-smi": ":",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHON": str(tmp_path / "python"),
        "COMPILED": str(tmp_path / "compiled.json"),
        "REHEARSE": "1" if rehearse else "",
    }
    done = subprocess.run(
        ["sh", "scripts/on_card.sh", str(tmp_path / "out")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = [line.rstrip("\0").split("\0") for line in (tmp_path / "said").read_text().splitlines()]
    benchmarks = [words[1:] for words in said if words[0] == "scripts/benchmark.py"]
    peers, sparse = (benchmark_options(words) for words in benchmarks)
    assert peers.json.parent == sparse.json.parent == tmp_path / "out"
    assert peers.widths == (128, 64, 256) and sparse.masks[0] == "Full()" and len(sparse.masks) == 7
    if rehearse:
        assert (peers.lengths, sparse.lengths) == ((64,), (64,))
    else:
        assert (peers.lengths, sparse.lengths, peers.tokens) == ((4096, 16384), (16384,), 16384)
        assert sum(map(int, (tmp_path / "limits").read_text().split())) <= 20 * 60


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        (
            benchmark,
            ["attention", "--heads", "4", "--kv-heads", "3"],
            "--kv-heads 3 does not divide --heads 4",
        ),
        (benchmark, ["attention", "--contestants", "nobody"], "--contestants: there is no 'nobody'"),
        (benchmark, ["attention", "--seconds", "0"], "--seconds: must be an integer >= 1, got 0"),
        (benchmark, ["kv_cache", "--d-model", "24"], "--d-model must be a multiple of 4 x --heads 8, "),
        (benchmark, ["kv_cache", "--lengths", "1", "8"], "--lengths must be at least 2 generated tokens"),
        (benchmark, ["eager", "--heads", "3"], "--heads must divide 128, half the width of the model, got 3"),
        (tune, ["peers"], "invalid choice 'peers'"),
        (tune, ["tiles", "--compiled", "nowhere"], "--compiled nowhere: no such file"),
    ],
)
def test_mistakes_in_a_command_line(capsys, program, arguments, message):
    assert program.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_the_machine_is_named():
    found = timing.machine()
    assert found["device"] == jax.devices()[0].device_kind and found["jax"] == jax.__version__
    assert found["python"] == sys.version.split()[0] and len(found["date"]) == 10


_SASS = """
.L_x_0:
   -:-:-:Y:02        /*0000*/                   MOV R0, R1
.L_x_1:
   -:-:-:Y:01        /*0010*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT, gsb0
   -:-:-:Y:01        /*0020*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0
   -:-:0:Y:01        /*0030*/                   MUFU.EX2 R24, R24
   0:-:-:Y:04        /*0040*/                   FADD R25, R24, R25
   -:-:-:Y:05        /*0050*/               @P1 BRA `(.L_x_2)
   -:-:-:Y:01        /*0060*/                   HGMMA.64x128x16.F32.BF16 R24, R4, gdesc[UR8], R24, gsb0
   -:-:-:Y:01        /*0070*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0
.L_x_2:
   -:-:-:Y:05        /*0080*/               @!P0 BRA `(.L_x_1)
   -:-:-:Y:05        /*0090*/                   EXIT
"""


def test_a_step_is_the_path_of_most_products_through_the_innermost_loop(tmp_path):
    path = tmp_path / "code.sass"
    path.write_text(_SASS)
    (step,) = sass_report.loops(path)
    assert [x.opcode.split(".")[0] for x in step] == [
        "HGMMA", "WARPGROUP", "MUFU", "FADD", "BRA", "HGMMA", "WARPGROUP", "BRA",
    ]  # fmt: skip
    row = sass_report.measured(step, 64, 2, turns=True)
    assert row["counts"]["HGMMA"] == 4 and row["counts"]["MUFU"] == 2
    assert row["tensor"] == 2 * 128 and row["mufu"] == 16 and row["issue"] == 16
    assert 0 < row["bare"] < row["tensor"] < row["alone"]
    assert row["tensor"] <= row["together"] < row["alone"]
