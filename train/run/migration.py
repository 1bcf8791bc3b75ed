"""Run folders and checkpoints of earlier formats, brought to the one that this version writes.

A saved configuration (config.yaml, and its copy in a checkpoint's info.json) has a key `format`, and so has
a checkpoint's manifest.json; where it is absent the format is 1. `STEPS[n]` leads from format n to n + 1. It
works on what has been read and verified: no file of an earlier format is rewritten. A key that was added
with a default needs no step: reading fills in the default.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any

FORMAT = 2
#: Keys of earlier formats and what they are called now, for the message about a key in a user's own file.
RENAMED = {"layers": "scan_layers", "sinks": "sink_logits"}


@dataclasses.dataclass(frozen=True)
class Step:
    """From one format to the next.

    config: changes the nested dicts and lists of a configuration in place.
    path: the new path of the array whose path is given, such as params/stacks/0/mixer/q/kernel or
      opt_state/0/mu/embed/embedding.
    """

    config: Callable[[dict[str, Any]], None]
    path: Callable[[str], str]


def migrate_config(raw: dict[str, Any], absent: int = 1) -> dict[str, Any]:
    """A configuration as YAML holds it, in the present format and without its `format` key.

    absent: the format where the key is absent. ValueError for a format that this version does not read.
    """
    raw = copy.deepcopy(raw)
    number = raw.pop("format", absent)
    check_format(number)
    for step in range(number, FORMAT):
        STEPS[step].config(raw)
    return raw


def migrate_path(path: str, number: int) -> str:
    """The present path of the array that a checkpoint of format `number` holds at `path`."""
    for step in range(number, FORMAT):
        path = STEPS[step].path(path)
    return path


def check_format(number: Any) -> None:
    """ValueError for a format that this version does not read."""
    if type(number) is not int or not 1 <= number <= FORMAT:
        raise ValueError(
            f"format is {number!r}, this version reads 1 to {FORMAT}: use the version that wrote it"
        )


def config_hash_of_format_1(raw: dict[str, Any]) -> str:
    """`config_sha256` of the checkpoints of format 1, from their run's config.yaml of that format."""
    flat = flatten(raw)
    left_out = {"run_dir", "log_every", "evaluation.sample_prompt", "evaluation.sample_tokens"}
    if flat.get("data.task") is None:
        left_out.add("data.task")
    if flat.get("objective") != "masked_lm":
        left_out |= {"data.mask_fraction", "data.mask_replaced", "data.mask_random"}
    kept = {key: value for key, value in flat.items() if key not in left_out}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """The scalars of nested dicts and lists by their dotted keys."""
    if not isinstance(value, dict | list):
        return {path: value}
    flat: dict[str, Any] = {}
    for key, below in value.items() if isinstance(value, dict) else enumerate(value):
        flat |= flatten(below, f"{path}.{key}" if path else str(key))
    return flat


def _rename_config_of_format_1(raw: dict[str, Any]) -> None:
    """model.layers -> model.scan_layers; softmax and cross: sinks -> sink_logits; mosaic_gpu_fused."""
    model = raw.get("model")
    if isinstance(model, dict) and "layers" in model:
        if model["layers"] not in ("unrolled", "scan"):
            raise ValueError(f"model.layers must be unrolled or scan, got {model['layers']!r}")
        _rename(model, "layers", "scan_layers")
        model["scan_layers"] = model["scan_layers"] == "scan"
    for section in _dicts(model):
        if section.get("kind") in ("softmax", "cross"):
            _rename(section, "sinks", "sink_logits")
        if section.get("impl") == "mosaic_gpu_fused":
            section["impl"] = "mosaic_gpu"


def _rename(section: dict[str, Any], old: str, new: str) -> None:
    """Move a key, if it exists; ValueError if the section has the new one, too."""
    if old in section and new in section:
        raise ValueError(f"{old} and {new} are the old and the new name of one key: remove one")
    if old in section:
        section[new] = section.pop(old)


def _dicts(value: Any) -> Iterator[dict[str, Any]]:
    """`value` and everything below it that is a dict."""
    if isinstance(value, dict):
        yield value
    if isinstance(value, dict | list):
        for below in value.values() if isinstance(value, dict) else value:
            yield from _dicts(below)


def _rename_path_of_format_1(path: str) -> str:
    """.../mixer/sinks -> .../mixer/sink_logits, of the parameter and of its moments."""
    return path.removesuffix("sinks") + "sink_logits" if path.endswith("/mixer/sinks") else path


STEPS = {1: Step(config=_rename_config_of_format_1, path=_rename_path_of_format_1)}
