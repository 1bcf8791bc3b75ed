"""Objective masked_lm: which tokens are hidden, what is scored, whole runs, and what is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax.generation import generate
from attention_jax.mixers import AttentionConfig, Context
from attention_jax.model import ModelConfig, apply
from attention_jax.positions import RoPE
from attention_jax.tokenizers import ByteTokenizer, CharTokenizer
from tests.params import random_params
from tests.runs import interrupt, rows, saved
from train import cli, loop
from train import config as config_lib
from train.commands import generate as generate_script
from train.config.sections import DataConfig, OptimizerConfig
from train.data import masking
from train.data.batches import MaskedData, TextData
from train.data.packing import Piece, assemble
from train.data.prepare import prepare
from train.optimizer import make_optimizer
from train.run import restore
from train.run.folder import differences
from train.step import make_eval_step, make_train_step

ROOT = Path(__file__).parents[1]
BYTES = ByteTokenizer()
END, MASK = 256, 257
BIDIRECTIONAL = ModelConfig(
    vocab_size=258, d_model=16, num_layers=1, mixers=(AttentionConfig(num_heads=2, rope=RoPE()),),
    mlp_width=24, causal=False, init_std=0.3,
)  # fmt: skip


def text_batch(B=64, T=100, seed=0):
    """Rows of letters with some ends of documents; the first row is partly empty."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(97, 123, B * T + 1)
    tokens[rng.random(tokens.size) < 0.1] = END
    rows = [(Piece(T * b, T),) for b in range(B)]
    return assemble(tokens, [(Piece(0, 7),), *rows[1:]], T, segments=True)


def test_an_exact_share_of_each_row_is_hidden_and_marks_never_are():
    clean = text_batch()
    hidden = masking.hide(clean, DataConfig(mask_fraction=0.3), BYTES, (1, 2))
    is_text = (clean["tokens"] != END) & (clean["segment_ids"] >= 0)
    chosen = hidden["targets"] >= 0
    assert hidden["tokens"].dtype == hidden["targets"].dtype == np.int32
    assert not (chosen & ~is_text).any()
    expected = np.maximum(np.rint(0.3 * is_text.sum(1)), 1)
    np.testing.assert_array_equal(chosen.sum(1), expected)
    np.testing.assert_array_equal(hidden["targets"][chosen], clean["tokens"][chosen])
    np.testing.assert_array_equal(hidden["tokens"][~chosen], clean["tokens"][~chosen])
    for name in ("positions", "segment_ids"):
        np.testing.assert_array_equal(hidden[name], clean[name])
    places = chosen[1:].mean(0) / is_text[1:].mean(0)  # no place in the row is preferred
    assert abs(np.corrcoef(places, np.arange(places.size))[0, 1]) < 0.3


def test_the_hidden_become_masks_random_tokens_or_stay():
    clean = text_batch(B=400)
    for replaced, random in ((0.8, 0.1), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)):
        config = DataConfig(mask_fraction=0.5, mask_replaced=replaced, mask_random=random)
        hidden = masking.hide(clean, config, BYTES, (0,))
        read, target = (hidden[name][hidden["targets"] >= 0] for name in ("tokens", "targets"))
        error = 4 * math.sqrt(0.25 / read.size)
        stay = 1 - replaced - random
        assert abs((read == MASK).mean() - replaced) < error
        assert abs((read == target).mean() - stay - random / 256) < error
        other = read[(read != MASK) & (read != target)]
        assert other.size == 0 or (other.min() >= 0 and other.max() < 256 and np.unique(other).size > 100)
        if random == 1.0:
            assert abs(other.mean() - 127.5) < 3


