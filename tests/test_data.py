"""From text to batches: tokenizers, corpus, packing, the snapshot, and what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import itertools
import os
import re
import shutil
import socket
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_jax import tokenizers
from train.config.sections import DataConfig
from train.data import corpus, packing, snapshot
from train.data.batches import Data, TextData
from train.data.corpus import Corpus, Document
from train.data.packing import Piece, Split, assemble
from train.data.prepare import _check_config, prepare
from train.data.tasks import MQARConfig

ONE_LINE = r"\A[^\n]+\Z"
TEXTS = {
    "a.txt": "Wer reitet so spät",
    "b.txt": "durch Nacht und Wind?" * 9,
    "c.txt": "x",
    "d.txt": "€." * 30,
}
NAMES = [
    "meta.json", "tokenizer.json", "train.npy", "train_spans.npy", "validation.npy", "validation_spans.npy"
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A folder of text files; `*.txt` matches four of them."""
    texts = tmp_path / "texts"
    (texts / "deep").mkdir(parents=True)
    for name, text in TEXTS.items():
        (texts / name).write_text(text, encoding="utf-8")
    (texts / "deep" / "e.txt").write_text("deeper", encoding="utf-8")
    return texts


def small(folder: Path, **changes) -> DataConfig:
    values = {"files": f"{folder}/*.txt", "sequence_length": 8, "batch_size": 3, "validation_fraction": 0.3}
    return DataConfig(**(values | changes))


# The tokens of these splits are their own indices, so a batch shows where each of its slots came from.
@st.composite
def splits(draw, least: int = 1):
    lengths = draw(st.lists(st.integers(0, 40), min_size=1, max_size=12))
    lengths[0] += least
    counts = np.array(lengths, np.int64)
    starts = np.cumsum(counts + 1) - counts - 1  # each span is followed by one token that is only a target
    return Split(np.arange(int(counts.sum()) + len(counts), dtype=np.int32), starts, counts)


def pairs_of(split: Split) -> set[int]:
    """Tokens that have a successor in their own span."""
    return {p for start, count in spans_of(split) for p in range(start, start + count)}


def spans_of(split: Split) -> list[tuple[int, int]]:
    return list(zip(split.starts.tolist(), split.counts.tolist(), strict=True))


def check_batch(split: Split, batch: dict[str, np.ndarray]) -> None:
    """Each slot of the batch is what its contract says, by the arrays alone."""
    assert all(array.dtype == np.int32 and array.shape == batch["tokens"].shape for array in batch.values())
    span_of = np.searchsorted(split.starts + split.counts, np.arange(len(split.tokens) + 1), side="right")
    empty = batch["positions"] < 0
    assert (empty == (batch["segment_ids"] < 0)).all()
    assert (batch["tokens"][empty] == 0).all() and (batch["targets"][empty] == -1).all()
    for tokens, targets, positions, segments in zip(
        *(batch[name] for name in ("tokens", "targets", "positions", "segment_ids")), strict=True
    ):
        scored = targets >= 0
        assert (targets[scored] == tokens[scored] + 1).all()
        for segment in set(segments[segments >= 0].tolist()):
            inside = segments == segment
            length = int(inside.sum())
            assert np.diff(np.flatnonzero(inside)).max(initial=1) == 1  # in one run
            assert (positions[inside] == np.arange(length)).all()
            assert (tokens[inside] == tokens[inside][0] + np.arange(length)).all()
            # The span of the first input holds the last target too: no token of another document.
            assert set(tokens[inside].tolist()) <= pairs_of(split)
            assert len(set(span_of[tokens[inside]].tolist())) == 1


