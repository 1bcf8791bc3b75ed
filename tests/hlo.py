"""The instructions that a compiled loop runs, read from the text of its optimised HLO."""

from __future__ import annotations

import dataclasses
import math
import re

_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|branch_computations)=(?:%?([\w.\-]+)|\{([^}]*)\})")
_SHAPE = re.compile(r"^\w+\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction. size: the number of elements of its result; 0 for a tuple."""

    name: str
    opcode: str
    size: int
    text: str


def loop_instructions(hlo: str) -> list[Instruction]:
    """All instructions that the outermost while loops run, those inside fusions and inner loops included.

    Inner loops apart that go on until something is finite, which it is.
    """
    computations, entry = _computations(hlo)
    pending, outside, seen = [], [entry], set()
    while outside:  # a backend may put the loop into a computation that the entry calls
        for x in computations[outside.pop()]:
            (pending if x.opcode == "while" else outside).extend(_called(x.text))
    assert pending, "the program has no loop"
    while pending:
        name = pending.pop()
        if name not in seen:
            seen.add(name)
            pending += [
                called
                for x in computations[name]
                if not (x.opcode == "while" and _tests_for_finite(computations, x))
                for called in _called(x.text)
            ]
    return [x for name in sorted(seen) for x in computations[name]]


def _computations(hlo: str) -> tuple[dict[str, list[Instruction]], str]:
    found, entry, current = {}, "", None
    for line in hlo.splitlines():
        if header := _HEADER.match(line):
            current = found.setdefault(header[1], [])
            entry = header[1] if line.startswith("ENTRY") else entry
        elif current is not None and (match := _LINE.match(line)):
            shape = _SHAPE.match(match[2])
            size = math.prod(int(n) for n in shape[1].split(",") if n) if shape else 0
            current.append(Instruction(match[1], match[3], size, line.strip()))
    return found, entry


def _tests_for_finite(computations: dict[str, list[Instruction]], loop: Instruction) -> bool:
    condition = re.search(r"condition=%?([\w.\-]+)", loop.text)[1]
    inside = [condition, *(called for x in computations[condition] for called in _called(x.text))]
    return any(x.opcode == "is-finite" for name in inside for x in computations[name])


def _called(text: str) -> list[str]:
    found = [one or several for one, several in _CALLED.findall(text)]
    return [name.strip().lstrip("%") for names in found for name in names.split(",")]
