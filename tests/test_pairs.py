"""Pairs of source and target: from text to rows, to a snapshot, and what is refused."""

from __future__ import annotations

import dataclasses
import itertools
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from attention_jax.tokenizers import ByteTokenizer
from train.config.sections import DataConfig
from train.data import corpus, pairs, snapshot
from train.data.batches import PairData
from train.data.corpus import Corpus, Document
from train.data.pairs import Pair
from train.data.prepare import prepare

END = ByteTokenizer.end_of_document

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
    async def method(self): r"""  Métier.\\tTabbed twice  """

    def silent(self): return "no docstring"

    def blank(self): """   """

    def broken(self): """\\ud800 is no Unicode."""
'''


def test_a_modules_pairs_are_lines_and_their_letters_run_together():
    assert pairs.of_module(MODULE) == [
        Pair("thefirstline,afterablankone.", "The first line, after a blank one."),
        Pair("inside\\danother.", "Inside \\d another."),
        Pair("métier.\\ttabbedtwice", "Métier.\\tTabbed twice"),
    ]


def test_a_file_that_is_no_python_is_counted(monkeypatch):
    texts = {"a.py": MODULE, "b.py": "def f(: pass", "c.py": "def g():\n '''G g.'''", "d.py": "x = '\0'"}
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


def test_the_standard_library_holds_pairs():
    every = {document.name: document.text for document in corpus.read(None).documents}
    found = pairs.of_module(every["textwrap.py"])
    line = "Wrap a single paragraph of text, returning a list of wrapped lines."
    assert Pair("wrapasingleparagraphoftext,returningalistofwrappedlines.", line) in found


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
    with pytest.raises(ValueError, match=rf"\Adata\.files: [^\n]*{re.escape(words)}[^\n]*\Z"):
        prepare(DataConfig(files=f"{tmp_path}/*.tsv"), tmp_path / "run", "seq2seq")
    assert not (tmp_path / "run").exists()


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
    """The pair of a row, from the arrays alone; None for an empty one."""
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
    assert tokens[0] == END and targets[n - 1] == END and (tokens[1:n] == targets[: n - 1]).all()
    return Pair(bytes(batch["sources"][row, :m].tolist()).decode(), bytes(tokens[1:n].tolist()).decode())


def read_batch(batch) -> list[Pair | None]:
    assert all(array.dtype == np.int32 for array in batch.values())
    return [read_row(batch, row) for row in range(len(batch["tokens"]))]


def all_pairs(table: Path) -> list[Pair]:
    lines = [line for path in sorted(table.iterdir()) for line in path.read_text().split("\n")]
    return [Pair(*line.split("\t")) for line in lines]


def test_a_pair_is_a_row(table, tmp_path):
    some = prepare(small(table), tmp_path / "run", "seq2seq")
    batch = next(some.validation_batches())
    first = read_row(batch, 0)
    assert {name: array.shape for name, array in batch.items()} == {
        "tokens": (4, 4), "targets": (4, 4), "positions": (4, 4), "segment_ids": (4, 4),
        "sources": (4, 3), "source_positions": (4, 3),
    }  # fmt: skip
    assert batch["tokens"][0].tolist() == [END, *first.target.encode()]
    assert batch["targets"][0].tolist() == [*first.target.encode(), END]
    assert batch["sources"][0].tolist() == [*first.source.encode(), 0]
    assert batch["source_positions"][0].tolist() == [0, 1, -1]


def test_every_pair_comes_once_an_epoch_and_what_is_too_long_is_counted(table, tmp_path):
    some = prepare(small(table), tmp_path / "run", "seq2seq")
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
    some = prepare(small(table, batch_size=3), tmp_path / "run", "seq2seq")
    found = [read_batch(batch) for batch in some.scoring_batches()]
    assert [len(batch) for batch in found] == [3, 3, 3] and found[-1][-1] is None
    assert sum(pair is not None for batch in found for pair in batch) == 8


def test_a_batch_is_a_function_of_seed_and_step(table, tmp_path):
    one, two = (prepare(small(table), tmp_path / name, "seq2seq") for name in "ab")
    other = prepare(small(table, shuffle_seed=1), tmp_path / "c", "seq2seq")
    forwards = [read_batch(one.train_batch(step)) for step in range(12)]
    for step in (11, 3, 0):
        assert read_batch(two.train_batch(step)) == forwards[step] != read_batch(other.train_batch(step))


def test_pairs_that_stand_in_both_parts_are_counted(tmp_path):
    (tmp_path / "one.tsv").write_text("a\tb\nc\td\ne\tf\na\tb")
    config = DataConfig(files=f"{tmp_path}/one.tsv", validation_split="tail", validation_fraction=0.5)
    meta = prepare(config, tmp_path / "run", "seq2seq").snapshot.meta
    assert meta["validation"]["also_in_training"] == 1


@pytest.mark.parametrize("changes, words", [
    ({"sequence_length": 2}, "none of the 24 training pairs fits data.source_length 3 and data.sequence_l"),
    ({"source_length": 1}, "none of the 24 training pairs fits data.source_length 1"),
    ({"validation_fraction": 0.999}, "the training part of the corpus has no pair: give more pairs"),
])  # fmt: skip
def test_a_corpus_without_a_pair_is_refused(table, tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        prepare(small(table, **changes), tmp_path / "run", "seq2seq")
    assert not (tmp_path / "run").exists()


def test_the_snapshot_is_read_without_the_corpus(table, tmp_path, monkeypatch):
    config = small(table)
    first = prepare(config, tmp_path / "run", "seq2seq")
    shutil.rmtree(table)
    monkeypatch.setattr(corpus, "read", lambda files: pytest.fail("the corpus was read again"))
    again = prepare(config, tmp_path / "run", "seq2seq")
    assert read_batch(again.train_batch(5)) == read_batch(first.train_batch(5))
    assert again.summary == first.summary and again.corpus_sha256 == first.corpus_sha256


@pytest.mark.parametrize("name", ["train_sources.npy", "validation_sources_spans.npy", "train.npy"])
@pytest.mark.parametrize("damage", ["flip", "remove"])
def test_a_damaged_snapshot_is_named(table, tmp_path, name, damage):
    prepare(small(table), tmp_path / "run", "seq2seq")
    path = tmp_path / "run" / "data" / name
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    if damage == "remove":
        path.unlink()
    with pytest.raises(ValueError, match=rf"\A{re.escape(str(path))} [^\n]*; restore the folder [^\n]*\Z"):
        prepare(small(table), tmp_path / "run", "seq2seq")


def orders(some, epochs=3):
    """The pairs of each of the first epochs, in order."""
    pairs = len(some.snapshot.train.counts)
    steps = range(-(-epochs * pairs // some.config.batch_size))
    seen = [pair for step in steps for pair in read_batch(some.train_batch(step))]
    return [tuple(seen[pairs * n : pairs * (n + 1)]) for n in range(epochs)]


def test_no_two_pairs_of_seed_and_epoch_have_one_order(table, tmp_path):
    """Least of all the next epoch of a seed and the first of the next seed; and seeds do not wrap."""
    seeds = (0, 1, 2, 2**32 - 2, 2**32 - 1)
    found = [
        order
        for seed in seeds
        for order in orders(prepare(small(table, shuffle_seed=seed), tmp_path / str(seed), "seq2seq"))
    ]
    assert len(set(found)) == len(found) == 15
    # Neither are they the same up to a rotation, or equal at more places than chance has it.
    for a, b in itertools.combinations(found, 2):
        assert sum(x == y for x, y in zip(a, b, strict=True)) < 8
        assert not any(a[n:] + a[:n] == b for n in range(22))


# The sources in the first three epochs of `small`, by the code before `pair_order` existed.
RECORDED = [
    "dv az cv dz by dy cz bz bv ev ew bx ax cy aw dx dw av ay cw cx bw",
    "cy bx dv cx dy by bz ev cv dz aw bv cz cw ew bw ax ay az dx dw av",
    "ev az aw bx dx cz ay cy av ew dv cv by ax dy cw dw bw bz cx dz bv",
]


def test_a_snapshot_without_an_order_of_pairs_keeps_its_own(table, tmp_path):
    """A run that began before the key existed goes on with the pairs it would have had."""
    own = prepare(small(table), tmp_path / "run", "seq2seq")
    assert own.snapshot.meta["pair_order"] == 2
    meta = {name: value for name, value in own.snapshot.meta.items() if name != "pair_order"}
    older = PairData(own.config, dataclasses.replace(own.snapshot, meta=meta))
    sources = [[pair.source for pair in order] for order in orders(older)]
    assert [" ".join(epoch) for epoch in sources] == RECORDED
    other = dataclasses.replace(older, config=small(table, shuffle_seed=1))
    assert orders(other)[:2] == orders(older)[1:]  # what the key was added for
    future = dataclasses.replace(own.snapshot, meta={**meta, "pair_order": 3})
    shutil.rmtree(tmp_path / "run" / "data")
    snapshot.write(tmp_path / "run" / "data", future)
    with pytest.raises(
        ValueError, match=r"\A\S+data has pair_order 3, this version knows 1 to 2: use [^\n]*\Z"
    ):
        prepare(small(table), tmp_path / "run", "seq2seq")
