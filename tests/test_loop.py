"""The host loop in one process: compilations, lateness of metrics, what is not finite, bad input."""

import errno
import functools
import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax.model import init_params
from tests.runs import interrupt, measured, rows, saved, untrained
from train import config as config_lib
from train import loop
from train.data.batches import Data
from train.run import checkpoint, initial, restore
from train.run.checkpoint import Checkpoints
from train.run.failure import NonFiniteError, RunError
from train.run.folder import RunFolder
from train.run.metrics import MetricsWriter, draw_losses, read_rows
from train.signals import NUMBERS, Stopped
from train.step import make_eval_step, make_train_step


@pytest.fixture
def config(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in "abcdef":
        (texts / f"{name}.txt").write_text(f"{name} sat on the mat and saw {name} again. " * 12)

    def make(name="run", **changes):
        raw = {
            "run_dir": str(tmp_path / name),
            "steps": 8,
            "log_every": 1,
            "model": {"d_model": 8, "num_layers": 1, "mixers": [{"kind": "softmax", "num_heads": 2}]},
            "data": {"files": f"{texts}/*.txt", "sequence_length": 8, "batch_size": 2},
            "optimizer": {"warmup_steps": 2},
            "evaluation": {"every": 4, "batches": 2, "sample_tokens": 0, "final_full": False},
            "checkpoint": {"every": 2, "keep": 2},
        }
        for path, value in changes.items():
            section, _, key = path.partition("__")
            raw[section] = {**raw[section], key: value} if key else value
        return config_lib.from_dict(raw)

    return make


@pytest.fixture(autouse=True)
def drawn_by_numpy(monkeypatch):
    """Compiling the parameters' initialisation would take longer than these runs."""

    def draw(model, key):
        rng = np.random.default_rng(0)
        shapes = jax.eval_shape(functools.partial(init_params, model), key)
        return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype), shapes)

    monkeypatch.setattr(restore, "init_params", draw)


@pytest.fixture(scope="module")
def steps():
    """`make_train_step` and `make_eval_step` that compile once for all tests that use them."""
    return functools.cache(make_train_step), functools.cache(make_eval_step)