@settings(max_examples=150, deadline=None)
@given(splits(), st.integers(1, 17), st.integers(0, 2**32 - 1), st.integers(0, 5))
def test_an_epoch_holds_every_pair_once_and_nearly_no_padding(split, T, seed, epoch):
    rows = packing.shuffled(split, T, seed, epoch)
    batch = assemble(split.tokens, [tuple(rows.pieces(row)) for row in range(rows.rows)], T, segments=True)
    check_batch(split, batch)
    filled = batch["targets"] >= 0
    assert sorted(batch["tokens"][filled].tolist()) == sorted(pairs_of(split))
    assert rows.rows == packing.rows_of(split.pairs, T) == -(-split.pairs // T)
    assert filled[:-1].all() and filled[-1].any()  # only the last row has room left


def test_epochs_differ_in_order_and_in_cuts():
    split = Split(np.arange(2001), np.array([0, 1000]), np.array([999, 1000]))
    cuts = []
    for epoch in range(6):
        rows = packing.shuffled(split, 64, 3, epoch)
        cuts.append(frozenset(piece.start for row in range(rows.rows) for piece in rows.pieces(row)))
        assert len(cuts[-1] - {0, 1000}) > 20
    for a in range(6):
        for b in range(a):
            assert len(cuts[a] & cuts[b]) <= 4, (a, b)
    many = Split(np.arange(300), np.arange(0, 300, 3), np.full(100, 2))
    neighbours = [
        {(a.start, b.start) for row in range(rows.rows) for a, b in itertools.pairwise(rows.pieces(row))}
        for rows in (packing.shuffled(many, 50, 3, epoch) for epoch in range(2))
    ]
    assert len(neighbours[0] & neighbours[1]) < 10  # of nearly 100
    again = packing.shuffled(split, 64, 3, 5)
    assert cuts[5] == {piece.start for row in range(again.rows) for piece in again.pieces(row)}


def test_a_long_document_restarts_and_a_short_one_shares_its_row():
    split = Split(np.arange(20), np.array([0, 11, 14]), np.array([10, 2, 5]))
    rows = packing.Sequential(split, 8)
    batch = assemble(split.tokens, [tuple(rows.pieces(row)) for row in range(rows.rows)], 8, segments=True)
    assert batch["tokens"].tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 11, 12, 14, 15, 16, 17], [18, 0, 0, 0, 0, 0, 0, 0]
    ]  # fmt: skip
    assert batch["targets"][1].tolist() == [9, 10, 12, 13, 15, 16, 17, 18]
    assert batch["positions"].tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 0, 1, 0, 1, 2, 3], [0, -1, -1, -1, -1, -1, -1, -1]
    ]  # fmt: skip
    assert batch["segment_ids"][1:].tolist() == [[0, 0, 1, 1, 2, 2, 2, 2], [0, -1, -1, -1, -1, -1, -1, -1]]


