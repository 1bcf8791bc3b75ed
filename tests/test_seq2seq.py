"""Objective seq2seq: pairs from text, rows, the loss through the encoder, and whole runs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import itertools
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax.mixers import AttentionConfig, Context, CrossAttentionConfig
from attention_jax.model import EncoderConfig, ModelConfig, apply, encode, init_params
from attention_jax.positions import RoPE
from scripts import generate as generate_script
from tests.test_loop import interrupt, rows, saved
from train import config as config_lib
from train import corpus, data, loop, pairs, restore
from train.corpus import Corpus, Document
from train.optimizer import make_optimizer
from train.pairs import Pair
from train.schema import DataConfig, OptimizerConfig
from train.step import make_eval_step, make_train_step
from train.tokenizers import ByteTokenizer

MARK = ByteTokenizer.end_of_document

MODULE = '''
"""Of the module: no function."""
raise SystemExit("this file was imported")

def late(x, /, y: int = 3, *rest, key="\\udc80", **more) -> str:
    """
    The first line, after a blank one.

    Not this one.
    """
    def inner(): "Inside \\d another."

class Thing:
    """Of the class: no function."""

    @property
    async def method(self): r"""  Métier.\\tTabbed  """

    def silent(self): return "no docstring"

    def blank(self): """   """

    def broken(self): """\\ud800 is no Unicode."""
'''


def test_a_modules_pairs_are_summaries_and_signatures():
    assert pairs.of_module(MODULE) == [
        Pair("The first line, after a blank one.", "late(x, /, y: int=3, *rest, key='\\udc80', **more)"),
        Pair("Inside \\d another.", "inner()"),
        Pair("Métier.\\tTabbed", "method(self)"),
    ]


def test_a_file_that_is_no_python_is_counted(monkeypatch):
    texts = {"a.py": MODULE, "b.py": "def f(: pass", "c.py": "def g():\n '''G.'''", "d.py": "x = '\0'"}
    text = Corpus("some", tuple(Document(name, text) for name, text in texts.items()), 0)
    monkeypatch.setattr(corpus, "read", lambda files: text)
    found = pairs.read(None, "files", 0.3)
    assert found.unparsed == 2 and found.text is text
    held = corpus.split(text, "files", 0.3)[1]
    every = [pair for name in "ac" for pair in pairs.of_module(texts[f"{name}.py"])]
    for pair in every:
        own = any(pair in pairs.of_module(d.text) for d in held if d.name in ("a.py", "c.py"))
        assert (pair in found.validation) == own and (pair in found.train) == (not own)
    tail = pairs.read(None, "tail", 0.3)
    assert (*tail.train, *tail.validation) == tuple(every) and len(tail.validation) == 2


def test_the_standard_library_holds_signatures():
    every = {document.name: document.text for document in corpus.read(None).documents}
    found = pairs.of_module(every["textwrap.py"])
    assert Pair("Wrap a single paragraph of text, returning a list of wrapped lines.",
                "wrap(text, width=70, **kwargs)") in found  # fmt: skip
    assert Pair("wrap(text : string) -> [string]", "wrap(self, text)") in found


def test_a_tables_lines_are_pairs():
    text = "a\tb\n\n  \nc d\t e\r\n\r\né\t€"
    assert pairs.of_table(text, "t") == [Pair("a", "b"), Pair("c d", " e"), Pair("é", "€")]


@pytest.mark.parametrize(
    "line, words",
    [
        ("ab", "two.tsv:3 has 0 tabs: a line must be source<TAB>target"),
        ("a\tb\tc", "two.tsv:3 has 2 tabs"),
        ("\tb", "two.tsv:3 has an empty source"),
        ("a\t", "two.tsv:3 has an empty target"),
        ("\t", "two.tsv:3 has an empty source"),
    ],
)
def test_a_line_that_is_no_pair_is_named(tmp_path, line, words):
    (tmp_path / "one.tsv").write_text("a\tb\n")
    (tmp_path / "two.tsv").write_text(f"a\tb\n\n{line}\n")
    with pytest.raises(ValueError) as error:
        data.prepare(DataConfig(files=f"{tmp_path}/*.tsv"), tmp_path / "run", "seq2seq")
    assert str(error.value).startswith("data.files: ") and words in str(error.value)
    assert len(str(error.value).splitlines()) == 1 and not (tmp_path / "run").exists()


@pytest.fixture
def table(tmp_path):
    """Six files of five pairs each, and one pair whose source and one whose target is long."""
    folder = tmp_path / "tables"
    folder.mkdir()
    for a in "abcdef":
        lines = [f"{a}{b}\t{b}{a}{b}" for b in "vwxyz"]
        (folder / f"{a}.tsv").write_text("\n".join(lines))
    with open(folder / "a.tsv", "a") as file:
        file.write("\nlong source\tx\ny\tlong")
    return folder


def small(table: Path, **changes) -> DataConfig:
    values = {
        "files": f"{table}/*.tsv", "sequence_length": 4, "source_length": 3, "batch_size": 4,
        "validation_split": "tail", "validation_fraction": 0.25,
    }  # fmt: skip
    return DataConfig(**(values | changes))


def read_row(batch, row) -> Pair | None:
    """The pair of a row, told from the arrays alone; None for an empty one."""
    tokens, targets = batch["tokens"][row], batch["targets"][row]
    real = batch["positions"][row] >= 0
    n, m = int(real.sum()), int((batch["source_positions"][row] >= 0).sum())
    for name, length in (("positions", n), ("source_positions", m)):
        assert batch[name][row].tolist() == [*range(length), *[-1] * (batch[name].shape[1] - length)]
    assert batch["segment_ids"][row].tolist() == [0] * n + [-1] * (len(real) - n)
    assert targets[n:].tolist() == [-1] * (len(real) - n) and not tokens[n:].any()
    assert not batch["sources"][row, m:].any()
    if n == 0:
        assert m == 0
        return None
    assert tokens[0] == MARK and targets[n - 1] == MARK and (tokens[1:n] == targets[: n - 1]).all()
    return Pair(bytes(batch["sources"][row, :m].tolist()).decode(), bytes(tokens[1:n].tolist()).decode())


def read_batch(batch) -> list[Pair | None]:
    assert all(array.dtype == np.int32 for array in batch.values())
    return [read_row(batch, row) for row in range(len(batch["tokens"]))]


def all_pairs(table: Path) -> list[Pair]:
    lines = [line for path in sorted(table.iterdir()) for line in path.read_text().split("\n")]
    return [Pair(*line.split("\t")) for line in lines]


def test_a_pair_is_a_row(table, tmp_path):
    some = data.prepare(small(table), tmp_path / "run", "seq2seq")
    batch = next(some.validation_batches())
    first = read_row(batch, 0)
    assert {name: array.shape for name, array in batch.items()} == {
        "tokens": (4, 4), "targets": (4, 4), "positions": (4, 4), "segment_ids": (4, 4),
        "sources": (4, 3), "source_positions": (4, 3),
    }  # fmt: skip
    assert batch["tokens"][0].tolist() == [MARK, *first.target.encode()]
    assert batch["targets"][0].tolist() == [*first.target.encode(), MARK]
    assert batch["sources"][0].tolist() == [*first.source.encode(), 0]
    assert batch["source_positions"][0].tolist() == [0, 1, -1]


def test_every_pair_comes_once_an_epoch_and_what_is_too_long_is_counted(table, tmp_path):
    some = data.prepare(small(table), tmp_path / "run", "seq2seq")
    every = all_pairs(table)
    cut = 24  # of 32
    train = [pair for pair in every[:cut] if len(pair.source) <= 3 and len(pair.target) <= 3]
    assert len(train) == cut - 2 and len(train) % 4  # batches cross the border between epochs
    meta = some.snapshot.meta
    assert (meta["train"]["pairs"], meta["train"]["left_out"]) == (22, 2)
    assert (meta["validation"]["pairs"], meta["validation"]["left_out"]) == (8, 0)
    assert "22 pairs to train on, 8 held out; 2 left out" in some.summary and "\n" not in some.summary
    seen = [pair for step in range(17) for pair in read_batch(some.train_batch(step))]
    epochs = [seen[22 * n : 22 * n + 22] for n in range(3)]
    assert all(sorted(epoch) == sorted(train) for epoch in epochs)
    assert all(a != b for a, b in itertools.combinations(epochs, 2))
    held = [pair for batch in some.scoring_batches() for pair in read_batch(batch)]
    assert held == every[cut:]
    assert some.validation_bytes == len(some.validation_text()) == sum(len(pair.target) for pair in held)
    spread = [pair for batch in some.validation_batches(1) for pair in read_batch(batch)]
    assert spread == held[::2] and [pair.source for pair in spread] == some.held_out_sources(4)
    assert some.held_out_sources(100) == [pair.source for pair in held]


def test_the_last_held_out_batch_is_filled_with_empty_rows(table, tmp_path):
    some = data.prepare(small(table, batch_size=3), tmp_path / "run", "seq2seq")
    found = [read_batch(batch) for batch in some.scoring_batches()]
    assert [len(batch) for batch in found] == [3, 3, 3] and found[-1][-1] is None
    assert sum(pair is not None for batch in found for pair in batch) == 8


def test_a_batch_is_a_function_of_seed_and_step(table, tmp_path):
    one, two = (data.prepare(small(table), tmp_path / name, "seq2seq") for name in "ab")
    other = data.prepare(small(table, shuffle_seed=1), tmp_path / "c", "seq2seq")
    forwards = [read_batch(one.train_batch(step)) for step in range(12)]
    for step in (11, 3, 0):
        assert read_batch(two.train_batch(step)) == forwards[step] != read_batch(other.train_batch(step))


def test_pairs_that_stand_in_both_parts_are_counted(tmp_path):
    (tmp_path / "one.tsv").write_text("a\tb\nc\td\ne\tf\na\tb")
    config = DataConfig(files=f"{tmp_path}/one.tsv", validation_split="tail", validation_fraction=0.5)
    meta = data.prepare(config, tmp_path / "run", "seq2seq").snapshot.meta
    assert meta["validation"]["also_in_training"] == 1


@pytest.mark.parametrize("changes, words", [
    ({"sequence_length": 2}, "none of the 24 training pairs fits data.source_length 3 and data.sequence_l"),
    ({"source_length": 1, "sequence_length": 4}, "none of the 8 held-out pairs fits data.source_length 1"),
    ({"validation_fraction": 0.999}, "the training part of the corpus holds no pair"),
])  # fmt: skip
def test_a_corpus_without_a_pair_is_refused(table, tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        data.prepare(small(table, **changes), tmp_path / "run", "seq2seq")
    assert not (tmp_path / "run").exists()


def test_the_snapshot_is_read_without_the_corpus(table, tmp_path, monkeypatch):
    config = small(table)
    first = data.prepare(config, tmp_path / "run", "seq2seq")
    shutil.rmtree(table)
    monkeypatch.setattr(corpus, "read", lambda files: pytest.fail("the corpus was read again"))
    again = data.prepare(config, tmp_path / "run", "seq2seq")
    assert read_batch(again.train_batch(5)) == read_batch(first.train_batch(5))
    assert again.summary == first.summary and again.corpus_sha256 == first.corpus_sha256


@pytest.mark.parametrize("name", ["train_sources.npy", "validation_sources_spans.npy", "train.npy"])
@pytest.mark.parametrize("damage", ["flip", "remove"])
def test_a_damaged_snapshot_is_named(table, tmp_path, name, damage):
    data.prepare(small(table), tmp_path / "run", "seq2seq")
    path = tmp_path / "run" / "data" / name
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    if damage == "remove":
        path.unlink()
    with pytest.raises(ValueError) as error:
        data.prepare(small(table), tmp_path / "run", "seq2seq")
    assert str(error.value).startswith(f"{path} ") and len(str(error.value).splitlines()) == 1


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
MARKED = 10  # the mark of this vocabulary
PAIRS = [([1, 2, 3], [4, 5]), ([6], [7, 8, 9])]


def drawn(model, key=None):
    """Parameters drawn by NumPy: compiling their initialisation takes longer than these tests."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype), shapes)


