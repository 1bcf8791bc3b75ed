"""The host loop in one process: compilations, lateness of metrics, what is not finite, bad input."""

import functools
import json
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
from train.run import restore
from train.run.checkpoint import Checkpoints
from train.run.folder import RunFolder
from train.run.metrics import MetricsWriter, draw_losses, read_rows
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


def test_one_compilation_however_the_run_goes(config, monkeypatch):
    """Whole, interrupted and resumed, and evaluated more often: one program each, and the same bits."""
    train_step, eval_step = functools.cache(make_train_step), functools.cache(make_eval_step)
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


def test_metrics_are_read_one_step_late(config, stand_in):
    events, _ = stand_in
    loop.train(config(steps=7, evaluation__every=100, checkpoint__every=4))
    order = ["d1", "d2", "a1", "d3", "a2", "d4", "a3", "a4", "d5", "d6", "a5", "d7", "a6", "a7"]
    assert [f"{name[0]}{step}" for name, step in events] == order


@pytest.mark.parametrize("at", [3, 4, 8])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_stops_the_run(config, stand_in, at, poison):
    _, bad = stand_in
    bad[at] = poison
    run = config()
    with pytest.raises(ValueError, match=rf"^step {at}: the loss is {poison} .*learning_rate.*$") as caught:
        loop.train(run)
    assert "\n" not in str(caught.value)
    steps = sorted(path.name for path in (Path(run.run_dir) / "checkpoints").iterdir())
    assert steps[-1] == f"step_{(at - 1) // 2 * 2:08d}"
    assert [row["step"] for row in rows(run)] == list(range(1, at))


def test_a_held_out_loss_that_is_not_finite_stops_the_run(config, stand_in):
    stand_in[1]["val"] = np.nan
    with pytest.raises(ValueError, match="^step 4: the held-out loss is nan"):
        loop.train(config())


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


def test_a_broken_row_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 0}\nrubbish\n{"step": 3, "time": 0}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2 is not a row of metrics: correct"):
        read_rows(tmp_path / "metrics.jsonl")