def test_a_row_knows_neither_the_batch_nor_the_rows_below():
    clean, config = text_batch(B=8), DataConfig()
    whole = masking.hide(clean, config, BYTES, (3, 4))
    again, other = (masking.hide(clean, config, BYTES, key) for key in ((3, 4), (3, 5)))
    some = masking.hide({name: x[:3] for name, x in clean.items()}, config, BYTES, (3, 4))
    for name in ("tokens", "targets"):
        np.testing.assert_array_equal(whole[name], again[name])
        np.testing.assert_array_equal(whole[name][:3], some[name])
        assert (whole[name] != other[name]).any(axis=1).all()


def test_rows_with_little_text():
    """In a row of ends of documents nothing is masked, in a row with one letter that letter."""
    tokens = np.array([END, END, 97, END, END])
    clean = assemble(tokens, [(Piece(0, 2),), (Piece(1, 3),), ()], 3, segments=True)
    hidden = masking.hide(clean, DataConfig(mask_replaced=1.0, mask_random=0.0), BYTES, (0,))
    np.testing.assert_array_equal(hidden["targets"], [[-1, -1, -1], [-1, 97, -1], [-1, -1, -1]])
    np.testing.assert_array_equal(hidden["tokens"], [[END, END, 0], [END, MASK, END], [0, 0, 0]])


def test_the_mask_is_the_id_after_the_tokenizers():
    characters = CharTokenizer.of(["abc"])
    for tokenizer, size in ((BYTES, 257), (characters, 3)):
        assert masking.mask_id(tokenizer) == size
        sizes = [masking.vocabulary_size(name, tokenizer) for name in ("causal_lm", "seq2seq", "masked_lm")]
        assert sizes == [size, size, size + 1]
    clean = assemble(np.arange(3).repeat(40), [(Piece(0, 100),)], 100, segments=False)
    hidden = masking.hide(clean, DataConfig(mask_fraction=1.0, mask_random=0.2), characters, (0,))
    assert set(hidden["tokens"][0]) == {0, 1, 2, 3}