def padded(pairs=PAIRS, T=6, S=5):
    """The batch of PAIRS: [mark] + target, targets, the sources beside them."""
    B = len(pairs)
    batch = {name: np.full((B, T), -1, np.int32) for name in ("targets", "positions", "segment_ids")}
    batch |= {"tokens": np.zeros((B, T), np.int32), "sources": np.zeros((B, S), np.int32)}
    batch["source_positions"] = np.full((B, S), -1, np.int32)
    for row, (source, target) in enumerate(pairs):
        n, m = len(target) + 1, len(source)
        batch["tokens"][row, :n], batch["targets"][row, :n] = [MARKED, *target], [*target, MARKED]
        batch["positions"][row, :n], batch["segment_ids"][row, :n] = range(n), 0
        batch["sources"][row, :m], batch["source_positions"][row, :m] = source, range(m)
    return batch


@functools.cache
def evaluate():
    step, params = make_eval_step(MODEL), drawn(MODEL)
    return lambda batch: step(params, batch)


def test_the_loss_is_that_of_each_target_alone_behind_its_source():
    """Pair by pair, without padding, positions or a batch, summed by hand in float64."""
    params, total = drawn(MODEL), 0.0
    for source, target in PAIRS:
        memory_BSD = encode(MODEL, params, jnp.array([source]))
        ctx = Context(memory_BSD=memory_BSD)
        logits_BTV, _ = apply(MODEL, params, jnp.array([[MARKED, *target]]), ctx=ctx)
        for z, token in zip(np.asarray(logits_BTV[0], np.float64), [*target, MARKED], strict=True):
            total += math.log(sum(math.exp(x) for x in z)) - z[token]
    nll, count = evaluate()(padded())
    np.testing.assert_allclose(nll, total, rtol=1e-6)
    assert int(count) == sum(len(target) + 1 for _, target in PAIRS)
    step = make_train_step(MODEL, PLAIN, 10)
    metrics = step(params, make_optimizer(PLAIN).init(params), padded(), np.int32(0), jax.random.key(0))[2]
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


