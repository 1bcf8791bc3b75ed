"""Pairs of a source and a target text, the data of objective seq2seq.

Files given by data.files hold a pair a line, `source<TAB>target`. Without them the pairs come from the source
of the Python standard library, which is parsed and never imported. The task is to restore spaces and capitals
(word segmentation): the target is the first line of a docstring, the source the same letters run together:

    returnthenumberoftimesvalueoccurs.  ->  Return the number of times value occurs.
"""

from __future__ import annotations

import ast
import dataclasses
import warnings
from typing import NamedTuple

from train.data import corpus
from train.data.corpus import Corpus, Document


class Pair(NamedTuple):
    """A source text and its target text."""

    source: str
    target: str


@dataclasses.dataclass(frozen=True)
class Pairs:
    """A corpus as pairs, in the order of its files and lines; `unparsed` files are not valid Python."""

    text: Corpus
    train: tuple[Pair, ...]
    validation: tuple[Pair, ...]
    unparsed: int


def read(files: str | None, how: str, fraction: float) -> Pairs:
    """The pairs of a glob, or the standard library's for None, split as `corpus.split` splits text.

    how: `files` holds out whole files, the very ones `corpus.split` does; `tail` the last pairs, as `files`
      does for an only file.
    ValueError in one line: what `corpus.read` refuses; a line that is not a pair, by file and number.
    """
    text = corpus.read(files)
    found = {document.name: _of(document, files is None) for document in text.documents}
    unparsed = sum(pairs is None for pairs in found.values())
    if how == "files" and len(text.documents) > 1:
        train, validation = (
            tuple(pair for document in part for pair in found[document.name] or ())
            for part in corpus.split(text, how, fraction)
        )
    else:
        every = tuple(pair for pairs in found.values() for pair in pairs or ())
        cut = int(len(every) * round(1 - fraction, 12))
        train, validation = every[:cut], every[cut:]
    return Pairs(text, train, validation, unparsed)


def of_table(text: str, name: str) -> list[Pair]:
    """The pairs of the lines of `text`, without blank ones. ValueError names a line that is not a pair."""
    pairs = []
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r")
        if not line.strip(" "):
            continue
        parts = line.split("\t")
        if len(parts) != 2:
            raise ValueError(
                f"data.files: {name}:{number} has {len(parts) - 1} tabs: a line must be source<TAB>target"
            )
        if not all(parts):
            empty = "target" if parts[0] else "source"
            raise ValueError(f"data.files: {name}:{number} has an empty {empty}: write or delete the line")
        pairs.append(Pair(*parts))
    return pairs


def of_module(text: str) -> list[Pair]:
    """(its letters in lower case without spaces, first line of the docstring) of each function, in order.

    A docstring that is blank or not valid Unicode gives no pair, nor does a line of a single word.
    SyntaxError where `text` is not valid Python.
    """
    with warnings.catch_warnings(action="ignore"):  # such as an invalid escape in the parsed file
        tree = ast.parse(text)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    pairs = []
    for node in sorted(functions, key=lambda node: (node.lineno, node.col_offset)):
        summary = (ast.get_docstring(node) or "").partition("\n")[0].strip()
        words = summary.lower().split()
        if len(words) > 1 and _is_unicode(summary):
            pairs.append(Pair("".join(words), summary))
    return pairs


def _of(document: Document, is_module: bool) -> list[Pair] | None:
    if not is_module:
        return of_table(document.text, document.name)
    try:
        return of_module(document.text)
    except (SyntaxError, ValueError, RecursionError):
        return None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