@settings(max_examples=150, deadline=None)
@given(splits(least=0), st.integers(1, 17))
def test_scoring_rows_score_every_pair_once_with_half_a_row_of_context(split, T):
    rows = packing.scoring_rows(split, T)
    batch = assemble(split.tokens, rows, T, segments=True)
    check_batch(split, batch)
    scored = batch["targets"] >= 0
    assert sorted(batch["tokens"][scored].tolist()) == sorted(pairs_of(split))
    first_of = {p: start for start, count in spans_of(split) for p in range(start, start + count)}
    for token, position in zip(batch["tokens"][scored], batch["positions"][scored], strict=True):
        offset_of_target, seen = token - first_of[int(token)] + 1, position + 1
        assert min(offset_of_target, T / 2) <= seen <= T
    short = split.counts[(split.counts > 0) & (split.counts < T)]
    full = sum(1 + -(-(int(c) - T) // max(T // 2, 1)) for c in split.counts if c >= T)
    assert len(rows) <= full + max(1, 2 * int(short.sum()) / T + 1) * (short.size > 0)


def test_unscored_pairs_are_context():
    batch = assemble(np.arange(9), [[Piece(2, 4, 3)]], 5, segments=False)
    assert batch["tokens"].tolist() == [[2, 3, 4, 5, 0]]
    assert batch["targets"].tolist() == [[-1, -1, -1, 6, -1]]
    assert set(batch) == {"tokens", "targets"}


def test_the_default_corpus_is_the_standard_librarys_source():
    text = corpus.read(None)
    names = [document.name for document in text.documents]
    assert names == sorted(names) and len(names) > 300
    assert {"dataclasses.py", "json/decoder.py"} <= set(names)
    assert not any({"test", "tests", "idle_test", "site-packages"} & set(name.split("/")) for name in names)
    assert inspect.getsource(dataclasses) == text.documents[names.index("dataclasses.py")].text
    total = sum(len(document.text.encode()) for document in text.documents)
    assert 5e6 < total < 30e6
    train, held = corpus.split(text, "files", 0.1)
    held_bytes = sum(len(document.text.encode()) for document in held)
    assert abs(held_bytes / total - 0.1) < 0.005
    assert max(len(document.text.encode()) for document in held) <= held_bytes / 3


def test_documents_are_the_files_by_relative_name(folder):
    text = corpus.read(f"{folder}/*.txt")
    assert text.documents == tuple(Document(name, TEXTS[name]) for name in sorted(TEXTS))
    names = [document.name for document in corpus.read(f"{folder}/**/*.txt").documents]
    assert names == [*sorted(TEXTS), os.path.join("deep", "e.txt")]
    one = corpus.read(str(folder / "deep" / "e.txt"))
    assert one.documents == (Document("e.txt", "deeper"),)


def test_the_corpus_hash_depends_on_names_contents_and_borders():
    def sha(*documents: tuple[str, str]) -> str:
        return Corpus("", tuple(Document(*document) for document in documents), 0).sha256()

    hashes = {
        sha(("a", "x"), ("b", "y")), sha(("a", "x"), ("b", "z")), sha(("a", "x"), ("c", "y")),
        sha(("a", "xb"), ("", "y")), sha(("ax", "b"), ("", "y")), sha(("a", "x")),
    }  # fmt: skip
    assert len(hashes) == 6
    assert sha(("a", "x"), ("b", "y")) == sha(("a", "x"), ("b", "y"))


def test_bytes_are_read_as_they_stand(tmp_path):
    (tmp_path / "crlf.txt").write_bytes("a\r\nb\rc\n\ufeff".encode())
    assert corpus.read(str(tmp_path / "crlf.txt")).documents[0].text == "a\r\nb\rc\n\ufeff"


def test_what_a_corpus_refuses(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "latin.dat").write_bytes(b"caf\xe9 noir")
    (folder / "empty.dat").write_bytes(b"")
    (folder / "empty2.dat").write_bytes(b"")
    os.symlink(folder / "nowhere", folder / "broken.link")
    os.mkfifo(folder / "pipe")
    os.symlink("pipe", folder / "pipe.link")
    os.symlink("loop", folder / "loop")
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("socket")  # relative: the path of a socket is short
    (folder / "wide.txt").write_text("text", encoding="utf-16")
    (folder / "nul.dat").write_bytes(b"ab\0c")
    for name in ("a.jsonl", "A.JSON", "a.csv", "a.txt.gz", "a.zip", "a.parquet"):
        (folder / name).write_text("plain text")
    for files, words in {
        "none*.txt": ["data.files=none*.txt matches no file in "],
        "deep": ["data.files=deep is a folder", "deep/**/*.txt"],
        "latin.dat": ["latin.dat is not UTF-8 at byte 3 (0xe9)"],
        "empty.dat": ["data.files: empty.dat is empty"],
        "empty*.dat": ["data.files: every one of the 2 files of empty*.dat is empty"],
        "dee*": ["data.files=dee* matches folders only"],
        "*.link": ["data.files: broken.link is a link to ", "nowhere, which does not exist"],
        "broken.link": ["data.files: broken.link is a link to ", "nowhere, which does not exist"],
        "pi*": ["data.files: pipe is a FIFO (a pipe): write its text to a file"],
        "pipe.link": ["data.files: pipe.link is a FIFO"],
        "socket": ["data.files: socket is a socket"],
        "/dev/null": ["data.files: /dev/null is a device"],
        "loop": ["data.files: cannot read loop: "],
        "wide.txt": ["wide.txt is UTF-16 or UTF-32 by its byte order mark", "iconv -f UTF-16 -t UTF-8"],
        "nul.dat": ["nul.dat has a NUL byte at byte 2: it is not text"],
        "a.jsonl": ["a.jsonl is JSON by its suffix .jsonl", "jq -r .text", "name it a.jsonl.txt"],
        "A.JSON": ["A.JSON is JSON by its suffix .json"],
        "a.csv": ["a.csv is a table", "write its texts to a .txt file"],
        "a.txt.gz": ["a.txt.gz is compressed by its suffix .gz", "decompress it first"],
        "a.zip": ["a.zip is an archive", "unpack it first"],
        "a.parquet": ["a.parquet is a table"],
    }.items():
        with pytest.raises(ValueError, match=ONE_LINE) as error:
            corpus.read(files)
        for word in words:
            assert word in str(error.value)

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)  # the tests may run as root, who may read everything
    with pytest.raises(ValueError, match="data.files: cannot read a.txt: Permission denied"):
        corpus.read("a.txt")


def test_an_empty_file_among_others_is_counted(folder):
    (folder / "empty.txt").write_bytes(b"")
    text = corpus.read(f"{folder}/*.txt")
    assert text.skipped == 1 and len(text.documents) == len(TEXTS)
    assert text.notes() == ["1 of 5 files: empty, skipped"]


def test_a_name_that_exists_is_that_file_and_a_link_is_what_it_leads_to(folder, monkeypatch):
    for name in ("a[b].txt", "*.dat", "x?.txt", "~"):
        (folder / name).write_text(f"in {name}")
    (folder / "more.dat").write_text("more")
    os.symlink(folder / "a.txt", folder / "to.a")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    for files in ("a[b].txt", str(folder / "a[b].txt"), "*.dat", "x?.txt"):
        name = os.path.basename(files)
        assert corpus.read(files).documents == (Document(name, f"in {name}"),)
    assert corpus.read("to.a").documents == (Document("to.a", TEXTS["a.txt"]),)
    assert corpus.read("[a].txt").documents == corpus.read("~/a.txt").documents
    assert len(corpus.read("~/[a-d].txt").documents) == 4


def test_what_surprises_in_a_text_is_said(folder, tmp_path):
    (folder / "a.txt").write_bytes("\ufeffWer reitet\r\nso sp\xe4t\r\n".encode())
    (folder / "line.txt").write_text("x" * 2_000_000)
    (folder / "empty.txt").write_bytes(b"")
    some = prepare(small(folder), tmp_path / "run")
    assert some.summary.endswith(
        "; note: 1 of 6 files: empty, skipped"
        "; note: 1 of 6 files: start with a byte order mark (U+FEFF), which is kept"
        "; note: 1 of 6 files: have CRLF line ends"
    )
    again = prepare(small(folder), tmp_path / "run")
    assert again.summary == some.summary and "\n" not in some.summary
    older = {name: value for name, value in some.snapshot.meta.items() if name != "notes"}
    assert "note" not in TextData(some.config, dataclasses.replace(some.snapshot, meta=older)).summary


documents = st.lists(st.integers(1, 200), min_size=2, max_size=30).map(
    lambda sizes: tuple(Document(f"{i}.txt", chr(97 + i % 26) * size) for i, size in enumerate(sizes))
)


@settings(max_examples=100, deadline=None)
@given(documents, st.floats(0.01, 0.9))
def test_whole_files_are_held_out_by_name(some, fraction):
    text = Corpus("", some, 0)
    train, held = corpus.split(text, "files", fraction)
    assert train and held and tuple(sorted(train + held, key=some.index)) == some
    total = sum(len(document.text) for document in some)
    held_bytes = sum(len(document.text) for document in held)
    # Within half the largest file of the target, unless one file alone is too much or too little.
    largest = max(len(document.text) for document in some)
    assert len(held) == 1 or len(train) == 1 or abs(held_bytes - fraction * total) <= largest / 2
    reversed_ = Corpus("", some[::-1], 0)
    assert set(corpus.split(reversed_, "files", fraction)[1]) == set(held)


@settings(max_examples=50, deadline=None)
@given(documents, st.sampled_from([0.1, 0.25, 0.5, 0.75]))
def test_the_tail_is_held_out_by_characters(some, fraction):
    train, held = corpus.split(Corpus("", some, 0), "tail", fraction)
    whole = "".join(document.text for document in some)
    cut = int((1 - fraction) * len(whole))  # exact for these fractions
    assert "".join(document.text for document in train) == whole[:cut]
    assert "".join(document.text for document in held) == whole[cut:]


def test_nine_tenths_are_cut_as_nanogpt_cuts_them():
    for length in (1_115_394, 10, 19, 20, 99, 1001):
        text = Corpus("", (Document("a", "é" * length),), 0)
        assert len(corpus.split(text, "tail", 0.1)[0][0].text) == int(0.9 * length)
        assert len(corpus.split(text, "tail", 0.9)[0][0].text) == int(0.1 * length)


def test_an_only_file_is_parted_by_its_end(tmp_path):
    """Of text and of pairs, and the log says so."""
    only = Corpus("", (Document("a.txt", "0123456789"),), 0)
    assert corpus.split(only, "files", 0.2) == corpus.split(only, "tail", 0.2)
    (tmp_path / "a.txt").write_text("x\ty\n" * 100)
    for objective in ("causal_lm", "seq2seq"):
        config = DataConfig(files=f"{tmp_path}/a.txt", sequence_length=8, validation_fraction=0.2)
        some = prepare(config, tmp_path / objective, objective)
        tail = dataclasses.replace(config, validation_split="tail")
        other = prepare(tail, tmp_path / f"{objective}-tail", objective)
        assert some.validation_text() == other.validation_text() != b""
        assert "held out at the end of the only file" in some.summary
        assert "the only file" not in other.summary


def test_the_smallest_type_holds_every_id():
    for size, dtype in [(1, "uint8"), (256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "int32")]:
        assert snapshot.token_type(size) == dtype
        assert np.array([size - 1]).astype(snapshot.token_type(size))[0] == size - 1
    with pytest.raises(ValueError, match="exceeds"):
        snapshot.token_type(2**31 + 1)


def test_a_vocabulary_beyond_16_bits_is_stored_whole():
    characters = [chr(i) for i in [*range(32, 0xD800), *range(0xE000, 0xE000 + 20_000)]]
    tokenizer = tokenizers.CharTokenizer(characters)
    assert tokenizer.vocab_size > 65536
    split = snapshot.encode([Document("a", "".join(characters))], tokenizer)
    assert split.tokens.tolist() == list(range(len(characters)))


def test_an_id_beyond_the_vocabulary_is_never_stored():
    class Broken(tokenizers.ByteTokenizer):
        def encode(self, text):
            return np.array([70000], np.int32)

    with pytest.raises(AssertionError, match="ids outside the vocabulary"):
        snapshot.encode([Document("a", "x")], Broken())


def test_end_of_document_tokens_stand_before_every_document_and_at_the_end():
    split = snapshot.encode([Document("a", "hi"), Document("b", "€")], tokenizers.ByteTokenizer())
    assert split.tokens.tolist() == [256, *b"hi", 256, *"€".encode(), 256]
    assert split.starts.tolist() == [0, 3] and split.counts.tolist() == [3, 4]
    chars = tokenizers.CharTokenizer("abc")
    split = snapshot.encode([Document("a", "abc"), Document("b", "a"), Document("c", "cb")], chars)
    assert split.tokens.tolist() == [0, 1, 2, 0, 2, 1]
    assert split.starts.tolist() == [0, 3, 4] and split.counts.tolist() == [2, 0, 1]


@pytest.fixture
def made(folder, tmp_path):
    """Data of `small` with changes, each in a folder of its own."""
    count = iter(range(100))

    def made(**changes) -> Data:
        return prepare(small(folder, **changes), tmp_path / f"run{next(count)}")

    return made


def indexed(some: Data) -> Data:
    """The same data with every token replaced by its index, so that batches show where they come from."""
    snap = some.snapshot

    def own(split: Split) -> Split:
        return Split(np.arange(len(split.tokens), dtype=np.int32), split.starts, split.counts)

    replaced = dataclasses.replace(snap, train=own(snap.train), validation=own(snap.validation))
    return dataclasses.replace(some, snapshot=replaced)


def test_training_batches_go_through_each_epoch_once(made):
    some = indexed(made(batch_size=5))
    split, B = some.snapshot.train, some.config.batch_size
    rows = packing.rows_of(split.pairs, some.config.sequence_length)
    assert rows % B  # batches cross the border between epochs
    batches = [some.train_batch(step) for step in range(3 * rows // B + 1)]
    for batch in batches:
        check_batch(split, batch)
    stacked = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    orders = []
    for epoch in range(3):
        own = slice(epoch * rows, (epoch + 1) * rows)
        scored = stacked["targets"][own] >= 0
        assert sorted(stacked["tokens"][own][scored].tolist()) == sorted(pairs_of(split))
        orders.append(set(map(tuple, stacked["tokens"][own].tolist())))
    for a, b in itertools.combinations(orders, 2):
        assert a != b  # not the rows of another epoch in another order, but other rows


@pytest.mark.parametrize("packing_", ["documents", "stream"])
def test_a_batch_is_a_function_of_seed_and_step(made, packing_):
    def same(a, b) -> bool:
        return a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)

    one, two = made(packing=packing_), made(packing=packing_)
    other = made(packing=packing_, shuffle_seed=1)
    forwards = [one.train_batch(step) for step in range(40)]
    for step in (39, 3, 17, 0):
        assert same(two.train_batch(step), forwards[step])
        assert not same(other.train_batch(step), forwards[step])
    assert len({batch["tokens"].tobytes() for batch in forwards}) == 40
    forwards[3]["tokens"][:] = 99  # what a caller does to a batch does not come back
    assert same(one.train_batch(3), two.train_batch(3))


@pytest.mark.parametrize("source", ["documents", "stream", "masked_lm", "mqar"])
def test_no_batch_of_a_seed_is_one_of_another_seed(folder, tmp_path, source):
    """Neither the seed plus the step or the epoch, nor a seed modulo 2^32, decides what a batch holds."""
    seen = Counter()
    for seed in (0, 1, 2**32 - 1):
        if source == "mqar":
            task = MQARConfig(pairs=2, vocab_size=32)
            config = DataConfig(task=task, sequence_length=8, batch_size=4, shuffle_seed=seed)
            some = prepare(config, "unused")
        else:
            packing_ = "stream" if source == "stream" else "documents"
            config = small(folder, batch_size=4, packing=packing_, shuffle_seed=seed)
            objective = source if source == "masked_lm" else "causal_lm"
            some = indexed(prepare(config, tmp_path / str(seed), objective))
        for step in range(40):  # about four epochs
            seen[some.train_batch(step)["tokens"].tobytes()] += 1
    assert seen.total() == 120 and max(seen.values()) == 1


def test_streams_are_windows_at_uniform_starts(made):
    some = indexed(made(packing="stream", validation_split="tail"))
    tokens, T = some.snapshot.train.tokens, some.config.sequence_length
    starts = Counter()
    for step in range(1500):
        batch = some.train_batch(step)
        assert set(batch) == {"tokens", "targets"} and batch["tokens"].dtype == np.int32
        assert (np.diff(batch["tokens"], axis=1) == 1).all()
        assert (batch["targets"] == batch["tokens"] + 1).all()
        starts.update(batch["tokens"][:, 0].tolist())
    assert set(starts) == set(range(len(tokens) - T))  # every start, the last one included
    expected = 1500 * some.config.batch_size / len(starts)
    chi2 = sum((n - expected) ** 2 / expected for n in starts.values())
    assert chi2 < len(starts) + 6 * (2 * len(starts)) ** 0.5


@pytest.mark.parametrize("tokenizer", ["bytes", "chars"])
@pytest.mark.parametrize("packing_, how", [("documents", "files"), ("stream", "tail"), ("documents", "tail")])
def test_every_held_out_token_is_scored_once(made, tokenizer, packing_, how):
    some = made(tokenizer=tokenizer, packing=packing_, validation_split=how, validation_fraction=0.4)
    split = some.snapshot.validation
    pairs = len(split.tokens) - 1 if packing_ == "stream" else split.pairs
    text = some.validation_text()
    assert len(text) == some.validation_bytes
    held = corpus.split(corpus.read(some.config.files), how, 0.4)[1]
    assert text == "".join(document.text for document in held).encode()
    if tokenizer == "bytes" and packing_ == "documents":
        assert pairs == some.validation_bytes + len(held)  # each byte, and the end of each document
    for batches in (some.scoring_batches(), some.validation_batches()):
        scored = Counter()
        for batch in batches:
            assert batch["tokens"].shape == (some.config.batch_size, some.config.sequence_length)
            assert ("segment_ids" in batch) == (packing_ == "documents")
            scored.update(batch["targets"][batch["targets"] >= 0].tolist())
        assert scored.total() == pairs
        if packing_ == "stream":
            assert scored == Counter(split.tokens[1:].tolist())
        else:
            own = [split.tokens[s + 1 : s + c + 1] for s, c in zip(split.starts, split.counts, strict=True)]
            assert scored == Counter(np.concatenate(own).tolist())


def test_the_periodic_rows_are_fixed_and_spread(made):
    some = indexed(made(validation_fraction=0.6))
    everything = list(some.validation_batches())
    assert len(everything) > 3
    few = list(some.validation_batches(2))
    assert len(few) == 2
    for a, b in zip(few, some.validation_batches(2), strict=True):
        assert all((a[name] == b[name]).all() for name in a)
    first = [int(row[0]) for batch in few for row in batch["tokens"]]
    assert len(set(first)) == len(first) and first == sorted(first)
    last = max(int(batch["tokens"].max()) for batch in everything)
    assert first[0] == 0 and last / 2 < first[-1] and first[2] > some.config.sequence_length * 2
    assert len(list(some.validation_batches(10**6))) == len(everything)  # no row twice


def test_the_snapshot_is_read_without_the_corpus(folder, tmp_path, monkeypatch):
    config = small(folder)
    first = prepare(config, tmp_path / "run")
    batch = first.train_batch(5)
    shutil.rmtree(folder)
    monkeypatch.setattr(corpus, "read", lambda files: pytest.fail("the corpus was read again"))
    again = prepare(config, tmp_path / "run")
    assert again.corpus_sha256 == first.corpus_sha256 and again.summary == first.summary
    assert all((again.train_batch(5)[name] == batch[name]).all() for name in batch)
    assert isinstance(again.snapshot.train.tokens.base, np.memmap)
    assert sorted(path.name for path in (tmp_path / "run" / "data").iterdir()) == NAMES
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["data"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "remove"])
def test_a_damaged_snapshot_is_named(folder, tmp_path, name, damage):
    config = small(folder)
    prepare(config, tmp_path)
    path = tmp_path / "data" / name
    raw = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        raw[len(raw) // 2] ^= 1
        path.write_bytes({"flip": bytes(raw), "truncate": bytes(raw[: len(raw) // 2]), "empty": b""}[damage])
    what = "cannot be read: No such file" if damage == "remove" else "is damaged"
    remedy = r"restore the folder \S+ from a copy, or choose another run_dir\Z"
    with pytest.raises(ValueError, match=rf"\A{re.escape(str(path))} {what}[^\n]*; {remedy}"):
        prepare(config, tmp_path)


def test_a_snapshot_of_another_format_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot, "FORMAT", 99)
    prepare(small(folder), tmp_path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="meta.json has format 99, this version reads 1: choose"):
        prepare(small(folder), tmp_path)


def test_another_data_section_is_refused_by_its_differences(folder, tmp_path):
    prepare(small(folder), tmp_path)
    message = (
        f"{tmp_path / 'data'} was made by another configuration: "
        'data.tokenizer was "bytes", is "chars"; data.shuffle_seed was 0, is 4; choose another run_dir'
    )
    with pytest.raises(ValueError, match=rf"\A{re.escape(message)}\Z"):
        prepare(small(folder, tokenizer="chars", shuffle_seed=4), tmp_path)


def test_a_key_that_a_snapshot_lacks_had_its_default(folder, tmp_path):
    own = prepare(small(folder), tmp_path)
    saved = {key: value for key, value in own.snapshot.meta["config"].items() if key != "packing"}
    older = dataclasses.replace(own.snapshot, meta={**own.snapshot.meta, "config": saved})
    _check_config(TextData(own.config, older), tmp_path)
    stream = dataclasses.replace(own.config, packing="stream")
    with pytest.raises(ValueError, match='data.packing was "documents", is "stream"; choose'):
        _check_config(TextData(stream, older), tmp_path)


def test_a_snapshot_is_whole_or_absent(folder, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.rename", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(small(folder), tmp_path / "run")
    assert not (tmp_path / "run" / "data").exists()
    monkeypatch.undo()
    (tmp_path / "run" / "tmp.data").mkdir()
    (tmp_path / "run" / "tmp.data" / "left over").write_text("by a killed process")
    prepare(small(folder), tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run" / "data").iterdir()) == NAMES


@pytest.mark.parametrize("packing_", ["documents", "stream"])
@pytest.mark.parametrize("part, fraction", [("training", 0.9), ("held-out", 0.1)])
def test_a_text_too_short_for_one_row_is_refused(tmp_path, packing_, part, fraction):
    (tmp_path / "one.txt").write_text("0123456789" * 10)
    config = DataConfig(
        files=f"{tmp_path}/one.txt", tokenizer="chars", validation_split="tail", packing=packing_,
        validation_fraction=fraction, sequence_length=10,
    )  # fmt: skip
    message = (
        f"the corpus is too short: its {part} part has 9 tokens to predict, a row needs 10: "
        "give more text or lower data.sequence_length"
    )
    with pytest.raises(ValueError, match=rf"\A{message}\Z"):
        prepare(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    prepare(dataclasses.replace(config, sequence_length=9), tmp_path / "run")


def test_the_hash_and_the_sizes_are_in_the_summary(made):
    some = made()
    meta = some.snapshot.meta
    total = sum(len(text.encode()) for text in TEXTS.values())
    assert meta["train"]["bytes"] + meta["validation"]["bytes"] == total
    assert some.corpus_sha256[:16] in some.summary and f"{some.validation_bytes:,} held out" in some.summary
    digest = hashlib.sha256()
    for name, text in sorted(TEXTS.items()):
        for part in (name.encode(), text.encode()):
            digest.update(len(part).to_bytes(8, "little") + part)
    assert some.corpus_sha256 == digest.hexdigest()