def test_one_compilation_however_the_run_goes(config, steps, monkeypatch):
    """Whole, interrupted and resumed, and evaluated more often: one program each, and the same bits."""
    train_step, eval_step = steps
    monkeypatch.setattr(loop, "make_train_step", train_step)
    monkeypatch.setattr(loop, "make_eval_step", eval_step)
    whole, parts, often = config("whole"), config("parts"), config("often", evaluation__every=1)
    assert loop.train(whole) == 0
    with monkeypatch.context() as patch:
        interrupt(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            loop.train(parts)
    assert rows(parts)[-1]["step"] == 4  # step 5 was dispatched, its metrics not yet read
    assert loop.train(parts) == 0
    assert loop.train(often) == 0
    assert saved(whole) == saved(parts) == saved(often)
    assert rows(whole) == rows(parts)
    for row, other in zip(rows(whole), rows(often), strict=True):
        assert row.items() <= other.items()
    [model] = {restore.with_vocabulary(c.model, 257) for c in (whole, parts, often)}
    assert train_step(model, whole.optimizer, whole.steps)._cache_size() == 1
    assert eval_step(model)._cache_size() == 1


def kill(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


def test_a_signal_saves_the_step_reached_and_the_bits_stay_the_same(config, steps, monkeypatch):
    """Between two steps, and in an evaluation, which a run that goes on repeats, and repeats again."""
    train_step, eval_step = steps
    monkeypatch.setattr(loop, "make_train_step", train_step)
    monkeypatch.setattr(loop, "make_eval_step", eval_step)
    whole, parts = config("whole"), config("parts")
    assert loop.train(whole) == 0
    handlers = [signal.getsignal(number) for number in NUMBERS]

    def stopped(number, owner, name, when):
        real = getattr(owner, name)

        def replaced(self, *arguments):
            if when(*arguments):
                kill(number)
            return real(self, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, replaced)
            with pytest.raises(Stopped) as caught:
                loop.train(parts)
        assert [signal.getsignal(number) for number in NUMBERS] == handlers
        assert caught.value.number == number
        return str(caught.value)

    goes_on = "is saved; the same command goes on from there"
    text = stopped(signal.SIGTERM, Data, "train_batch", lambda index: index == 2)
    assert text == f"stopped by SIGTERM: step 3 {goes_on}"
    assert saved(parts)[0] == 3 and rows(parts) == rows(whole)[:3]
    text = stopped(signal.SIGHUP, loop.Run, "_evaluate", lambda step: step == 4)
    assert text == f"stopped by SIGHUP: step 4 {goes_on}"
    assert saved(parts)[0] == 4 and rows(parts) == rows(whole)[:3]
    text = stopped(signal.SIGINT, loop.Run, "_evaluate", lambda step: step == 4)  # the one that was due
    assert text == f"stopped by SIGINT: step 4 {goes_on}"
    text = stopped(signal.SIGINT, Data, "train_batch", lambda index: index == 6)
    assert text == f"stopped by SIGINT: step 7 {goes_on}"
    assert loop.train(parts) == 0
    assert saved(whole) == saved(parts) and rows(whole) == rows(parts)
    [model] = {restore.with_vocabulary(c.model, 257) for c in (whole, parts)}
    assert train_step(model, whole.optimizer, whole.steps)._cache_size() == 1


@pytest.fixture
def stand_in(monkeypatch):
    """Replaces both steps by trivial ones and records the order of events."""
    events, bad = [], {}

    def make_train(model, optimizer, steps):
        def step(params, opt_state, batch, step, key):
            events.append(("dispatched", int(step) + 1))
            loss = bad.get(int(step) + 1, 1.0 / (int(step) + 1))
            return params, opt_state, measured(loss)

        return step

    def make_eval(model):
        return lambda params, batch: (np.float32(bad.get("val", 30.0)), np.int32(16))

    arrived = loop.Run._arrived

    def recorded(self, step, metrics):
        events.append(("arrived", step))
        return arrived(self, step, metrics)

    monkeypatch.setattr(loop, "make_train_step", make_train)
    monkeypatch.setattr(loop, "make_eval_step", make_eval)
    monkeypatch.setattr(loop.Run, "_arrived", recorded)
    return events, bad


def test_a_signal_with_nothing_to_save_ends_the_run(config, stand_in, tmp_path, monkeypatch):
    """In the set-up, which leaves nothing, and before the first step; an ignored signal changes nothing."""
    nothing = "stopped by SIGTERM: there was no new step to save; the same command goes on"
    with monkeypatch.context() as patch:
        patch.setattr(initial, "prepare", lambda *_: kill())
        with pytest.raises(Stopped, match=nothing):
            loop.train(config())
    assert not (tmp_path / "run").exists()
    with monkeypatch.context() as patch:
        at_batch(patch, 1, kill)
        with pytest.raises(Stopped, match="SIGTERM: no step was done yet; the same command starts again"):
            loop.train(config())
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with monkeypatch.context() as patch:
            at_batch(patch, 3, lambda: kill(signal.SIGHUP))
            assert loop.train(config()) == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_metrics_are_read_one_step_late(config, stand_in):
    events, _ = stand_in
    loop.train(config(steps=7, evaluation__every=100, checkpoint__every=4))
    order = ["d1", "d2", "a1", "d3", "a2", "d4", "a3", "a4", "d5", "d6", "a5", "d7", "a6", "a7"]
    assert [f"{name[0]}{step}" for name, step in events] == order


@pytest.mark.parametrize("at", [3, 4, 8])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_one_step_too_many_that_is_not_finite_stops_the_run(config, stand_in, at, poison):
    _, bad = stand_in
    bad[at] = poison
    run = config(optimizer__max_consecutive_skips=0)
    goes_on = f"goes on from step {(at - 1) // 2 * 2}, the newest checkpoint"
    message = rf"^step {at}: the loss is {poison} .* max_consecutive_skips is 0. .* {goes_on}.*learning_rate"
    with pytest.raises(NonFiniteError, match=message.replace(" max_", ".max_")) as caught:
        loop.train(run)
    assert "\n" not in str(caught.value) and caught.value.exit_status == 1
    steps = sorted(path.name for path in (Path(run.run_dir) / "checkpoints").iterdir())
    assert steps[-1] == f"step_{(at - 1) // 2 * 2:08d}"
    assert [row["step"] for row in rows(run)] == list(range(1, at))


def test_steps_that_are_not_finite_are_skipped_and_counted(config, stand_in, capsys):
    """Two in a row twice, with a budget of two; interrupted within a pair, which a checkpoint has cut."""
    _, bad = stand_in
    bad |= dict.fromkeys((2, 3, 6, 7), np.nan)
    whole, parts = (config(name, optimizer__max_consecutive_skips=2) for name in ("whole", "parts"))
    assert loop.train(whole) == 0
    assert "step 7: skipped, because the loss is nan" in (out := capsys.readouterr().out)
    assert "(2 in a row, 4 in all)" in out
    counts = [row.get("skipped_steps") for row in rows(whole)]
    assert counts == [None, 1, 2, 2, 2, 3, 4, 4]
    assert [row["step"] for row in rows(whole) if "train/loss" not in row] == [2, 3, 6, 7]
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, 6)
        with pytest.raises(KeyboardInterrupt):
            loop.train(parts)
    assert rows(parts)[-1]["step"] == 6
    assert loop.train(parts) == 0
    assert rows(parts) == rows(whole)
    strict = config("parts", optimizer__max_consecutive_skips=1)  # may differ: it changes no number
    for name in ("result.json", "checkpoints/step_00000008/manifest.json"):
        (Path(strict.run_dir) / name).unlink()
    with pytest.raises(
        NonFiniteError, match="step 7: .*in a row: 2"
    ):  # the first of them is before the checkpoint
        loop.train(strict)


def test_parameters_that_are_not_finite_are_not_saved(config, stand_in, monkeypatch):
    def spoiling(model, optimizer, steps):
        def step(params, opt_state, batch, step, key):
            spoilt = jax.tree.map(lambda x: x + np.float32(np.inf if step == 2 else 0), params)
            return spoilt, opt_state, measured(1.0)

        return step

    monkeypatch.setattr(loop, "make_train_step", spoiling)
    run = config()
    with pytest.raises(NonFiniteError, match="^step 4: the parameters are not finite; the step is not saved"):
        loop.train(run)
    assert [path.name for path in (Path(run.run_dir) / "checkpoints").iterdir()] == ["step_00000002"]


def at_batch(monkeypatch, step, act):
    """Call `act()` when the batch of a step is asked for, the step before being in the making."""
    train_batch = Data.train_batch

    def asked(self, index):
        if index + 1 == step:
            act()
        return train_batch(self, index)

    monkeypatch.setattr(Data, "train_batch", asked)


@pytest.mark.parametrize("lost", ["run", "run/metrics.jsonl"])
def test_a_folder_or_file_that_is_removed_in_training_stops_the_run(config, stand_in, tmp_path, lost):
    def remove():
        path = tmp_path / lost
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    with pytest.MonkeyPatch.context() as patch:
        at_batch(patch, 6, remove)
        with pytest.raises(RunError, match=rf"{lost} was removed or replaced during training: the run stops"):
            loop.train(config())
    assert stand_in[0][-2:] == [("dispatched", 6), ("arrived", 5)]
    assert loop.train(config()) == 0
    assert len(rows(config())) == (8 if lost == "run" else 4)  # rows from the checkpoint of step 4 on


def test_checkpoints_by_time_change_no_number(config, stand_in, monkeypatch):
    clock = iter(range(0, 10**6, 40))  # seconds
    monkeypatch.setattr(loop.time, "monotonic", lambda: next(clock))
    saved_at, save = [], Checkpoints.save
    monkeypatch.setattr(
        Checkpoints, "save", lambda self, step, *a, **k: (saved_at.append(step), save(self, step, *a, **k))
    )
    assert loop.train(config("steps", checkpoint__every=4)) == 0
    assert saved_at == [4, 8]
    assert loop.train(config("time", checkpoint__every=4, checkpoint__minutes=1.9)) == 0
    assert saved_at[2:] == [3, 4, 7, 8]
    assert rows(config("steps")) == rows(config("time"))


def test_output_that_fails_is_reported_once_and_ends_no_run(config, stand_in, monkeypatch, capsys):
    class Broken(io.StringIO):
        def write(self, text):
            if "step 2/8" in text:
                raise BrokenPipeError(32, "Broken pipe")
            return super().write(text)

    monkeypatch.setattr(sys, "stdout", Broken())
    assert loop.train(config()) == 0
    assert len(rows(config())) == 8
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith(
        "note: standard output failed (Broken pipe): the run goes on, its progress is in "
    )


def test_one_of_several_devices_is_named(config, stand_in, monkeypatch, capsys):
    assert loop.train(config("one")) == 0
    assert "note: training uses" not in capsys.readouterr().out
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    assert loop.train(config("four")) == 0
    assert f"note: training uses one of 4 devices, {jax.devices()[0]}\n" in capsys.readouterr().out


def test_a_held_out_loss_that_is_not_finite_stops_the_run(config, stand_in):
    stand_in[1]["val"] = np.nan
    with pytest.raises(NonFiniteError, match="^step 4: the held-out loss is nan; the step is not saved"):
        loop.train(config())


def test_a_last_score_that_is_not_finite_is_no_result(config, stand_in, monkeypatch):
    scored = loop.Run._score

    def score(self, batches):
        if self.reached == 8 and self.due is None:
            stand_in[1]["val"] = np.inf
        return scored(self, batches)

    monkeypatch.setattr(loop.Run, "_score", score)
    run = config(evaluation__final_full=True)
    with pytest.raises(
        NonFiniteError, match="^step 8: the loss of all held-out tokens is inf; there is no re"
    ):
        loop.train(run)
    assert not (Path(run.run_dir) / "result.json").exists()


def test_the_best_checkpoint_is_kept(config, stand_in):
    _, bad = stand_in
    evaluate = loop.Run._evaluate
    run = config(steps=12, evaluation__every=2)

    def curve(self, step):
        bad["val"] = 10.0 + abs(step - 4)
        return evaluate(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Run, "_evaluate", curve)
        loop.train(run)
    steps = sorted(path.name for path in (Path(run.run_dir) / "checkpoints").iterdir())
    assert steps == [f"step_{n:08d}" for n in (4, 10, 12)]


def contents(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "run.lock"]
    return {path: path.read_bytes() for path in files}


def test_another_config_is_refused_and_nothing_is_touched(config, stand_in):
    run = config()
    loop.train(run)
    folder = Path(run.run_dir)
    before = contents(folder)
    other = config(steps=9, optimizer__beta2=0.5)
    with pytest.raises(ValueError, match=r"\A[^\n]*optimizer.beta2 0.99 -> 0.5, steps 8 -> 9;[^\n]*\Z"):
        loop.train(other)
    assert contents(folder) == before
    assert loop.train(config(log_every=5, evaluation__sample_prompt="z")) == 0  # these may differ


def test_a_folder_that_is_no_runs_is_refused(config, tmp_path):
    foreign = tmp_path / "run"
    (foreign / "data").mkdir(parents=True)
    (foreign / "data" / "thesis.txt").write_text("years of work")
    before = contents(foreign)
    with pytest.raises(ValueError, match="is neither empty nor a run folder: choose another run_dir"):
        loop.train(config())
    assert contents(foreign) == before and len(list(foreign.iterdir())) == 1


def test_a_failed_set_up_leaves_nothing(config, tmp_path):
    for bad, message in [
        ({"data__files": f"{tmp_path}/none/*"}, "matches no file"),
        ({"model__vocab_size": 200}, "model.vocab_size 200 is less than the 257 ids of the data: raise it"),
        ({"data__sequence_length": 10**6}, "the corpus is too short"),
    ]:
        with pytest.raises(ValueError, match=message):
            loop.train(config(**bad))
        assert not (tmp_path / "run").exists()


def test_a_set_up_that_was_killed_is_started_anew(config, tmp_path, stand_in):
    folder = tmp_path / "run"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "meta.json").write_text("another config's")
    (folder / "run.lock").write_text("1\n")
    assert loop.train(config()) == 0


