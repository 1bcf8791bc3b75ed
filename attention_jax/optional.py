"""Packages that only some functions need, and the extra of this package that brings each."""

from __future__ import annotations

import importlib
from typing import Any

_EXTRAS = {
    "train": "optax orbax grain pydantic ruamel tyro tensorboardX rich matplotlib",
    "pretrained": "tokenizers gguf jinja2 tiktoken sentencepiece huggingface_hub",
    "parity": "torch transformers fla",
}


def install_line(package: str) -> str:
    """The pip command that installs a package that is missing."""
    for extra, packages in _EXTRAS.items():
        if package in packages.split():
            return f'pip install "attention_jax[{extra}]"'
    return f"pip install {package}"


def need(module: str, what: str) -> Any:
    """The module; ModuleNotFoundError of one line says what needs it, and how it is installed."""
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:
            raise
        message = f"{what} needs the package {package}, which is not installed: {install_line(package)}"
        raise ModuleNotFoundError(message, name=package) from None
