"""Files of published tensors: Hugging Face folders read and written, GGUF read, tensors placed on devices."""

from __future__ import annotations

import os
from pathlib import Path

from attention_jax.pretrained.files.gguf_file import GGUFTensors, open_gguf
from attention_jax.pretrained.files.hugging_face import (
    SafetensorsTensors,
    open_folder,
    open_safetensors,
    read_folder_json,
)
from attention_jax.pretrained.files.placing import place, place_parts
from attention_jax.pretrained.files.reading import Tensors
from attention_jax.pretrained.files.writing import Spec, new_folder, write_safetensors

__all__ = [
    "GGUFTensors",
    "SafetensorsTensors",
    "Spec",
    "Tensors",
    "new_folder",
    "open_folder",
    "open_gguf",
    "open_safetensors",
    "open_tensors",
    "place",
    "place_parts",
    "read_folder_json",
    "write_safetensors",
]


def open_tensors(path: str | os.PathLike) -> Tensors:
    """The tensors of a Hugging Face folder, of a .gguf file or of a .safetensors file.

    Raises: ValueError for every other path, and as `open_folder` and `open_gguf` do.
    """
    path = Path(path)
    if path.is_dir():
        return open_folder(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    for suffix, open_file in ((".gguf", open_gguf), (".safetensors", open_safetensors)):
        if path.suffix == suffix:
            return open_file(path)
    raise ValueError(f"{path}: neither a folder nor a .safetensors or .gguf file; pickles are not read")