def test_two_processes_cannot_train_in_one_folder(config, tmp_path):
    run = config()
    with RunFolder(Path(run.run_dir), run):
        with pytest.raises(ValueError, match="is in use by process"):
            loop.train(run)
        program = "import fcntl, sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        command = [sys.executable, "-c", program, str(Path(run.run_dir) / "run.lock")]
        assert b"BlockingIOError" in subprocess.run(command, capture_output=True).stderr
    assert not Path(run.run_dir).exists()


def test_a_changed_corpus_hash_is_refused(config, stand_in):
    run = config()
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            loop.train(run)
    path = Path(run.run_dir) / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "corpus_sha256": "0" * 64}))
    with pytest.raises(ValueError, match="corpus_sha256 was 000"):
        loop.train(run)


def test_a_sample_longer_than_the_model_is_refused_at_the_start(config, stand_in, tmp_path):
    run = config(model__max_positions=16, evaluation__sample_tokens=16, evaluation__sample_prompt="ab")
    with pytest.raises(ValueError, match="sample_tokens 16: .* exceeds .*max_positions 16: lower it to 13"):
        loop.train(run)
    assert not (tmp_path / "run").exists()


def test_a_prompt_shorter_than_the_prefix_is_refused_at_the_start(config, stand_in, tmp_path):
    run = config(model__mixers=[{"kind": "softmax", "mask": "Prefix(9) | Causal()"}],
                 evaluation__sample_tokens=4, evaluation__sample_prompt="ab")  # fmt: skip
    with pytest.raises(ValueError, match="sample_prompt has 3 tokens, fewer than the mask's prefix of 9"):
        loop.train(run)
    assert not (tmp_path / "run").exists()


