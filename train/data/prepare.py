"""A run's data: its snapshot, made from the corpus at the first start, or its synthetic task."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from attention_jax import tokenizers
from train.config.sections import MASKING_KEYS, DataConfig
from train.data import corpus, snapshot
from train.data import pairs as pairs_lib
from train.data.batches import PAIR_ORDER, Data, MaskedData, PairData, TextData
from train.data.corpus import Document
from train.data.pairs import Pair
from train.data.tasks.source import TaskData
from train.run.files import exists
from train.run.migration import FORMAT, migrate_config


def prepare(
    config: DataConfig,
    run_dir: str | Path,
    objective: str = "causal_lm",
    tokenizer: Callable[[], tokenizers.Tokenizer] | None = None,
) -> TextData | PairData | TaskData:
    """The data of a run: its snapshot in run_dir/data, made from the corpus on the first call; or its task.

    tokenizer: makes that of `data.tokenizer: init_from`, where the snapshot is made.
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
    try:
        made = exists(folder)
    except OSError as error:
        raise ValueError(f"{folder} cannot be used: {error.strerror}; it may be sound") from None
    if not made:
        new = make(config, tokenizer)
        snapshot.check_corpus(Path(run_dir), new)
        snapshot.write(folder, new)
    data = kind(config, snapshot.read(folder))
    _check_config(data, folder)
    order = data.snapshot.meta.get("pair_order", 1)
    if order not in range(1, PAIR_ORDER + 1):
        raise ValueError(
            f"{folder} has pair_order {order}, this version knows 1 to {PAIR_ORDER}: use the version that "
            "wrote it, or choose another run_dir"
        )
    assert (data.snapshot.train_sources is not None) == (kind is PairData), "RunFolder compares objectives"
    return data


MakeTokenizer = Callable[[], tokenizers.Tokenizer] | None


def _tokenizer(config: DataConfig, made: MakeTokenizer, texts: Iterable[str]) -> tokenizers.Tokenizer:
    if config.tokenizer != "init_from":
        return tokenizers.make(config.tokenizer, texts)
    assert made is not None, "a run with init_from gives its tokenizer"
    return made()


def _make(config: DataConfig, made: MakeTokenizer) -> snapshot.Snapshot:
    text = corpus.read(config.files)
    parts = corpus.split(text, config.validation_split, config.validation_fraction)
    tokenizer = _tokenizer(config, made, (document.text for document in text.documents))
    splits = [snapshot.encode(documents, tokenizer) for documents in parts]
    meta = _meta(config, text, tokenizer)
    for name, documents, split in zip(("train", "validation"), parts, splits, strict=True):
        _check_length(config, name, split)
        sizes = [len(document.text.encode()) for document in documents]
        meta[name] = {"documents": len(documents), "bytes": sum(sizes), "tokens": len(split.tokens)}
    return snapshot.Snapshot(tokenizer, *splits, meta)


def _make_pairs(config: DataConfig, made: MakeTokenizer) -> snapshot.Snapshot:
    found = pairs_lib.read(config.files, config.validation_split, config.validation_fraction)
    tokenizer = _tokenizer(config, made, ())
    assert tokenizer.end_of_document is not None, "train.config.schema refuses a tokenizer without it"
    meta = _meta(config, found.text, tokenizer) | {
        "unparsed_files": found.unparsed,
        "pair_order": PAIR_ORDER,
    }
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
        "notes": text.notes(),
        "vocab_size": tokenizer.vocab_size,
        "config": {"format": FORMAT, **_choices(config)},
    }


def _choices(config: DataConfig) -> dict[str, Any]:
    """The keys that determine a snapshot; masks are drawn later."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in MASKING_KEYS}


def _fits(config: DataConfig, pair: Pair, tokenizer: tokenizers.Tokenizer) -> bool:
    """Whether the source, and the target with the end-of-document token, each fit a row."""
    target, source = tokenizer.encode(pair.target), tokenizer.encode(pair.source)
    return target.size < config.sequence_length and source.size <= config.source_width


def _no_pair(config: DataConfig, name: str, found: int) -> str:
    part = {"train": "training", "validation": "held-out"}[name]
    if not found:
        return (
            f"the {part} part of the corpus has no pair: give more pairs, or change data.validation_fraction"
        )
    return (
        f"none of the {found} {part} pairs fits data.source_length {config.source_width} and "
        f"data.sequence_length {config.sequence_length} (target and end-of-document token): raise them"
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
    """ValueError that names the keys in which the snapshot's data section differs.

    A key that was added after the snapshot was written had its default.
    """
    saved = dict(data.snapshot.meta["config"])
    number = saved.pop("format", 1)
    migrated = migrate_config({"format": number, "data": saved})["data"]
    made, asked = _choices(DataConfig()) | migrated, _choices(data.config)
    differences = [
        f"data.{key} was {json.dumps(made.get(key))}, is {json.dumps(asked.get(key))}"
        for key in {**asked, **made}
        if made.get(key) != asked.get(key)
    ]
    if differences:
        raise ValueError(
            f"{folder} was made by another configuration: {'; '.join(differences)}; choose another run_dir"
        )
