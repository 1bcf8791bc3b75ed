"""The fingerprint of a model, which says whether a saved state belongs to it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.model.config import ModelConfig
from attention_jax.model.prepared import Prepared


def fingerprint(config: ModelConfig, params: dict) -> str:
    """The SHA-256, in hexadecimal, of a model's configuration and parameters.

    Of every parameter its path, dtype, shape and bytes count, and of the configuration every field. A function
    in the configuration, such as that of `masks.Predicate`, counts by its name: two functions of one module with
    one name are the same to it. Reads all parameters: keep the string where it is needed more than once.

    Raises: ValueError for what `prepare_for_decoding` returns, whose arrays are others.
    """
    if isinstance(params, Prepared):
        raise ValueError("fingerprint needs the parameters that prepare_for_decoding was given, got Prepared")
    digest = hashlib.sha256(json.dumps(_canonical(config), sort_keys=True).encode())
    leaves = jax.tree_util.tree_leaves_with_path(params)
    paths = [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]
    for path, leaf in sorted(paths, key=lambda pair: pair[0]):
        x = np.ascontiguousarray(leaf)
        digest.update(json.dumps([path, x.dtype.name, list(leaf.shape)]).encode())
        digest.update(x.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _canonical(value: Any) -> Any:
    """A value of a configuration in JSON, which is equal for equal values only."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return {"float": value.hex()}
    if isinstance(value, np.ndarray):
        digest = hashlib.sha256(np.ascontiguousarray(value).data).hexdigest()
        return {"array": [value.dtype.name, list(value.shape), digest]}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _canonical(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"class": type(value).__qualname__, "fields": fields}
    if isinstance(value, dict):
        return {"dict": [[_canonical(key), _canonical(x)] for key, x in value.items()]}
    if isinstance(value, tuple | list | frozenset | set):
        items = sorted(value) if isinstance(value, frozenset | set) else value
        return {"items": [_canonical(x) for x in items]}
    if isinstance(value, np.dtype) or (isinstance(value, type) and issubclass(value, np.generic)):
        return {"dtype": jnp.dtype(value).name}
    if callable(value):
        return {"function": f"{value.__module__}.{value.__qualname__}"}
    raise ValueError(f"fingerprint: the configuration holds a {type(value).__name__}, {value!r}")