@pytest.fixture
def files(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in "abcdef":
        (texts / f"{name}.txt").write_text(f"{name} sat on the mat and saw {name} again. " * 12)
    return f"{texts}/*.txt"


@pytest.fixture
def make_data(files, tmp_path):
    def make(**changes):
        values = {"files": files, "sequence_length": 32, "batch_size": 4} | changes
        own = DataConfig(**values)
        return prepare(own, tmp_path / "-".join(map(str, changes.values())), "masked_lm")

    return make


@pytest.mark.parametrize("packing", ["documents", "stream"])
def test_a_batch_is_a_function_of_seed_and_step(make_data, packing):
    own, again = make_data(packing=packing), make_data(packing=packing)
    other = make_data(packing=packing, shuffle_seed=1)
    assert isinstance(own, MaskedData)
    batches = [own.train_batch(step) for step in (5, 0, 3)]
    for step, batch in zip((5, 0, 3), batches, strict=True):
        np.testing.assert_equal(again.train_batch(step), batch)
        assert (other.train_batch(step)["targets"] != batch["targets"]).any()
    # What stands under the masks is the batch of the same text for a causal model.
    clean = TextData(own.config, own.snapshot)
    for step in range(6):
        batch, plain = own.train_batch(step), clean.train_batch(step)
        hidden = batch["targets"] >= 0
        np.testing.assert_array_equal(np.where(hidden, batch["targets"], batch["tokens"]), plain["tokens"])
        assert {"positions", "segment_ids"} & batch.keys() == {"positions", "segment_ids"} & plain.keys()


@pytest.mark.parametrize("packing", ["documents", "stream"])
def test_held_out_masks_are_the_same_in_every_evaluation_of_every_run(make_data, packing):
    own, other = make_data(packing=packing), make_data(packing=packing, shuffle_seed=1)
    for limit in (2, None):
        for a, b in zip(own.validation_batches(limit), other.validation_batches(limit), strict=True):
            np.testing.assert_equal(a, b)
    read = []
    for batch in own.scoring_batches():
        holds = batch["positions"] >= 0  # in a stream's last row, too, nothing stands where no text is
        clean = np.where(batch["targets"] >= 0, batch["targets"], batch["tokens"])
        assert (batch["targets"][~holds] == -1).all()
        read += clean[holds].tolist()
    tokens = own.snapshot.validation.tokens.tolist()
    assert sorted(read) == sorted(tokens[:-1])  # the last end of document is never read
    if packing == "stream":
        assert read == tokens[:-1]


def test_the_scores_are_those_of_the_masked_tokens_alone(make_data):
    batch = make_data(packing="documents").train_batch(0)
    params = random_params(BIDIRECTIONAL)
    nll, count, correct = make_eval_step(BIDIRECTIONAL, accuracy=True)(params, batch)
    ctx = Context(jnp.asarray(batch["positions"]), jnp.asarray(batch["segment_ids"]))
    logits = np.asarray(
        jax.jit(lambda p: apply(BIDIRECTIONAL, p, batch["tokens"], ctx=ctx)[0])(params), np.float64
    )
    total = right = 0
    where = np.argwhere(batch["targets"] >= 0)
    for b, t in where:
        z, target = logits[b, t], batch["targets"][b, t]
        total += np.log(np.exp(z - z.max()).sum()) + z.max() - z[target]
        right += int(z.argmax() == target)
    np.testing.assert_allclose(nll, total, rtol=1e-5)
    assert (int(count), int(correct)) == (len(where), right)


def test_a_prefix_mask_hides_no_target_of_a_bidirectional_model(make_data):
    batch = make_data(packing="stream").train_batch(0)
    prefix = dataclasses.replace(
        BIDIRECTIONAL, mixers=(AttentionConfig(num_heads=2, mask="Prefix(9) | Causal()"),)
    )
    assert prefix.prefix == 9
    assert int(make_eval_step(prefix)(random_params(prefix), batch)[1]) == (batch["targets"] >= 0).sum()


@pytest.fixture
def config(files, tmp_path, monkeypatch):
    """A run that learns a few lines by heart."""

    def draw(model, key):
        return jax.tree.map(jnp.asarray, random_params(dataclasses.replace(model, init_std=0.1)))

    monkeypatch.setattr(restore, "init_params", draw)

    def make(name="run", **changes):
        raw = {
            "run_dir": str(tmp_path / name),
            "steps": 200,
            "log_every": 10,
            "objective": "masked_lm",
            "model": {
                "causal": False, "d_model": 32, "num_layers": 1, "mlp_width": 48, "dropout": 0.01,
                "mixers": [{"kind": "softmax", "num_heads": 2, "rope": {}}],
            },
            "data": {"files": files, "sequence_length": 32, "batch_size": 8, "mask_fraction": 0.2},
            "optimizer": {
                "warmup_steps": 10, "learning_rate": 1e-2, "schedule": "constant", "accumulation_steps": 2,
            },
            "evaluation": {"every": 100, "sample_tokens": 40, "batches": 1},
            "checkpoint": {"every": 50, "keep": 2},
        }  # fmt: skip
        return config_lib.from_dict(raw | changes)

    return make


def test_a_run_learns_and_goes_on_with_the_same_bits(config, monkeypatch, capsys):
    train_step, eval_step = functools.cache(make_train_step), functools.cache(make_eval_step)
    monkeypatch.setattr(loop, "make_train_step", train_step)
    monkeypatch.setattr(loop, "make_eval_step", eval_step)
    whole, parts = config("whole"), config("parts")
    assert loop.train(whole) == 0
    out = capsys.readouterr().out
    with monkeypatch.context() as patch:
        interrupt(patch, 120)
        with pytest.raises(KeyboardInterrupt):
            loop.train(parts)
    assert loop.train(parts) == 0
    assert saved(whole) == saved(parts) and rows(whole) == rows(parts)
    [model] = {restore.with_vocabulary(c.model, 258) for c in (whole, parts)}
    assert train_step(model, whole.optimizer, whole.steps)._cache_size() == 1
    assert eval_step(model, accuracy=True)._cache_size() == 1

    *_, before, last = rows(whole)
    assert before["val/accuracy"] > 0.5 and before["val/loss"] < 2 < math.log(26)
    assert last.keys() == {"step", "val/full_loss", "val/full_accuracy", "val/tokens"}
    result = json.loads((Path(whole.run_dir) / "result.json").read_text())
    assert "val/bits_per_byte" not in result and result["val/accuracy"] == before["val/accuracy"]
    assert "20 % masked, by id 257" in out and "masked tokens/s" in out
    assert "(nats per masked token; share of masked tokens predicted correctly)" in out.splitlines()[-1]
    assert "bits" not in out
    check_sample(whole, result["sample"])


def check_sample(run, sample):
    """Forty tokens twice: with masks, and filled in; what was not chosen is the same in both."""
    _, masked, filled = (part.split("\n", 1)[1] for part in ("\n" + sample).split("--- "))
    masked, filled = masked.rstrip("\n"), filled.rstrip("\n")
    assert len(masked) == len(filled) and masked.count("█") >= 3 and "█" not in filled
    differing = sum(a != b for a, b in zip(masked, filled, strict=True))
    assert masked.count("█") <= differing <= 8
    assert (Path(run.run_dir) / "samples" / "step_000100.txt").exists()


def test_a_trained_run_cannot_generate(config, monkeypatch):
    measured = {"train/loss": 1.0, "grad_norm": 1.0, "learning_rate": 1.0, "tokens": 1, "finite": True}
    metrics = {name: np.asarray(value) for name, value in measured.items()}
    monkeypatch.setattr(
        loop, "make_train_step", lambda *_: lambda params, state, *_: (params, state, metrics)
    )
    scores = (np.float32(1), np.int32(1), np.int32(1))
    monkeypatch.setattr(loop, "make_eval_step", lambda _, accuracy: lambda *_: scores)
    run = config(steps=10, evaluation={"sample_tokens": 0, "final_full": False})
    loop.train(run)
    assert not (Path(run.run_dir) / "samples").exists()
    with contextlib.redirect_stderr(io.StringIO()) as err:
        assert generate_script.main([run.run_dir, "--prompt", "def "]) == 2
    chosen, error = err.getvalue().splitlines()
    assert "checkpoint of step 10" in chosen and error.startswith("error: the model is not causal")
    with pytest.raises(ValueError, match="^the model is not causal.*cannot continue a prompt"):
        generate(BIDIRECTIONAL, {}, [[1]], max_new_tokens=1, key=jax.random.key(0))


def test_runs_of_other_objectives_keep_their_vocabulary_snapshot_and_identity(files, tmp_path):
    """A causal run that was begun before masks existed has no key of theirs anywhere, and goes on."""
    run = config_lib.from_dict(
        {"data": {"files": files, "sequence_length": 8}, "run_dir": str(tmp_path / "run")}
    )
    keys = config_lib.to_dict(run)
    keys["data"] = {key: value for key, value in keys["data"].items() if not key.startswith("mask")}
    assert len(keys["data"]) == len(config_lib.to_dict(run)["data"]) - 3
    assert differences(keys, run, tmp_path) == []
    own = prepare(run.data, tmp_path)
    assert own.tokenizer.vocab_size == 257 and own.snapshot.meta["vocab_size"] == 257
    assert not any("mask" in key for key in own.snapshot.meta["config"])
    masked = dataclasses.replace(
        run, objective="masked_lm", model=dataclasses.replace(run.model, causal=False)
    )
    other = dataclasses.replace(masked, data=dataclasses.replace(run.data, mask_fraction=0.2))
    found = differences(config_lib.to_dict(masked), other, tmp_path)
    assert found == ["data.mask_fraction 0.15 -> 0.2"]


MASKED = "objective: masked_lm\nmodel: {causal: false%s}\n%s"
REFUSED = [
    ("model: {causal: false}", ["model.causal is false: objective causal_lm", "or objective: masked_lm"]),
    ("objective: masked_lm", ["model.causal is true: objective masked_lm", "set model.causal to false"]),
    (MASKED % ("", "data: {mask_fraction: 0}"), ["data.mask_fraction must be in (0, 1], got 0"]),
    (MASKED % ("", "data: {mask_fraction: 1.1}"), ["data.mask_fraction must be in (0, 1], got 1.1"]),
    (MASKED % ("", "data: {mask_random: -0.1}"), ["data.mask_random must be in [0, 1], got -0.1"]),
    (MASKED % ("", "data: {mask_random: 0.3}"), ["data.mask_replaced 0.8 and mask_random 0.3 exceed 1"]),
    ("data: {mask_fraction: 0.2}", ["data.mask_fraction 0.2: objective causal_lm masks no tokens"]),
    (MASKED % ("", "data: {source_length: 8}"), ["data.source_length 8: objective masked_lm has no source"]),
    (MASKED % ("", "evaluation: {sample_prompt: a}"), ["evaluation.sample_prompt: objective masked_lm"]),
    (MASKED % (", mixers: [{kind: cross}]", ""), ["model.mixers.0.kind is cross", "objective: seq2seq"]),
    (MASKED % (", mixers: [{kind: forgetting}]", ""), ["model.mixers.0: forgetting is causal only"]),
    ("model: {mixers: [{kind: linformer}]}", ["model.mixers.0: linformer cannot be causal", "to false"]),
    (
        MASKED % (", mixers: [{kind: nystromformer}]", ""),
        ["data.packing is documents: model.mixers.0 (nystromformer)", "set it to stream"],
    ),
    (
        MASKED % (", mixers: [{kind: linformer, length: 255}]", "data: {packing: stream}"),
        ["data.sequence_length 256 exceeds model.mixers.0.length 255: lower it, or raise the other"],
    ),
]  # fmt: skip


@pytest.mark.parametrize("text, words", REFUSED, ids=[text for text, _ in REFUSED])
def test_a_mistake_is_one_line_and_exit_status_2(text, words, tmp_path, capsys):
    path = tmp_path / "tiny.yaml"
    path.write_text(text)
    assert cli.main([str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    for word in words:
        assert word in error


CONFIGS = [
    path for path in sorted((ROOT / "configs").rglob("*.yaml")) if "objective: masked_lm" in path.read_text()
]


@pytest.mark.parametrize(
    "path", [CONFIGS[0], *(pytest.param(path, marks=pytest.mark.slow) for path in CONFIGS[1:])],
    ids=lambda path: path.stem,
)  # fmt: skip
def test_twenty_steps_lower_the_loss(path):
    """As tests/test_configs.py does for causal configs: few layers, windows of this project's own source."""
    run = config_lib.load(path, ["data.files=unread.txt"])
    assert run.data.tokenizer == "bytes"
    text = b"".join(path.read_bytes() for path in sorted((ROOT / "attention_jax").glob("*.py")))
    ids = np.frombuffer(text, np.uint8).astype(np.int32)
    starts = np.random.default_rng(0).integers(0, ids.size - 97, (4, 4)).tolist()
    clean = [assemble(ids, [(Piece(s, 96),) for s in some], 96, segments=False) for some in starts]
    batches = [masking.hide(batch, run.data, BYTES, (number,)) for number, batch in enumerate(clean)]
    model = dataclasses.replace(run.model, vocab_size=258, num_layers=len(run.model.mixers))
    optimizer = OptimizerConfig(
        learning_rate=3e-3, final_learning_rate=3e-3, schedule="constant", warmup_steps=2
    )
    step, params = make_train_step(model, optimizer, 20), jax.tree.map(jnp.asarray, random_params(model))
    state, losses = make_optimizer(optimizer, 20).init(params), []
    for i in range(20):
        params, state, metrics = step(params, state, batches[i % 4], np.int32(i), jax.random.key(0))
        losses.append(float(metrics["train/loss"]))
        assert bool(metrics["finite"])
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.5, losses
