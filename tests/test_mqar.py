"""Multi-query associative recall: the rows, their distribution, and what a run of the task writes."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.runs import untrained
from train import config as config_lib
from train import loop
from train.commands import generate, recall
from train.config import ConfigError
from train.config.sections import DataConfig
from train.data.prepare import prepare
from train.data.tasks import MQARConfig
from train.data.tasks.mqar import PAPER_SETTINGS
from train.data.tasks.source import TaskData
from train.objective import count_correct
from train.run import restore
from train.run.metrics import TIMING, read_rows
from train.step import make_eval_step, make_train_step

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs" / "mqar").glob("*.yaml"))


def made(T: int, B: int = 64, first: int = 0, seed: int = 0, held_out: bool = False, **task) -> dict:
    return MQARConfig(**task).rows(first, B, T, seed=seed, held_out=held_out)


@pytest.mark.parametrize("filler", ["blank", "random"])
@pytest.mark.parametrize("T, D, V", [*[(T, D, 8192) for T, D in PAPER_SETTINGS], (4, 1, 4), (33, 8, 19)])
def test_a_row_is_what_the_paper_describes(T, D, V, filler):
    batch = made(T, B=16, pairs=D, vocab_size=V, filler=filler)
    assert all(array.shape == (16, T) and array.dtype == np.int32 for array in batch.values())
    for tokens, targets in zip(batch["tokens"].tolist(), batch["targets"].tolist(), strict=True):
        keys, values = tokens[0 : 2 * D : 2], tokens[1 : 2 * D : 2]
        assert len(set(keys)) == len(set(values)) == D
        assert all(1 <= key < V // 2 for key in keys) and all(V // 2 <= value < V for value in values)
        meaning, asked = dict(zip(keys, values, strict=True)), []
        for place, (token, target) in enumerate(zip(tokens, targets, strict=True)):
            if target >= 0:
                assert place >= 2 * D and place % 2 == 0
                assert target == meaning[token]
                asked.append(token)
            elif place >= 2 * D:
                assert token == 0 if filler == "blank" else 1 <= token < V
        assert sorted(asked) == sorted(keys)


def test_random_filler_reaches_every_id_but_the_blank():
    batch = made(64, B=256, pairs=1, vocab_size=8, filler="random")
    filler = batch["tokens"][:, 2:][batch["targets"][:, 2:] < 0]
    assert np.allclose(np.bincount(filler, minlength=8) / filler.size, [0, *[1 / 7] * 7], atol=0.02)


@pytest.mark.parametrize("alpha", [0.01, 1.0])
def test_queries_follow_the_power_law(alpha):
    """Two keys into four slots: every pair of slots as often as successive draws without replacement."""
    B, D, T = 40_000, 2, 12
    tokens, targets = made(T, B=B, pairs=D, vocab_size=8, alpha=alpha).values()
    slots = []
    for key in (tokens[:, 0], tokens[:, 2]):
        places = np.argmax((tokens == key[:, None]) & (targets >= 0), axis=1)
        slots.append((places - 2 * D) // 2)
    found = np.zeros((4, 4))
    np.add.at(found, tuple(slots), 1 / B)
    p = np.array([1.0, 2.0, 3.0, 4.0]) ** (alpha - 1)
    p /= p.sum()
    for first, second in itertools.product(range(4), repeat=2):
        wanted = 0.0 if first == second else p[first] * p[second] / (1 - p[first])
        assert abs(found[first, second] - wanted) < 5 * np.sqrt(0.25 / B), (first, second)


def test_every_ordered_choice_of_keys_and_of_values_is_equally_likely():
    B, V = 48_000, 10  # four keys and five values
    tokens = made(12, B=B, pairs=3, vocab_size=V)["tokens"]
    for columns, ids in ((tokens[:, 0:6:2], range(1, 5)), (tokens[:, 1:6:2], range(5, 10))):
        choices = list(itertools.permutations(ids, 3))
        found, counts = np.unique(columns, axis=0, return_counts=True)
        assert [tuple(row) for row in found.tolist()] == choices
        wanted = B / len(choices)
        assert np.abs(counts - wanted).max() < 5 * np.sqrt(wanted)


def test_a_row_depends_on_the_seed_and_its_number_alone():
    task = {"pairs": 8, "vocab_size": 512}
    whole = made(64, B=12, first=5, **task)
    for name, array in whole.items():
        parts = [made(64, B=count, first=first, **task)[name] for first, count in ((5, 1), (6, 4), (10, 7))]
        assert np.array_equal(np.concatenate(parts), array)
    others = made(64, B=12, first=5, seed=1, **task), made(64, B=12, first=5, held_out=True, **task)
    for one, two in itertools.combinations([whole, *others], 2):
        assert not np.any(np.all(one["tokens"] == two["tokens"], axis=1))
    everything = made(64, B=4096, **task)["tokens"]
    assert len(np.unique(everything, axis=0)) == 4096


def test_the_rows_are_these_in_every_version():
    """A change of the generator would let a run resume on other rows, and tables could not be compared."""
    row = made(12, B=1, first=3, seed=7, pairs=2, vocab_size=16)
    assert row["tokens"].tolist() == [[2, 12, 5, 11, 5, 0, 0, 0, 2, 0, 0, 0]]
    assert row["targets"].tolist() == [[-1, -1, -1, -1, 11, -1, -1, -1, 12, -1, -1, -1]]
    batch = made(128, pairs=16, first=10**12, seed=2**32 - 1, filler="random")
    digest = hashlib.sha256(batch["tokens"].tobytes() + batch["targets"].tobytes())
    assert digest.hexdigest()[:16] == "ddfdc3afd9374f56"


def data(**changes) -> TaskData:
    task = MQARConfig(**({"pairs": 2, "vocab_size": 32, "validation_rows": 10} | changes.pop("task", {})))
    return prepare(DataConfig(task=task, sequence_length=12, batch_size=4, **changes), "unused")


def test_batches_are_consecutive_rows_and_held_out_rows_are_fixed():
    own = data(shuffle_seed=3)
    assert isinstance(own, TaskData) and own.task.vocab_size == 32 and not Path("unused").exists()
    for step in (5, 0, 5):
        wanted = own.task.rows(4 * step, 4, 12, seed=3)
        assert all(np.array_equal(own.train_batch(step)[name], wanted[name]) for name in wanted)
    assert not np.array_equal(own.train_batch(0)["tokens"], data().train_batch(0)["tokens"])

    held = list(own.validation_batches())
    other = list(data(shuffle_seed=4).scoring_batches())
    assert len(held) == 3 and own.corpus_sha256 == data(shuffle_seed=3).corpus_sha256
    for one, two in zip(held, other, strict=True):
        assert all(np.array_equal(one[name], two[name]) for name in one)
    scored = [(batch["targets"] >= 0).sum(axis=1).tolist() for batch in held]
    assert scored == [[2] * 4, [2] * 4, [2, 2, 0, 0]]
    [first] = own.validation_batches(1)
    assert np.array_equal(first["tokens"], held[0]["tokens"])
    hashes = {
        data(**changes).corpus_sha256 for changes in ({}, {"shuffle_seed": 1}, {"task": {"alpha": 1.0}})
    }
    assert len(hashes) == 3


def test_right_answers_are_counted():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 5, 7)).astype(np.float32)
    targets = rng.integers(-1, 7, (3, 5)).astype(np.int32)
    targets[0] = logits[0].argmax(-1)
    logits[1, 0], targets[1, 0] = 1.0, 6  # of equal logits the first counts: no credit for saying nothing
    logits[2, 0], targets[2, 0] = np.nan, -1
    wanted = sum(
        int(targets[b, t] >= 0 and int(np.argmax(logits[b, t])) == targets[b, t])
        for b in range(3)
        for t in range(5)
    )
    assert wanted >= 5
    assert int(count_correct(jnp.asarray(logits), jnp.asarray(targets))) == wanted


TASK = "data: {task: {kind: mqar, pairs: 4, vocab_size: 64}, sequence_length: 16}\n"
QUIET = "evaluation: {sample_tokens: 0}\n"


@pytest.fixture
def load(tmp_path):
    def load(text: str, *overrides: str):
        (tmp_path / "run.yaml").write_text(text)
        return config_lib.load(tmp_path / "run.yaml", overrides)

    return load


def test_a_task_in_yaml(load):
    run = load(TASK + QUIET)
    assert run.data.task == MQARConfig(pairs=4, vocab_size=64)
    assert config_lib.from_dict(config_lib.to_dict(run)) == run
    assert load(TASK + QUIET, "data.task.pairs=2").data.task.pairs == 2
    assert load(QUIET, "data.task.kind=mqar").data.task == MQARConfig()


REFUSED = [
    # (overrides, words the one-line message must hold)
    (["data.task.pairs=5"], ["data.task.pairs 5", "sequence_length 16", "4 pairs", "20"]),
    (["data.sequence_length=15"], ["data.task.pairs 4", "sequence_length 15", "3 pairs"]),
    (["data.task.pairs=0"], ["data.task.pairs must be >= 1, got 0"]),
    (["data.task.vocab_size=9"], ["data.task.vocab_size must lie in [10, 2147483648], got 9"]),
    (["data.task.alpha=0"], ["data.task.alpha must be finite and > 0, got 0.0"]),
    (["data.task.validation_rows=0"], ["data.task.validation_rows must be >= 1"]),
    (["data.task.filler=noise"], ["data.task.filler", "'noise'"]),
    (["data.task.pair=1"], ["unknown key data.task.pair", "data.task.pairs?"]),
    (["data.task.kind=copy"], ["data.task.kind: there is no 'copy'; there are: mqar"]),
    (["data.files=a.txt"], ["data.files a.txt: task mqar generates rows", "remove the key"]),
    (["data.tokenizer=chars"], ["data.tokenizer chars: task mqar"]),
    (["data.packing=stream"], ["data.packing stream: task mqar"]),
    (["data.validation_fraction=0.2"], ["data.validation_fraction 0.2: task mqar"]),
    (["data.validation_split=tail"], ["data.validation_split tail: task mqar"]),
    (["data.source_length=8"], ["data.source_length 8: task mqar"]),
    (["evaluation.sample_tokens=200"], ["evaluation.sample_tokens 200: data.task mqar has no text", "to 0"]),
    (["model.mixers.0.mask=Prefix(4)"], ["model.mixers: a prefix of 4 tokens", "data.task mqar"]),
    (["model.max_positions=8"], ["data.sequence_length 16 exceeds model.max_positions 8"]),
]


@pytest.mark.parametrize("overrides, words", REFUSED, ids=[" ".join(o) for o, _ in REFUSED])
def test_a_mistake_is_one_line(load, overrides, words):
    with pytest.raises(ConfigError, match=r"\A[^\n]+\Z") as error:
        load(TASK + QUIET, *overrides)
    assert all(word in str(error.value) for word in words), error.value


def test_a_task_needs_the_causal_objective(load):
    model = "objective: seq2seq\nmodel: {encoder: {}, mixers: [{kind: softmax}, {kind: cross}]}\n"
    with pytest.raises(ConfigError, match="objective seq2seq: data.task mqar has its own targets"):
        load(TASK + QUIET + model)


@pytest.fixture
def config(tmp_path):
    def make(name, **changes):
        raw = {
            "run_dir": str(tmp_path / name),
            "steps": 8,
            "log_every": 2,
            "model": {"d_model": 8, "num_layers": 1, "mixers": [{"kind": "softmax", "num_heads": 1}]},
            "data": {
                "task": {"kind": "mqar", "pairs": 2, "vocab_size": 16, "validation_rows": 10},
                "sequence_length": 8,
                "batch_size": 4,
            },
            "optimizer": {"warmup_steps": 2},
            "evaluation": {"every": 4, "sample_tokens": 0},
            "checkpoint": {"every": 2, "keep": 2},
        }
        return config_lib.from_dict(raw | changes)

    return make


def test_a_run_goes_on_with_the_same_bits_and_writes_what_a_task_has(config, monkeypatch, capsys):
    train_step, eval_step = functools.cache(make_train_step), functools.cache(make_eval_step)
    monkeypatch.setattr(loop, "make_train_step", train_step)
    monkeypatch.setattr(loop, "make_eval_step", eval_step)
    whole, parts = config("whole"), config("parts")
    assert loop.train(whole) == 0
    batch_of = TaskData.train_batch
    with monkeypatch.context() as patch:

        def interrupted(self, step):
            if step == 5:
                raise KeyboardInterrupt
            return batch_of(self, step)

        patch.setattr(TaskData, "train_batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            loop.train(parts)
    assert loop.train(parts) == 0
    rows = [read_rows(Path(c.run_dir) / "metrics.jsonl") for c in (whole, parts)]
    rows = [[{k: v for k, v in row.items() if k not in TIMING} for row in run] for run in rows]
    assert rows[0] == rows[1]
    one, two = (restore.load_run(c.run_dir) for c in (whole, parts))
    same = jax.tree.map(
        lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), one.params, two.params
    )
    assert all(jax.tree.leaves(same))

    last, folder = rows[0][-1], Path(whole.run_dir)
    assert [row["step"] for row in rows[0] if "val/accuracy" in row] == [4, 8]
    assert last["val/tokens"] == 20 and {"val/full_loss", "val/full_accuracy"} <= last.keys()
    assert last["val/full_accuracy"] == rows[0][-2]["val/accuracy"]  # evaluation.batches held all ten rows
    nll, count, right = (x.item() for x in _scored(one, whole))
    assert count == 20 and right == round(20 * last["val/full_accuracy"])
    assert last["val/full_loss"] == pytest.approx(nll / count, rel=1e-6)
    result = json.loads((folder / "result.json").read_text())
    assert result["val/full_accuracy"] == last["val/full_accuracy"]
    assert not any("byte" in name or name == "sample" for name in result.keys() | last.keys())
    assert not (folder / "data").exists() and not (folder / "samples").exists()
    out = capsys.readouterr().out
    assert "synthetic rows of 8 tokens" in out and "val/accuracy 0." in out and "bits_per_byte" not in out

    assert one.tokenizer is None and one.model.vocab_size == 16
    assert generate.main([str(folder), "--prompt", "a"]) == 2
    assert "trained on data.task mqar, which has no text" in capsys.readouterr().err


def _scored(run, config):
    """The held-out rows in one batch, by the sums the loop adds up."""
    batch = config.data.task.rows(0, 10, 8, seed=0, held_out=True)
    return make_eval_step(run.model, accuracy=True)(run.params, batch)


def test_a_task_with_other_rows_does_not_go_on(config, monkeypatch):
    run = config("run", evaluation={"sample_tokens": 0, "final_full": False})
    monkeypatch.setattr(loop, "make_train_step", untrained)
    loop.train(run)
    (Path(run.run_dir) / "result.json").unlink()
    rows = MQARConfig.rows
    with monkeypatch.context() as patch:
        patch.setattr(MQARConfig, "rows", lambda self, first, *a, **k: rows(self, first + 1, *a, **k))
        with pytest.raises(ValueError, match="was trained on another corpus: its sha256 is"):
            loop.train(run)


def test_a_model_with_too_few_ids_is_refused(config):
    run = config("run", model={"vocab_size": 8, "d_model": 8})
    with pytest.raises(ValueError, match="model.vocab_size 8 is less than the 16 ids"):
        loop.train(run)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configs_differ_in_the_second_layer_alone(path):
    """So that a table of them compares mixers; rates are chosen for each."""
    run, base = config_lib.load(path), config_lib.load(CONFIGS[0])
    one, two = config_lib.to_dict(run), config_lib.to_dict(base)
    assert one["model"]["mixers"][0] == two["model"]["mixers"][0]
    for tree in (one, two):
        tree["model"].pop("mixers")
        tree["optimizer"].pop("learning_rate")
        tree.pop("run_dir")
    assert one == two


def test_the_script_names_its_runs_and_draws_its_table(capsys):
    path = ROOT / "configs" / "mqar" / "attention.yaml"
    trials = [
        recall.Trial(path, setting, rate, seed)
        for setting in ((64, 8), (128, 16))
        for rate in ("1e-3", "3e-3")
        for seed in (0, 1)
    ]
    assert len({trial.folder for trial in trials}) == 8
    run = config_lib.load(path, trials[-1].overrides)
    assert (run.data.sequence_length, run.data.task.pairs) == (128, 16)
    assert (run.seed, run.data.shuffle_seed, run.optimizer.learning_rate) == (1, 1, 3e-3)
    values = [0.5, 0.6, 0.9, 1.0, 0.2, 0.3, 0.1, 0.2]
    assert list(recall.table(dict(zip(trials, values, strict=True)))) == [
        "| mixer | floats of state | T 64, 8 pairs | T 128, 16 pairs |",
        "|---|---|---|---|",
        "| attention | 8,192 / 16,384 | 0.950 [0.900, 1.000] (3e-3) | 0.250 [0.200, 0.300] (1e-3) |",
    ]
    assert recall.main(["--settings", "64-8"]) == 2
    assert "--settings: must be tokens a row, x, pairs, such as 64x8, got 64-8" in capsys.readouterr().err
    assert recall.main([str(path), "--settings", "64x17"]) == 2
    assert "data.task.pairs 17 do not fit" in capsys.readouterr().err
