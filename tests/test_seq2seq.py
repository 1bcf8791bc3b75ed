"""Objective seq2seq: the loss through the encoder, and whole runs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import itertools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax.mixers import AttentionConfig, Context, CrossAttentionConfig
from attention_jax.model import EncoderConfig, ModelConfig, ModelOutput, apply, encode, init_params
from attention_jax.positions import RoPE
from attention_jax.tokenizers import ByteTokenizer
from tests.runs import interrupt, rows, saved
from train import config as config_lib
from train import loop, samples
from train.commands import generate as generate_script
from train.config.sections import OptimizerConfig
from train.data import corpus
from train.data.prepare import prepare
from train.optimizer import make_optimizer
from train.run import restore
from train.step import make_eval_step, make_train_step

ROOT = Path(__file__).parents[1]
END = ByteTokenizer.end_of_document

MODEL = ModelConfig(
    vocab_size=11,
    d_model=16,
    num_layers=2,
    mixers=(AttentionConfig(num_heads=2, rope=RoPE()), CrossAttentionConfig(num_heads=2)),
    encoder=EncoderConfig(num_layers=1, mixers=(AttentionConfig(num_heads=2, rope=RoPE()),)),
    mlp_width=24,
)
PLAIN = OptimizerConfig(
    learning_rate=1e-2, final_learning_rate=1e-2, warmup_steps=0, schedule="constant",
    epsilon=1.0, clip_norm=None, weight_decay=0.0,
)  # fmt: skip
END_ID = 10  # the end-of-document token of this vocabulary
PAIRS = [([1, 2, 3], [4, 5]), ([6], [7, 8, 9])]


def drawn(model, key=None, scale=0.3):
    """Parameters drawn by NumPy: compiling their initialisation takes longer than these tests."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        values = scale * rng.standard_normal(leaf.shape)
        return jnp.asarray(values + (path[-1].key == "scale"), leaf.dtype)

    shapes = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(draw, shapes)


def padded(pairs=PAIRS, T=6, S=5):
    """The batch of PAIRS: [end of document] + target, targets, sources."""
    B = len(pairs)
    batch = {name: np.full((B, T), -1, np.int32) for name in ("targets", "positions", "segment_ids")}
    batch |= {"tokens": np.zeros((B, T), np.int32), "sources": np.zeros((B, S), np.int32)}
    batch["source_positions"] = np.full((B, S), -1, np.int32)
    for row, (source, target) in enumerate(pairs):
        n, m = len(target) + 1, len(source)
        batch["tokens"][row, :n], batch["targets"][row, :n] = [END_ID, *target], [*target, END_ID]
        batch["positions"][row, :n], batch["segment_ids"][row, :n] = range(n), 0
        batch["sources"][row, :m], batch["source_positions"][row, :m] = source, range(m)
    return batch


@functools.cache
def evaluate():
    step, params = make_eval_step(MODEL), drawn(MODEL)
    return lambda batch: step(params, batch)


@functools.cache
def trained(parts=1):
    """(parameters, metrics) after one step on PAIRS."""
    optimizer = dataclasses.replace(PLAIN, accumulation_steps=parts)
    params, step = drawn(MODEL), make_train_step(MODEL, optimizer, 10)
    state = make_optimizer(optimizer, 10).init(params)
    params, _, metrics = step(params, state, padded(), np.int32(0), jax.random.key(0))
    return params, metrics


@jax.jit
def alone(params):
    """The logits of each pair, without padding, positions or a batch."""
    logits = []
    for source, target in PAIRS:
        ctx = Context(memory_BSD=encode(MODEL, params, jnp.array([source])))
        logits.append(apply(MODEL, params, jnp.array([[END_ID, *target]]), ctx=ctx)[0][0])
    return logits


def test_the_loss_is_that_of_each_target_alone_behind_its_source():
    total = 0.0
    for (_, target), logits_TV in zip(PAIRS, alone(drawn(MODEL)), strict=True):
        for z, token in zip(np.asarray(logits_TV, np.float64), [*target, END_ID], strict=True):
            total += math.log(sum(math.exp(x) for x in z)) - z[token]
    nll, count = evaluate()(padded())
    np.testing.assert_allclose(nll, total, rtol=1e-6)
    assert int(count) == sum(len(target) + 1 for _, target in PAIRS)
    _, metrics = trained()
    np.testing.assert_allclose(metrics["train/loss"], total / int(count), rtol=1e-6)
    assert int(metrics["tokens"]) == int(count)


