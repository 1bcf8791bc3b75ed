"""Published models as folders of Hugging Face or GGUF files: `load_pretrained` and `save_pretrained`."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from attention_jax.model import ModelConfig
from attention_jax.optional import need
from attention_jax.pretrained.description import Description
from attention_jax.pretrained.families import family_of
from attention_jax.pretrained.family import Family
from attention_jax.pretrained.files import new_folder, open_tensors, write_safetensors
from attention_jax.pretrained.gguf_models import GGUFModel
from attention_jax.pretrained.load import load_params, saved_specs, saved_tensors
from attention_jax.tokenizers import Tokenizer, load_tokenizer, write_tokenizer

_MOST_JSON = 100_000_000
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*")
#: What a folder holds beside its weights and is copied by `save_pretrained`.
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "vocab.json",
    "merges.txt", "added_tokens.json", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
_DOWNLOADED = ("*.safetensors", "*.safetensors.index.json", "config.json", *COMPANIONS)


class Pretrained(NamedTuple):
    """A loaded model. params: nested dicts, as `init_params` returns. tokenizer: None if there is none."""

    config: ModelConfig
    params: dict
    tokenizer: Tokenizer | None


def load_pretrained(
    name: str | os.PathLike,
    *,
    dtype: Any = None,
    compute_dtype: str = "float32",
    mesh: jax.sharding.Mesh | None = None,
    length: int | None = None,
) -> Pretrained:
    """The configuration, the parameters and the tokenizer of a published model.

    Tensors are read one at a time, so that the host's memory holds the model and one tensor.

    Args:
      name: a folder with config.json and safetensors, a .gguf file, or the name of a repository on the
        Hugging Face hub, such as HuggingFaceTB/SmolLM2-135M, which is downloaded. A folder of that name comes
        first.
      dtype: of the stored parameters; None: as in the files.
      compute_dtype: `ModelConfig.dtype`, of the computation.
      mesh: split every parameter over all devices of a mesh, along its longest axis that they divide.

      length: the longest text in tokens, for LongRoPE, which has other frequencies beyond the trained length;
        None: the trained length. A longer text is then refused by `generate`.

    Raises: ValueError for an architecture, an option or a tensor that is not supported, is missing or does
    not fit, by name. Pickles are never read and code of a repository never run.
    """
    path = resolve(name)
    tensors = open_tensors(path)
    if path.is_dir():
        description = describe(path, length)
    else:
        tensors = GGUFModel(tensors, str(path))
        description = tensors.description
    family = family_of(description.model_type)
    config = read_config(family, description)
    config = dataclasses.replace(config, dtype=compute_dtype)
    put = None if mesh is None else lambda _, x: jax.device_put(x, _spread(mesh, x.shape))
    params = load_params(family, config, tensors, dtype=dtype, put=put)
    return Pretrained(config, params, load_tokenizer(path) if _has_tokenizer(path) else None)


def save_pretrained(
    folder: str | os.PathLike, config: ModelConfig, params: Mapping[str, Any], *, like: str | os.PathLike
) -> None:
    """Write a model as a folder that transformers loads: config.json, safetensors, and the tokenizer's files.

    The parameters are written bit for bit, in the dtype that they have. The folder appears when it is
    complete.

    Args:
      folder: must not exist.
      like: the folder that the model was loaded from: its config.json and tokenizer are written again, with
        the dtype of the parameters and without a quantisation. ValueError if it describes another model than
        `config`.
    """
    like = resolve(like)
    if not like.is_dir():
        raise ValueError(f"{like}: save_pretrained needs a folder with a config.json; GGUF is only read")
    description = describe(like)
    family = family_of(description.model_type)
    length = None if config.limit is None else config.limit[0]
    description = Description(description.values, description.where, length=length)
    expected = dataclasses.replace(read_config(family, description), dtype=config.dtype)
    if expected != config:
        raise ValueError(
            f"{like / 'config.json'} describes another model than config: {_difference(expected, config)}"
        )
    specs = saved_specs(family, config, params)
    names = {np.dtype(spec.dtype).name for spec in specs.values()}
    values = {key: value for key, value in description.values.items() if key != "quantization_config"} | (
        {"dtype" if "dtype" in description.values else "torch_dtype": names.pop()} if len(names) == 1 else {}
    )
    with new_folder(folder) as target:
        write_safetensors(target, specs, saved_tensors(family, config, params))
        (target / "config.json").write_text(json.dumps(values, indent=2) + "\n")
        for companion in COMPANIONS:
            if (like / companion).is_file():
                shutil.copyfile(like / companion, target / companion)


def resolve(name: str | os.PathLike) -> Path:
    """The path of a local folder or file, or that of a repository of the hub after its download."""
    path = Path(name)
    if path.exists():
        return path
    if not is_hub_name(str(name)):
        raise ValueError(f"{name}: no such folder or file, and not a name on the hub such as Qwen/Qwen3-0.6B")
    hub = need("huggingface_hub", f"loading {name} from the hub")
    try:
        return Path(hub.snapshot_download(str(name), allow_patterns=list(_DOWNLOADED)))
    except Exception as error:  # of the network, of many packages
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise ValueError(f"{name}: no such folder, and it could not be downloaded: {reason}") from None


def is_hub_name(name: str) -> bool:
    """Whether a text can be the name of a repository on the hub."""
    return _HUB_NAME.fullmatch(name) is not None


def described(path: Path) -> Description:
    """The description of a model's folder or .gguf file; headers of tensors alone are read."""
    return describe(path) if path.is_dir() else GGUFModel(open_tensors(path), str(path)).description


