"""Batches from text: what the trainer reads.

Training rows come through a grain MapDataset, so that a batch is a function of (seed, step) and a resume
needs no iterator state.

packing: documents  every pair (token, next token) of every document once an epoch; documents are laid end to
                    end and cut where a row ends, each piece a segment with positions from 0 (a piece that
                    starts inside a document does not see what came before). The last row of an epoch may
                    have room left. Every epoch has another order of documents, other cuts, other rows.
packing: stream     windows of T tokens of the concatenated text at uniformly random starts, drawn anew for
                    every row of every step; they run across documents.
objective: masked_lm  the same rows of text, in which `train.data.masking` hides tokens; the targets are
                    each row's own tokens, not the next ones.
objective: seq2seq  a pair a row, every pair once an epoch, in another order in each. The row holds the mark
                    and the target, to predict the target and the mark; the source stands beside it.
task                no text: rows made by `train.data.tasks`, never the same one twice.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from train.config.schema import MASKING_KEYS, DataConfig
from train.data import corpus, masking, snapshot, tokenizers
from train.data import pairs as pairs_lib
from train.data.corpus import Document
from train.data.packing import (
    Batch,
    Piece,
    Sequential,
    assemble,
    pad_sources,
    rows_of,
    scoring_rows,
    shuffled,
)
from train.data.pairs import Pair
from train.data.tasks.source import TaskData

_TRAINING, _HELD_OUT = 0, 1  # what masks are drawn for: streams that share nothing


@dataclasses.dataclass(frozen=True)
class Data:
    """A run's corpus as batches: dicts of int32 arrays; `TextData`, `MaskedData` or `PairData`."""

    config: DataConfig
    snapshot: snapshot.Snapshot

    @property
    def tokenizer(self) -> tokenizers.Tokenizer:
        """Text to ids and back."""
        return self.snapshot.tokenizer

    @property
    def corpus_sha256(self) -> str:
        """Of the names and contents of all documents, training and held out."""
        return self.snapshot.meta["corpus_sha256"]

    def train_batch(self, step: int) -> Batch:
        """The batch of step 0, 1, 2, ...: always the same for the same configuration and corpus.

        Micro-batches of an accumulating step are consecutive slices of its rows.
        """
        return self._batches[step]

    def validation_text(self) -> bytes:
        """The held-out bytes, document after document: what a compressor is compared on."""
        return self.tokenizer.raw_bytes(self.snapshot.validation.tokens)


