"""Published models behind the commands that take a run: where a name leads, and what they need."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attention_jax import tokenizers
from attention_jax.model import ModelConfig
from attention_jax.pretrained import load_pretrained
from attention_jax.pretrained.models import described, is_hub_name, resolve
from train.run.files import exists
from train.run.restore import Requests, TrainedRun, load_run

_HUB = "hf:"


@dataclasses.dataclass(frozen=True)
class PublishedModel:
    """A model of a Hugging Face folder or a GGUF file; what `TrainedRun` says of a run."""

    model: ModelConfig
    params: dict[str, Any]
    tokenizer: tokenizers.PublishedTokenizer
    title: str
    trained_lengths: dict[str, int | None]

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end a text or an answer."""
        return self.tokenizer.stop_ids

    def requests(self, texts: Sequence[str]) -> Requests:
        """Inputs of `generate` that continue the texts, with the tokens that the model expects there."""
        prompts = [self.tokenizer.encode(text, add_special_tokens=True) for text in texts]
        if not all(map(len, prompts)):
            raise ValueError("the prompt is empty, and this model has no token that starts a text: give one")
        return Requests(prompts, None, list(texts))


def load_source(
    name: str | Path, *, step: int | str = "latest", dtype: str | None = None
) -> TrainedRun | PublishedModel:
    """The run in a folder, or the published model of a folder, a .gguf file or, as hf:OWNER/NAME, of the hub.

    step: of a run, as in `load_run`. dtype: in which a published model's parameters are stored, None for
    that of its files. ValueError, in one line, for what cannot be loaded, and for the other's option.
    """
    if not is_published(name):
        if is_hub_name(str(name)) and not exists(Path(name)):
            raise ValueError(f"{name} does not exist; a model of the hub is written hf:{name}")
        if dtype is not None:
            raise ValueError(f"--dtype {dtype} is of published models: the parameters of a run are float32")
        return load_run(name, step=step)
    if step != "latest":
        raise ValueError(f"--step {step} is of a run: {name} is a published model")
    path = source_path(name)
    config, params, tokenizer = load_pretrained(path, dtype=dtype)
    if not isinstance(tokenizer, tokenizers.PublishedTokenizer):
        raise ValueError(f"{path}: it holds no tokenizer of a published model, which text needs")
    length = described(path).values.get("max_position_embeddings")
    stored = dtype or next(iter(dtypes(params)))
    title = f"{name}: {stored} parameters"
    return PublishedModel(config, params, tokenizer, title, {"prompt": length})


def is_published(name: str | Path) -> bool:
    """Whether a name is of a published model, not of a run: nothing is downloaded without hf: in front."""
    path = Path(name)
    try:
        return str(name).startswith(_HUB) or (
            exists(path)
            and (path.is_file() or (exists(path / "config.json") and not exists(path / "config.yaml")))
        )
    except OSError as error:
        raise ValueError(f"{error.filename} cannot be read: {error.strerror}") from None


def source_path(name: str | Path) -> Path:
    """The local path of a published model, after its download for a name behind hf:."""
    return resolve(str(name).removeprefix(_HUB))


def dtypes(params: Any) -> list[str]:
    """The dtypes of parameters, by name."""
    import jax

    return sorted({x.dtype.name for x in jax.tree.leaves(params)})