def test_the_encoder_learns_and_slices_of_the_batch_weigh_alike():
    def moved(parts):
        optimizer = dataclasses.replace(PLAIN, accumulation_steps=parts)
        params = drawn(MODEL)
        step = make_train_step(MODEL, optimizer, 10)
        return step(params, make_optimizer(optimizer).init(params), padded(), np.int32(0), jax.random.key(0))

    start, (params, _, one), (other, _, two) = drawn(MODEL), moved(1), moved(2)
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
        return jnp.zeros((*tokens.shape, 11)) * params["w"], None

    monkeypatch.setattr("train.step.encode", encode)
    monkeypatch.setattr("train.step.apply", apply)
    params = {"w": jnp.zeros(())}
    make_eval_step(MODEL)(params, padded())
    state = make_optimizer(PLAIN).init(params)
    make_train_step(MODEL, PLAIN, 10)(params, state, padded(), np.int32(0), jax.random.key(0))
    assert keys[0] is None and len(keys) == 2 and keys[1] is not None


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A run that learns to write three letters in upper case."""
    monkeypatch.setattr(
        restore, "init_params", lambda model, key: jax.tree.map(lambda x: x / 6, drawn(model))
    )
    texts = ["".join(word) for word in itertools.product("abcd", repeat=3)]
    (tmp_path / "upper.tsv").write_text("".join(f"{text}\t{text.upper()}\n" for text in texts))

    def make(name="run", **changes):
        heads = {"num_heads": 2}
        softmax = {"kind": "softmax", "rope": {}, **heads}
        raw = {
            "run_dir": str(tmp_path / name),
            "steps": 20,
            "log_every": 1,
            "objective": "seq2seq",
            "model": {
                "d_model": 16, "num_layers": 2, "mlp_width": 24, "dropout": 0.02,
                "mixers": [softmax, {"kind": "cross", **heads}],
                "encoder": {"num_layers": 1, "mixers": [softmax]},
            },
            "data": {
                "files": str(tmp_path / "upper.tsv"), "validation_split": "tail",
                "sequence_length": 4, "source_length": 3, "batch_size": 16,
            },
            "optimizer": {"warmup_steps": 2, "learning_rate": 1e-2, "accumulation_steps": 2},
            "evaluation": {"every": 10, "sample_tokens": 5},
            "checkpoint": {"every": 4, "keep": 2},
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
        interrupt(patch, 13)
        with pytest.raises(KeyboardInterrupt):
            loop.train(parts)
    monkeypatch.setattr(corpus, "read", lambda files: pytest.fail("the corpus was read again"))
    assert loop.train(parts) == 0
    assert saved(whole) == saved(parts) and rows(whole) == rows(parts)
    [model] = {restore.with_vocabulary(c.model, 257) for c in (whole, parts)}
    assert train_step(model, whole.optimizer, whole.steps)._cache_size() == 1

    curve = [row["train/loss"] for row in rows(whole) if "train/loss" in row]
    assert len(curve) == 20 and np.mean(curve[-3:]) < 0.75 * np.mean(curve[:3])
    last, folder = rows(whole)[-1], Path(whole.run_dir)
    assert last["val/tokens"] == 7 * 4  # a tenth of 64 pairs, of three letters and a mark each
    bits = last["val/full_loss"] * 28 / math.log(2) / 21
    assert last["val/bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    for step in (10, 20):
        path = Path("samples") / f"step_{step:06d}.txt"
        sample = (folder / path).read_text()
        assert sample == (Path(parts.run_dir) / path).read_text()
        for source in ("dbd", "dcb", "dcd", "ddb"):  # of the seven held out, dbd dca dcb ... spread evenly
            assert f"{source} -> " in sample
    assert "57 pairs to train on, 7 held out; 0 left out" in capsys.readouterr().out


def printed(*argv):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = generate_script.main([str(word) for word in argv])
    return status, out.getvalue(), err.getvalue()


def test_a_prompt_is_the_source(config):
    run = config(steps=2, evaluation={"sample_tokens": 0, "final_full": False})
    loop.train(run)
    command = [run.run_dir, "--tokens", 5, "--temperature", 0]
    status, out, _ = printed(*command, "--prompt", "abc")
    assert status == 0 and out.startswith("abc -> ")
    requests = restore.load_run(run.run_dir).requests(["abc"])
    assert [ids.tolist() for ids in (*requests.prompts, *requests.sources)] == [[MARK], [97, 98, 99]]
    status, _, err = printed(*command)
    assert status == 2 and "the source is empty" in err and err.count("\n") == 1
