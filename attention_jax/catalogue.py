"""Every mechanism with its paper, cost, cache and implementations: `catalogue()`, `python -m attention_jax`.

Mixers come from the registry of `MixerConfig` and masks from `attention_jax.masks`, each with the `about` of
its class.
"""

from __future__ import annotations

import dataclasses
import itertools
import textwrap
from collections.abc import Iterable

import attention_jax.masks as masks
from attention_jax.about import About
from attention_jax.masks import Mask
from attention_jax.mixers import mixer_kinds
from attention_jax.ops.softmax.api import implementations


@dataclasses.dataclass(frozen=True)
class Entry:
    """A mechanism: its name in code and YAML, and the fields of its `About`."""

    group: str
    name: str
    title: str
    paper: str
    time: str
    memory: str
    cache: str
    causal: bool
    implementations: tuple[str, ...]


def catalogue() -> list[Entry]:
    """All mechanisms: mixers by `kind`, masks by class, biases and position codes by name."""
    entries = [
        _entry("mixer", kind, cls.about, cls.implementations(), causal=cls.direction != "bidirectional")
        for kind, cls in mixer_kinds().items()
    ]
    entries += [_entry("mask", name, cls.about, implementations()) for name, cls in _masks().items()]
    return entries + [
        _entry(group, name, dataclasses.replace(about, cache="-"), implementations())
        for group, name, about in _TERMS
    ]


_WIDTH, _NAME_WIDTH = 80, 28


def table() -> str:
    """The catalogue as text of at most 80 columns."""
    lines, group = [], None
    for entry in catalogue():
        if entry.group != group:
            group = entry.group
            lines += ["", _HEADINGS[group]]
        facts = f"{entry.title} ({entry.paper})" if entry.paper else entry.title
        costs = f"time {entry.time}, memory {entry.memory}"
        if entry.cache != "-":
            costs += f"; cache: {entry.cache}"
        lines += _wrapped(entry.name, facts) + _wrapped("", costs if entry.causal else f"{costs}; not causal")
        if group == "mixer":
            lines += _wrapped("", f"impl: {', '.join(entry.implementations)}")
    return "\n".join(lines[1:])


def described(entry: Entry) -> str:
    """One entry as text, a fact per line, of at most 80 columns."""
    facts = {
        "what": entry.title,
        "group": _HEADINGS[entry.group],
        "paper": entry.paper or "-",
        "time": entry.time,
        "memory": entry.memory,
        "cache": entry.cache,
        "causal": "yes" if entry.causal else "no",
        "implementations": ", ".join(entry.implementations),
    }
    lines = [_wrapped(f"  {name}", fact) for name, fact in facts.items()]
    return "\n".join([entry.name, *itertools.chain(*lines)])


def _wrapped(head: str, text: str) -> list[str]:
    """The text beside a head, wrapped."""
    width = _WIDTH - _NAME_WIDTH
    first, *rest = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
    return [f"{head:<{_NAME_WIDTH - 2}}  {first}", *(" " * _NAME_WIDTH + line for line in rest)]


_HEADINGS = {
    "mixer": "mixers (`kind` in YAML)",
    "mask": "masks, which compose with & | ~",
    "bias": "additive score terms",
    "score": "other score terms",
    "position": "positions",
}

# Mechanisms that are options of a mixer, without a mask or mixer class of their own.
_TERMS = (
    ("bias", "alibi", About("ALiBi", "arXiv 2108.12409", "O(1) per pair")),
    ("bias", "t5", About("T5 relative position bias", "arXiv 1910.10683", "O(1) per pair")),
    ("bias", "an array", About("Additive bias, differentiated", "", "O(1) per pair", "the array")),
    ("score", "softcap", About("c tanh(x / c)", "arXiv 2408.00118", "O(1) per pair")),
    ("score", "sink_logits", About("Learned sink logit per head", "arXiv 2508.10925", "O(1) per row")),
    ("score", "qk_norm: rms", About("RMS norm of q and k", "arXiv 2302.05442", "O(1) per token")),
    ("score", "qk_norm: l2", About("Unscaled RMS norm of q and k", "Llama 4 model card", "O(1) per token")),
    ("score", "temperature", About("Query temperature", "Llama 4 model card", "O(1) per token")),
    ("score", "dropout", About("Attention dropout by position", "arXiv 1706.03762", "O(1) per pair")),
    ("position", "rope", About("Rotary", "arXiv 2104.09864", "O(1) per token")),
    ("position", "rope.scaling: linear", About("Interpolation", "arXiv 2306.15595", "O(1) per token")),
    ("position", "rope.scaling: dynamic_ntk", About("NTK-aware base", "arXiv 2309.00071", "O(1) per token")),
    ("position", "rope.scaling: yarn", About("YaRN", "arXiv 2309.00071", "O(1) per token")),
    ("position", "rope.scaling: llama3", About("Llama 3", "arXiv 2407.21783", "O(1) per token")),
    ("position", "rope.scaling: longrope", About("LongRoPE", "arXiv 2402.13753", "O(1) per token")),
    ("position", "rope.xpos", About("xPos, fixed centre", "arXiv 2212.10554", "O(1) per token")),
    ("position", "max_positions", About("Learned absolute", "arXiv 1706.03762", "O(1) per token")),
    ("position", "sinusoidal", About("Sinusoidal absolute", "arXiv 1706.03762", "O(1) per token")),
)  # fmt: skip


def _entry(group: str, name: str, about: About, runs: Iterable[str], *, causal: bool = True) -> Entry:
    return Entry(group, name, **dataclasses.asdict(about), causal=causal, implementations=tuple(runs))


def _masks() -> dict[str, type]:
    classes = {name: getattr(masks, name) for name in masks.__all__}
    return {n: c for n, c in classes.items() if isinstance(c, type) and issubclass(c, Mask) and c.about}
