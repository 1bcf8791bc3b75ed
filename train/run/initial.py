"""`init_from`: training that starts from the parameters of a published model or of another run.

The run's configuration then holds that model, so that it is resumed without the source once a checkpoint is
saved. `published/` in the run's folder keeps the source's config.json and tokenizer files, for
`scripts/convert.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from attention_jax import tokenizers
from attention_jax.model import ModelConfig
from attention_jax.pretrained import load_pretrained
from attention_jax.pretrained.models import config_of, describe_folder, resolve
from train.config import yaml_text
from train.config.schema import RunConfig
from train.data import snapshot
from train.data.prepare import prepare
from train.run.files import exists, writing
from train.run.folder import RunFolder, saved_config
from train.run.published import is_published
from train.run.restore import fresh_state, load_run, run_model, state_of

PUBLISHED = "published"
#: Fields of a model that say how it is computed: a run may have others than its source.
EXECUTION = ("dtype", "scan_layers", "remat")


def resolved(config: RunConfig) -> RunConfig:
    """The configuration with the model of `init_from`, of which only descriptions are read.

    A run that has begun has it in its own folder. ValueError for a source that cannot be read, and for a
    key of `model` that is neither absent nor that of the source.
    """
    if config.init_from is None:
        return config
    if (own := _begun(config)) is not None:
        return dataclasses.replace(config, model=_merged(config, own.model))
    published, name = _source(config.init_from)
    try:
        source = config_of(name) if published else run_model(Path(name))
    except ValueError as error:
        raise ValueError(f"init_from: {error}") from None
    return dataclasses.replace(config, model=_merged(config, source))


def initial_tokenizer(config: RunConfig) -> tokenizers.Tokenizer:
    """The tokenizer of the source. ValueError where it has none."""
    published, name = _source(config.init_from)
    if published:
        return tokenizers.load_tokenizer(resolve(name))
    if not exists(Path(name) / "data"):
        raise ValueError(f"init_from {config.init_from}: this run is of a task and has no tokenizer")
    return snapshot.read_tokenizer(Path(name) / "data")[0]


def initial_params(config: RunConfig, model: ModelConfig) -> dict[str, Any]:
    """The source's parameters in float32. ValueError where the model is not that of `resolved`."""
    published, name = _source(config.init_from)
    loaded = load_pretrained(name, dtype="float32") if published else load_run(name)
    config_, params = (loaded.config, loaded.params) if published else (loaded.model, loaded.params)
    if differing := _differing(config_, model):
        raise ValueError(f"init_from {config.init_from}: its model has changed: {differing[0]} is another")
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)


def prepared(config: RunConfig, folder: RunFolder) -> Any:
    """The data of a run, with the source's tokenizer; a new run's folder gets the source's description."""
    make = functools.partial(initial_tokenizer, config)
    with writing(folder.path / "data"):
        data = prepare(config.data, folder.path, config.objective, make)
    if config.init_from is not None and not folder.begun:
        keep_description(config, folder.path)
    return data


def first_state(config: RunConfig, model: ModelConfig, key: jax.Array) -> dict[str, Any]:
    """The arrays that training begins with: the source's parameters, or new ones."""
    if config.init_from is None:
        return fresh_state(config, model, key)
    return state_of(config, initial_params(config, model))


def keep_description(config: RunConfig, folder: Path) -> None:
    """Write a published source's config.json and tokenizer files into the run's folder."""
    published, name = _source(config.init_from)
    target = folder / PUBLISHED
    shutil.rmtree(target, ignore_errors=True)
    if published:
        target.mkdir()
        describe_folder(resolve(name), target)
    elif exists(Path(name) / PUBLISHED):
        shutil.copytree(Path(name) / PUBLISHED, target)


def _begun(config: RunConfig) -> RunConfig | None:
    """The saved configuration of a run that has begun with the same source."""
    folder = Path(config.run_dir) if config.run_dir is not None else None
    if folder is None or not exists(folder / "config.yaml"):
        return None
    own = saved_config(folder)
    return own if own.init_from == config.init_from else None


def _source(text: str) -> tuple[bool, str]:
    """(whether it is a published model, its path or name)."""
    kind, _, name = text.partition(":")
    if kind in ("hf", "run") and name:
        return kind == "hf", str(Path(name).expanduser())
    path = str(Path(text).expanduser())
    return is_published(path), path


def _merged(config: RunConfig, source: ModelConfig) -> ModelConfig:
    """The source's model, computed as the run's configuration says. ValueError for a key in conflict."""
    plain = ModelConfig()
    given = {f.name: getattr(config.model, f.name) for f in dataclasses.fields(ModelConfig)}
    for name, value in given.items():
        if name in EXECUTION or value in (getattr(plain, name), getattr(source, name)):
            continue
        raise ValueError(
            f"model.{name} {_brief(value)}: the model of init_from {config.init_from} has "
            f"{_brief(getattr(source, name))}; remove the key"
        )
    return dataclasses.replace(source, **{name: given[name] for name in EXECUTION})


def _differing(one: ModelConfig, other: ModelConfig) -> list[str]:
    names = (f.name for f in dataclasses.fields(ModelConfig) if f.name not in EXECUTION)
    return [name for name in names if getattr(one, name) != getattr(other, name)]


def _brief(value: Any) -> str:
    simple = value is None or isinstance(value, bool | int | float | str)
    return yaml_text.scalar(value) if simple else "another value"