class TextData(Data):
    """Text, to predict each token from those before it: arrays [batch_size, T].

    tokens; targets, the next tokens (-1: not scored); with packing `documents` also positions and
    segment_ids (both -1 where a row holds no token).
    """

    @property
    def validation_bytes(self) -> int:
        """UTF-8 bytes of the held-out text.

        Bits per byte = (sum of nats over `scoring_batches`) / ln 2 / this. With the bytes tokenizer the
        nats include those of every end of a document, which no byte of the denominator stands for; with
        characters the first one of each document (of the text, for streams) is never predicted.
        """
        return self.snapshot.meta["validation"]["bytes"]

    @property
    def summary(self) -> str:
        """One line for a log."""
        meta = self.snapshot.meta
        return (
            f"{meta['source']}: {meta['documents']} files, {meta['train']['bytes']:,} bytes to train on, "
            f"{meta['validation']['bytes']:,} held out, {self.tokenizer.vocab_size} token ids, "
            f"sha256 {self.corpus_sha256[:16]}"
        )

    def validation_batches(self, limit: int | None = None) -> Iterator[Batch]:
        """The held-out text in rows that share nothing, for the curve during training.

        At most `limit` batches, of rows spread evenly over the text, the same ones at every call; None:
        all of them. Every pair counts at most once; a row's context starts at the row (or the document).
        """
        B, rows = self.config.batch_size, self._validation.rows
        chosen = rows if limit is None else min(limit * B, rows)
        order = np.arange(chosen) * rows // chosen
        return self._padded([tuple(self._validation.pieces(int(row))) for row in order])

    def scoring_batches(self) -> Iterator[Batch]:
        """The held-out text with every pair scored exactly once, for the final figure.

        Windows of T tokens advance by T // 2 within each document (or, for streams, within the whole
        text): a token is predicted from at least min(its offset, T / 2) tokens before it.
        """
        return self._padded(scoring_rows(self._held_out, self.config.sequence_length))

    @functools.cached_property
    def _batches(self) -> grain.MapDataset:
        config = self.config
        if config.packing == "stream":
            tokens = self.snapshot.train.tokens
            starts = len(tokens) - config.sequence_length

            def windows(_: int, rng: np.random.Generator) -> Batch:
                drawn = rng.integers(starts, size=config.batch_size).tolist()
                return self._assemble(tokens, [(Piece(start, config.sequence_length),) for start in drawn])

            return grain.MapDataset.range(1).repeat().random_map(windows, seed=config.shuffle_seed)
        rows = rows_of(self.snapshot.train.pairs, config.sequence_length)
        numbered = grain.MapDataset.range(rows).shuffle(seed=config.shuffle_seed).repeat()
        # The elements are numbers: only a whole batch is worth grain's cost per element.
        placed = numbered.map_with_index(lambda index, row: (index // rows, row))
        return placed.batch(config.batch_size, batch_fn=self._rows)

    def _rows(self, places: Sequence[tuple[int, int]]) -> Batch:
        rows = [tuple(self._epoch(epoch).pieces(row)) for epoch, row in places]
        return self._assemble(self.snapshot.train.tokens, rows)

    @functools.cached_property
    def _epoch(self) -> Any:
        config, train = self.config, self.snapshot.train

        @functools.lru_cache(maxsize=2)  # a batch may hold the end of one epoch and the start of the next
        def epoch(number: int) -> Sequential:
            return shuffled(train, config.sequence_length, config.shuffle_seed, number)

        return epoch

    @functools.cached_property
    def _held_out(self) -> Any:
        split = self.snapshot.validation
        return split if self.config.packing == "documents" else split.as_one()

    @functools.cached_property
    def _validation(self) -> Sequential:
        return Sequential(self._held_out, self.config.sequence_length)

    def _padded(self, rows: Sequence[Sequence[Piece]]) -> Iterator[Batch]:
        B = self.config.batch_size
        for first in range(0, len(rows), B):
            some = list(rows[first : first + B])
            yield self._assemble(self._held_out.tokens, some + [()] * (B - len(some)))

    def _assemble(self, tokens: np.ndarray, rows: Sequence[Sequence[Piece]]) -> Batch:
        segments = self.config.packing == "documents"
        return assemble(tokens, rows, self.config.sequence_length, segments=segments)


class MaskedData(TextData):
    """Text with some of its tokens hidden, to tell these from both sides: arrays [batch_size, T].

    tokens, as the model reads them; targets, the tokens that are hidden (-1: not scored); positions and
    segment_ids as of `TextData`. Training masks depend on (shuffle_seed, step, row), held-out ones on the
    number of the batch and the row in it alone: the same in every run of one batch size, whatever its seed.
    """

    @property
    def mask_id(self) -> int:
        """What the model reads in the place of most hidden tokens."""
        return masking.mask_id(self.tokenizer)

    @property
    def summary(self) -> str:
        """One line for a log."""
        return f"{super().summary}; {100 * self.config.mask_fraction:g} % masked, by id {self.mask_id}"

    def validation_batches(self, limit: int | None = None) -> Iterator[Batch]:
        """The held-out text in rows that share nothing: at most `limit` batches, spread evenly; None: all."""
        for number, batch in enumerate(super().validation_batches(limit)):
            # A stream's last row may have room left, which a two-sided model must not read.
            holds = batch["targets"] >= 0
            placed = {"positions": np.where(holds, np.arange(holds.shape[1], dtype=np.int32), -1)}
            yield self._hide(placed | batch, _HELD_OUT, number)

    def scoring_batches(self) -> Iterator[Batch]:
        """Every held-out token once, the share `mask_fraction` of them hidden, for the final figures."""
        return self.validation_batches()

    @functools.cached_property
    def _batches(self) -> grain.MapDataset:
        seed = self.config.shuffle_seed
        return super()._batches.map_with_index(lambda step, batch: self._hide(batch, _TRAINING, seed, step))

    def _hide(self, batch: Batch, *key: int) -> Batch:
        return masking.hide(batch, self.config, self.tokenizer, key)


class PairData(Data):
    """Pairs, to write each target from its source: a pair a row.

    tokens, targets, positions and segment_ids [batch_size, T] as in packing `documents`; sources and
    source_positions [batch_size, S] (-1 where a row holds no token).
    """

    @property
    def validation_bytes(self) -> int:
        """UTF-8 bytes of the held-out targets.

        Bits per byte = (sum of nats over `scoring_batches`) / ln 2 / this: of the targets, their sources
        given. The nats include those of every target's end, which no byte of the denominator stands for.
        """
        return self.snapshot.meta["validation"]["bytes"]

    @property
    def summary(self) -> str:
        """One line for a log."""
        meta = self.snapshot.meta
        train, held = meta["train"], meta["validation"]
        return (
            f"{meta['source']}: {train['pairs']:,} pairs to train on, {held['pairs']:,} held out; "
            f"{train['left_out'] + held['left_out']:,} left out as longer than a row; "
            f"{self.tokenizer.vocab_size} token ids, sha256 {self.corpus_sha256[:16]}"
        )

    def validation_batches(self, limit: int | None = None) -> Iterator[Batch]:
        """At most `limit` batches of held-out pairs, spread evenly, the same at every call; None: all."""
        B, pairs = self.config.batch_size, len(self.snapshot.validation.counts)
        chosen = self._spread(pairs if limit is None else limit * B)
        for first in range(0, len(chosen), B):
            rows = chosen[first : first + B]
            yield self._assemble("validation", rows + [-1] * (B - len(rows)))

    def scoring_batches(self) -> Iterator[Batch]:
        """Every held-out pair once, for the final figure."""
        return self.validation_batches()

    def held_out_sources(self, count: int) -> list[str]:
        """The sources of at most `count` held-out pairs, spread evenly."""
        sources = self.snapshot.validation_sources
        spans = [(int(sources.starts[row]), int(sources.counts[row])) for row in self._spread(count)]
        return [self.tokenizer.decode(sources.tokens[start : start + n]) for start, n in spans]

    @functools.cached_property
    def _batches(self) -> grain.MapDataset:
        pairs = len(self.snapshot.train.counts)
        numbered = grain.MapDataset.range(pairs).shuffle(seed=self.config.shuffle_seed).repeat()
        return numbered.batch(self.config.batch_size, batch_fn=functools.partial(self._assemble, "train"))

    def _spread(self, count: int) -> list[int]:
        pairs = len(self.snapshot.validation.counts)
        chosen = min(count, pairs)
        return (np.arange(chosen) * pairs // chosen).tolist()

    def _assemble(self, part: str, rows: Sequence[int]) -> Batch:
        """The pairs of these numbers; a number < 0 is an empty row."""
        targets, sources = getattr(self.snapshot, part), getattr(self.snapshot, f"{part}_sources")
        pieces = [
            (Piece(int(targets.starts[row]), int(targets.counts[row])),) if row >= 0 else () for row in rows
        ]
        batch = assemble(targets.tokens, pieces, self.config.sequence_length, segments=True)
        return batch | pad_sources(sources, rows, self.config.source_width)


def prepare(
    config: DataConfig, run_dir: str | Path, objective: str = "causal_lm"
) -> TextData | PairData | TaskData:
    """The data of a run: its snapshot in run_dir/data, made from the corpus on the first call; or its task.

    ValueError in one line: a corpus that cannot be read, is empty or too short (see `train.data.corpus` and
    `train.data.pairs`), a snapshot that is damaged or was made by another data section.
    """
    if config.task is not None:
        return TaskData(config)
    folder = Path(run_dir) / "data"
    make, kind = {
        "causal_lm": (_make, TextData),
        "masked_lm": (_make, MaskedData),
        "seq2seq": (_make_pairs, PairData),
    }[objective]
    if not folder.exists():
        snapshot.write(folder, make(config))
    data = kind(config, snapshot.read(folder))
    _check_config(data, folder)
    assert (data.snapshot.train_sources is not None) == (kind is PairData), "run_folder compares objectives"
    return data


def _make(config: DataConfig) -> snapshot.Snapshot:
    text = corpus.read(config.files)
    parts = corpus.split(text, config.validation_split, config.validation_fraction)
    tokenizer = tokenizers.make(config.tokenizer, (document.text for document in text.documents))
    splits = [snapshot.encode(documents, tokenizer) for documents in parts]
    meta = _meta(config, text, tokenizer)
    for name, documents, split in zip(("train", "validation"), parts, splits, strict=True):
        _check_length(config, name, split)
        sizes = [len(document.text.encode()) for document in documents]
        meta[name] = {"documents": len(documents), "bytes": sum(sizes), "tokens": len(split.tokens)}
    return snapshot.Snapshot(tokenizer, *splits, meta)


def _make_pairs(config: DataConfig) -> snapshot.Snapshot:
    found = pairs_lib.read(config.files, config.validation_split, config.validation_fraction)
    tokenizer = tokenizers.make(config.tokenizer, ())
    assert tokenizer.end_of_document is not None, "train.config.schema refuses a tokenizer without it"
    meta = _meta(config, found.text, tokenizer) | {"unparsed_files": found.unparsed}
    splits, known = {}, set(found.train)
    for name, every in (("train", found.train), ("validation", found.validation)):
        pairs = [pair for pair in every if _fits(config, pair, tokenizer)]
        if not pairs:
            raise ValueError(_no_pair(config, name, len(every)))
        splits[name] = snapshot.encode([Document("", pair.target) for pair in pairs], tokenizer)
        splits[f"{name}_sources"] = snapshot.encode_sources([pair.source for pair in pairs], tokenizer)
        meta[name] = {
            "pairs": len(pairs),
            "left_out": len(every) - len(pairs),
            "bytes": sum(len(pair.target.encode()) for pair in pairs),
            "tokens": len(splits[name].tokens),
        }
    meta["validation"]["also_in_training"] = sum(pair in known for pair in pairs)
    return snapshot.Snapshot(tokenizer, meta=meta, **splits)


def _meta(config: DataConfig, text: corpus.Corpus, tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
    return {
        "source": text.source,
        "corpus_sha256": text.sha256(),
        "documents": len(text.documents),
        "skipped_files": text.skipped,
        "vocab_size": tokenizer.vocab_size,
        "config": _choices(config),
    }


def _choices(config: DataConfig) -> dict[str, Any]:
    """The keys that a snapshot is made by; masks are drawn from it later."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in MASKING_KEYS}


def _fits(config: DataConfig, pair: Pair, tokenizer: tokenizers.Tokenizer) -> bool:
    """Whether the source, and the target with a mark, each fit a row."""
    target, source = tokenizer.encode(pair.target), tokenizer.encode(pair.source)
    return target.size < config.sequence_length and source.size <= config.source_width


def _no_pair(config: DataConfig, name: str, found: int) -> str:
    part = {"train": "training", "validation": "held-out"}[name]
    if not found:
        return f"the {part} part of the corpus holds no pair: give more, or change data.validation_fraction"
    return (
        f"none of the {found} {part} pairs fits data.source_length {config.source_width} and "
        f"data.sequence_length {config.sequence_length} (the target and a mark): raise them"
    )


def _check_length(config: DataConfig, name: str, split: snapshot.Split) -> None:
    """ValueError where a split does not fill one row."""
    needs = config.sequence_length
    has = split.pairs if config.packing == "documents" else len(split.tokens) - 1
    if has < needs:
        part = {"train": "training", "validation": "held-out"}[name]
        raise ValueError(
            f"the corpus is too short: its {part} part has {max(has, 0)} tokens to predict, a row needs "
            f"{needs}: give more text or lower data.sequence_length"
        )


def _check_config(data: Data, folder: Path) -> None:
    """ValueError that names the keys in which the snapshot's data section differs."""
    made, asked = data.snapshot.meta["config"], _choices(data.config)
    differences = [
        f"data.{key} was {json.dumps(made.get(key))}, is {json.dumps(asked.get(key))}"
        for key in {**asked, **made}
        if made.get(key) != asked.get(key)
    ]
    if differences:
        raise ValueError(f"{folder} was made by another configuration: {'; '.join(differences)}")