def test_bits_per_byte_of_a_prefix_lm_are_of_the_bytes_it_scores(config, monkeypatch):
    monkeypatch.setattr(loop, "make_train_step", untrained)
    prefix = [{"kind": "softmax", "num_heads": 2, "mask": "Prefix(4) | Causal()"}]
    plain = config("plain", evaluation__final_full=True)
    shown = config("shown", evaluation__final_full=True, model__mixers=prefix)
    found = []
    for run in (plain, shown):
        assert loop.train(run) == 0
        found.append(rows(run)[-1])
    held_out = json.loads((Path(plain.run_dir) / "data" / "meta.json").read_text())["validation"]["bytes"]
    tokens = found[0]["val/tokens"]
    assert found[1]["val/tokens"] < tokens
    for row in found:
        bits = row["val/full_loss"] / np.log(2) * tokens / held_out
        assert row["val/bits_per_byte"] == pytest.approx(bits, rel=1e-9)


def test_an_implementation_that_cannot_run_here_begins_no_run(config):
    """The mended config may have the folder."""
    model = {"d_model": 8, "num_layers": 1, "mixers": [{"kind": "softmax", "num_heads": 2, "impl": "cudnn"}]}
    with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU"):
        loop.train(config(model=model))
    assert loop.train(config()) == 0