def config_of(name: str | os.PathLike) -> ModelConfig:
    """The configuration of a published model without its parameters. ValueError as of `load_pretrained`."""
    description = described(resolve(name))
    return read_config(family_of(description.model_type), description)


def describe_folder(source: Path, target: Path) -> None:
    """Write a model's config.json and tokenizer files into a folder: those that `save_pretrained` copies.

    source: a folder, whose files are copied, or a .gguf file, of whose metadata they are made.
    """
    values = described(source).values
    (target / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    if source.is_dir():
        for companion in COMPANIONS:
            if (source / companion).is_file():
                shutil.copyfile(source / companion, target / companion)
    else:
        write_tokenizer(target, load_tokenizer(source))


def _has_tokenizer(path: Path) -> bool:
    return path.is_file() or any((path / name).exists() for name in ("tokenizer.json", "tokenizer.model"))


def describe(folder: Path, length: int | None = None) -> Description:
    """The description in a folder's config.json; length: as in `load_pretrained`."""
    file = folder / "config.json"
    try:
        if file.stat().st_size > _MOST_JSON:
            raise ValueError(f"{file}: more than {_MOST_JSON} bytes are no description")
        values = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file: the folder of a model has one") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON: {error}") from None
    return Description(values, str(file), length=length)


def read_config(family: Family, description: Description) -> ModelConfig:
    """The configuration that a description stands for; ValueError for a key that is not implemented."""
    try:
        config = family.config(description)
    except ValueError as error:
        prefix = f"{description.where}: "
        text = str(error)
        raise ValueError(text if text.startswith(description.where) else prefix + text) from None
    description.finish()
    return config


def _difference(expected: ModelConfig, config: ModelConfig) -> str:
    fields = (f.name for f in dataclasses.fields(ModelConfig))
    return next(name for name in fields if getattr(expected, name) != getattr(config, name)) + " differs"


def _spread(mesh: jax.sharding.Mesh, shape: tuple[int, ...]) -> jax.sharding.NamedSharding:
    """The sharding of a parameter along its longest axis that the devices divide; replicated if there is
    none."""
    divided = [axis for axis, size in enumerate(shape) if size and size % mesh.size == 0]
    parts: list[Any] = [None] * len(shape)
    if divided:
        parts[max(divided, key=lambda axis: shape[axis])] = mesh.axis_names
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*parts))