def test_sources_matter_and_padding_does_not():
    before = float(evaluate()(padded())[0])
    for row, slot in ((0, 0), (0, 2), (1, 0)):
        batch = padded()
        batch["sources"][row, slot] = 0
        assert abs(float(evaluate()(batch)[0]) - before) > 1e-3
    batch = padded()
    empty = batch["source_positions"] < 0
    batch["sources"][empty] = np.random.default_rng(0).integers(-99, 99, int(empty.sum()))
    assert float(evaluate()(batch)[0]) == before
    wider = padded(S=9)
    np.testing.assert_allclose(evaluate()(wider)[0], before, rtol=1e-6)


def test_the_encoder_learns_and_slices_of_the_batch_have_equal_weight():
    start, (params, one), (other, two) = drawn(MODEL), trained(), trained(parts=2)
    for name in ("encoder", "stacks", "embed"):
        for before, after in zip(jax.tree.leaves(start[name]), jax.tree.leaves(params[name]), strict=True):
            assert np.abs(np.asarray(after) - np.asarray(before)).max() > 0
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-7)
    np.testing.assert_allclose(one["train/loss"], two["train/loss"], rtol=1e-6)


def test_the_encoder_has_dropout_in_training_alone(monkeypatch):
    keys = []

    def encode(model, params, sources, positions, *, dropout_key):
        keys.append(dropout_key)
        return jnp.zeros((*sources.shape, 1))

    def apply(model, params, tokens, *, ctx):
        assert ctx.memory_BSD.shape == (2, 5, 1) and ctx.memory_positions_BS.shape == (2, 5)
        return ModelOutput(jnp.zeros((*tokens.shape, 11)) * params["w"])

    monkeypatch.setattr("train.step.encode", encode)
    monkeypatch.setattr("train.step.apply", apply)
    params = {"w": jnp.zeros(())}
    make_eval_step(MODEL)(params, padded())
    state = make_optimizer(PLAIN, 10).init(params)
    make_train_step(MODEL, PLAIN, 10)(params, state, padded(), np.int32(0), jax.random.key(0))
    assert keys[0] is None and len(keys) == 2 and keys[1] is not None


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A run that learns to write three letters in upper case."""
    monkeypatch.setattr(restore, "init_params", functools.partial(drawn, scale=0.1))
    texts = ["".join(word) for word in itertools.product("abcd", repeat=3)]
    (tmp_path / "upper.tsv").write_text("".join(f"{text}\t{text.upper()}\n" for text in texts))

    def make(name="run", **changes):
        heads = {"num_heads": 2}
        softmax = {"kind": "softmax", "rope": {}, **heads}
        raw = {
            "run_dir": str(tmp_path / name),
            "steps": 60,
            "log_every": 1,
            "objective": "seq2seq",
            "model": {
                "d_model": 16, "num_layers": 2, "mlp_width": 24, "dropout": 0.01,
                "mixers": [softmax, {**softmax, "kind": "cross"}],
                "encoder": {"num_layers": 1, "mixers": [softmax]},
            },
            "data": {
                "files": str(tmp_path / "upper.tsv"), "validation_split": "tail",
                "sequence_length": 4, "source_length": 3, "batch_size": 16,
            },
            "optimizer": {
                "warmup_steps": 10, "learning_rate": 1e-2, "schedule": "constant", "accumulation_steps": 2,
                "weight_decay": 0.0
            },
            "evaluation": {"every": 30, "sample_tokens": 5},
            "checkpoint": {"every": 12, "keep": 2},
        }  # fmt: skip
        return config_lib.from_dict(raw | changes)

    return make


def test_a_run_learns_and_goes_on_with_the_same_bits(config, monkeypatch, capsys):
    train_step, eval_step = functools.cache(make_train_step), functools.cache(make_eval_step)
    monkeypatch.setattr(loop, "make_train_step", train_step)
    monkeypatch.setattr(loop, "make_eval_step", eval_step)
    whole, parts = config("whole"), config("parts")
    assert loop.train(whole) == 0
    with monkeypatch.context() as patch:
        interrupt(patch, 40)
        patch.setattr(samples, "_SAMPLED_TOKENS", 2)  # in pieces, which change no sample
        with pytest.raises(KeyboardInterrupt):
            loop.train(parts)
    monkeypatch.setattr(corpus, "read", lambda files: pytest.fail("the corpus was read again"))
    assert loop.train(parts) == 0
    assert saved(whole) == saved(parts) and rows(whole) == rows(parts)
    [model] = {restore.with_vocabulary(c.model, 257) for c in (whole, parts)}
    assert train_step(model, whole.optimizer, whole.steps)._cache_size() == 1

    last, folder = rows(whole)[-1], Path(whole.run_dir)
    assert last["val/tokens"] == 7 * 4  # a tenth of 64 pairs, each three letters and their end
    # Each letter is one of four: without its source a word costs 3 ln 4 nats, over four tokens.
    assert last["val/full_loss"] < 0.5 < 0.75 * math.log(4)
    bits = last["val/full_loss"] * 28 / math.log(2) / 21
    assert last["val/bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    for step in (30, 60):
        path = Path("samples") / f"step_{step:06d}.txt"
        sample = (folder / path).read_text()
        assert sample == (Path(parts.run_dir) / path).read_text()
        for source in ("dcb", "dcc", "dda", "ddc"):  # dcb dcc dcd dda ddb ddc ddd are held out
            assert f"{source} -> " in sample
    out = capsys.readouterr().out
    assert "57 pairs to train on, 7 held out; 0 left out" in out
    assert out.count("sampling: 2 of at most 5 tokens\n") == 1


def printed(*argv):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = generate_script.main([str(word) for word in argv])
    return status, out.getvalue(), err.getvalue()


def test_a_prompt_is_the_source(config, monkeypatch):
    measured = {"train/loss": 1.0, "grad_norm": 1.0, "learning_rate": 1.0, "tokens": 1, "finite": True}
    metrics = {name: np.asarray(value) for name, value in measured.items()}
    monkeypatch.setattr(
        loop, "make_train_step", lambda *_: lambda params, state, *_: (params, state, metrics)
    )
    monkeypatch.setattr(loop, "make_eval_step", lambda _: lambda *_: (np.float32(1), np.int32(1)))
    run = config(steps=10, evaluation={"sample_tokens": 0, "final_full": False})
    loop.train(run)
    command = [run.run_dir, "--tokens", 5, "--temperature", 0]
    status, out, _ = printed(*command, "--prompt", "abc")
    assert status == 0 and out.startswith("abc -> ")
    requests = restore.load_run(run.run_dir).requests(["abc"])
    assert [ids.tolist() for ids in (*requests.prompts, *requests.sources)] == [[END], [97, 98, 99]]
    status, _, err = printed(*command)
    assert status == 2 and err.splitlines()[1:] == ["error: the source is empty: give a text"]


@pytest.mark.slow
def test_the_config_trains_on_the_standard_library(tmp_path, monkeypatch):
    """configs/seq2seq.yaml with half its layers, on some of its files: twenty steps, falling loss."""
    run = config_lib.load(ROOT / "configs" / "seq2seq.yaml", ["data.batch_size=4"])
    every = corpus.read(None)
    some = tuple(document for document in every.documents if document.name < "c" and "/" not in document.name)
    monkeypatch.setattr(corpus, "read", lambda files: dataclasses.replace(every, documents=some))
    own = prepare(run.data, tmp_path, run.objective)
    assert own.snapshot.meta["train"]["pairs"] > 100 and own.snapshot.meta["unparsed_files"] == 0
    encoder = dataclasses.replace(run.model.encoder, num_layers=1)
    model = dataclasses.replace(run.model, vocab_size=257, num_layers=2, encoder=encoder)
    optimizer = dataclasses.replace(run.optimizer, warmup_steps=2, decay_steps=1)
    step, params = make_train_step(model, optimizer, 20), drawn(model, scale=0.05)
    state, losses = make_optimizer(optimizer, 20).init(params), []
    for i in range(20):
        params, state, metrics = step(params, state, own.train_batch(i), np.int32(i), jax.random.key(0))
        losses.append(float(metrics["train/loss"]))
        assert bool(metrics["finite"])
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.5, losses