def test_metrics_are_cut_after_the_resumed_step(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    for step in range(1, 6):
        writer.write(step, {"train/loss": 1.0 / step})
    writer.write(5, {"val/bits_per_byte": 2.0})
    writer.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "tra')
    writer = MetricsWriter(tmp_path, 4)
    assert [row["step"] for row in writer.rows] == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="not JSON compliant"):
        writer.write(5, {"train/loss": float("nan")})
    writer.write(5, {"train/loss": 0.25})
    writer.close()
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    [events] = (tmp_path / "tensorboard").iterdir()
    assert events.read_bytes().count(b"train/loss") == 5
    draw_losses(writer.rows, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_a_lost_last_row_is_not_replaced_by_an_earlier_one(config, stand_in):
    """Its val/loss is of other parameters."""
    run = config()
    assert loop.train(run) == 0
    folder = Path(run.run_dir)
    (folder / "result.json").unlink()
    *whole, _ = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_bytes(b"".join(whole))
    with pytest.raises(ValueError, match="metrics.jsonl has lost the row of step 8") as caught:
        loop.train(run)
    assert "\n" not in str(caught.value) and not (folder / "result.json").exists()


def test_rows_are_on_the_disk_before_a_checkpoint(config, stand_in, monkeypatch):
    synced, save = [], Checkpoints.save
    sync = MetricsWriter.sync
    monkeypatch.setattr(
        MetricsWriter, "sync", lambda self: (synced.append(self.rows[-1]["step"]), sync(self))
    )

    def checked(self, step, *arguments, **options):
        assert synced[-1] == step
        return save(self, step, *arguments, **options)

    monkeypatch.setattr(Checkpoints, "save", checked)
    assert loop.train(config(checkpoint__every=8)) == 0


@pytest.mark.parametrize("name", ["run.json", "versions.json", "result.json"])
def test_a_file_that_is_no_json_object_is_named(config, stand_in, name):
    run = config()
    assert loop.train(run) == 0
    folder = Path(run.run_dir)
    (folder / "result.json").unlink()
    (folder / name).write_text("[]")
    with pytest.raises(ValueError, match=f"{name} is not a JSON object: restore it"):
        loop.train(run)


class Full(io.FileIO):
    """A file on a disk that is full after five more bytes."""

    def write(self, data):
        if len(data) <= 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(bytes(data)[:5])


@pytest.mark.parametrize("name", ["metrics.jsonl", "tensorboard"])
def test_a_full_disk_leaves_whole_rows_and_names_the_file(tmp_path, monkeypatch, name):
    writer = MetricsWriter(tmp_path, 0)
    writer.write(1, {"train/loss": 1.0})
    part = writer._file if name == "metrics.jsonl" else writer._events._file
    before = part.path.read_bytes()
    part._file.close()
    part._file = Full(part.path, "ab")
    with pytest.raises(OSError, match=rf"{tmp_path}/{name}\S*: No space left on device;") as caught:
        writer.write(2, {"train/loss": 0.5})
    assert caught.value.errno == errno.ENOSPC
    assert part.path.read_bytes() == before
    writer.close()


def test_a_disk_that_orbax_fills_is_one_line_and_leaves_the_checkpoints(
    config, stand_in, monkeypatch, caplog
):
    """As orbax's threads meet it: a ValueError, for each of them a traceback in the log."""
    save = checkpoint.ocp.save

    def full(path, state):
        save(path, state)
        if "step_00000006" in str(path):
            logging.getLogger("absl").error("a traceback")
            raise ValueError("RESOURCE_EXHAUSTED: No space left on device [os_error_code='28']")

    monkeypatch.setattr(checkpoint.ocp, "save", full)
    run = config()
    level = logging.getLogger("absl").level
    with pytest.raises(OSError, match=rf"^{run.run_dir}/checkpoints/step_00000006: No space left"):
        loop.train(run)
    assert logging.getLogger("absl").level == level and "a traceback" not in caplog.text
    assert sorted(path.name for path in (Path(run.run_dir) / "checkpoints").iterdir()) == [
        "step_00000002", "step_00000004",
    ]  # fmt: skip
    monkeypatch.setattr(checkpoint.ocp, "save", save)
    assert loop.train(run) == 0


def test_a_broken_row_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 0}\nrubbish\n{"step": 3, "time": 0}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2 is not a row of metrics: correct"):
        read_rows(tmp_path / "metrics.jsonl")
