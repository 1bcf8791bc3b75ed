"""Writes a model as a folder of Hugging Face: config.json, safetensors, tokenizer.

    python scripts/convert.py runs/finetuned out/finetuned --dtype bfloat16
    python scripts/convert.py model.gguf out/model

SOURCE is a run, a folder of Hugging Face, a .gguf file or hf:OWNER/NAME. A
run that began with init_from: hf:NAME gets the config.json and tokenizer of
that model; another one those of Llama or Qwen 3, if they compute the same,
which is checked. Without --dtype the parameters keep every bit. TARGET must not
exist.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jax

from attention_jax.model import ModelConfig
from attention_jax.pretrained import load_pretrained, save_pretrained
from attention_jax.pretrained.families.express import expressed
from attention_jax.pretrained.models import describe_folder
from attention_jax.tokenizers import write_tokenizer
from train import command_line
from train.commands.types import Folder, Positional
from train.run.files import exists
from train.run.initial import EXECUTION, PUBLISHED
from train.run.published import dtypes, is_published, source_path
from train.run.restore import load_run


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line gives."""

    source: Positional[Folder]  #: a run's folder, or a published model: folder, .gguf file or hf:OWNER/NAME
    target: Positional[Folder]  #: the new folder
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  #: of the parameters; none: as they are
    step: Literal["latest", "best"] = "latest"  #: the checkpoint of a run


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, the process's own if None; the exit status."""
    return command_line.run(Options, _main, __doc__, argv)


def _main(options: Options) -> None:
    if exists(options.target):
        raise ValueError(f"{options.target} exists: name a new folder")
    with tempfile.TemporaryDirectory() as temporary:
        if is_published(options.source):
            like = source_path(options.source)
            config, params, _ = load_pretrained(like, dtype=options.dtype)
            if not like.is_dir():
                describe_folder(like, Path(temporary))
                like = Path(temporary)
        else:
            config, params, like = _of_run(options, Path(temporary))
        save_pretrained(options.target, config, params, like=like)
    print(f"{options.target}: {', '.join(dtypes(params))} parameters", file=sys.stderr)


def _of_run(options: Options, temporary: Path) -> tuple[ModelConfig, dict, Path]:
    """(model, parameters, folder that describes it) of a run. ValueError for a model without config.json."""
    run = load_run(options.source, step=options.step)
    params, like = run.params, options.source / PUBLISHED
    if options.dtype is not None:
        params = jax.tree.map(lambda x: x.astype(options.dtype), params)
    if exists(like / "config.json"):
        plain = {name: getattr(ModelConfig(), name) for name in EXECUTION}
        return dataclasses.replace(run.model, **plain), params, like
    config, values = expressed(run.model)
    (temporary / "config.json").write_text(json.dumps(values))
    if run.tokenizer is not None:
        write_tokenizer(temporary, run.tokenizer)
    return config, params, temporary
