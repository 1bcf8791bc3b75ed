"""Decoding states in files: one safetensors file each, whose metadata describes the state in JSON.

The metadata has two strings. `attention_jax` is the description: format number, fingerprint of the model,
the classes and static fields of the state, dtype and shape of every tensor, and the SHA-256 of all tensors'
bytes. `sha256` is the SHA-256 of the description. Loading constructs registered classes (`storable`) only; it
neither unpickles nor evaluates anything that a file contains.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from attention_jax.caches.base import STORABLE, stored_name
from attention_jax.disk import allow_as_usual, sync_to_disk

FORMAT = 1
_DESCRIPTION, _DIGEST = "attention_jax", "sha256"
_MOST_HEADER = 2**26
# The dtypes of tensors in a file. Other dtypes are stored as unsigned integers of their width.
_NUMPY = ("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
_NUMPY += ("float16", "float32", "float64")
_BYTES = {"BOOL": 1, "I8": 1, "U8": 1, "I16": 2, "U16": 2, "F16": 2, "I32": 4, "U32": 4, "F32": 4}
_BYTES |= {"I64": 8, "U64": 8, "F64": 8}


def save(path: str | os.PathLike, state: Any, *, model: str) -> None:
    """Write a state to one file, which either holds all of it or is not changed.

    Args:
      state: a pytree of arrays in lists, tuples, dicts with string keys and classes registered by `storable`:
        the state of a layer, the list of all layers, or a state of decoding.
      model: the fingerprint of the model that made the state, from `attention_jax.model.fingerprint`.

    Raises: ValueError for a state that cannot be described, OSError where the file cannot be written.
    """
    _check_model("save", model)
    arrays: list[tuple[str, np.ndarray, str]] = []
    tree = _describe(state, "", arrays)
    digest = hashlib.sha256()
    for _, x, _ in arrays:
        digest.update(_bytes(x))
    tensors = [{"name": name, "dtype": dtype, "shape": list(x.shape)} for name, x, dtype in arrays]
    description = json.dumps(
        {"format": FORMAT, "model": model, "tree": tree, "tensors": tensors, "sha256": digest.hexdigest()},
        allow_nan=False,
    )
    metadata = {_DESCRIPTION: description, _DIGEST: hashlib.sha256(description.encode()).hexdigest()}
    _write(Path(path), {name: x for name, x, _ in arrays}, metadata)


def load(path: str | os.PathLike, *, model: str) -> Any:
    """The state in a file that `save` wrote, with the same bits.

    model: the fingerprint of the model that continues with it. Raises: ValueError for a file of another model
    or format, for one that is damaged, and for one with classes that this program does not have; OSError
    where it cannot be read.
    """
    _check_model("load", model)
    path = Path(path)
    found, description = _header(path)
    if description.get("format") != FORMAT:
        found = description.get("format")
        raise ValueError(f"{path}: state of format {found!r:.20}, expected {FORMAT}: prefill again")
    if description["model"] != model:
        raise ValueError(
            f"{path}: state of model {_short(description['model'])}, not of {model}: prefill again or load "
            "that model"
        )
    try:
        arrays = _tensors(path, found, description)
        return _build(path, description["tree"], [_on_device(path, x) for x in arrays])
    except (LookupError, TypeError, AttributeError, RecursionError):
        raise _damaged(path, "the description is not one that caches.save writes") from None


def _check_model(function: str, model: Any) -> None:
    if not isinstance(model, str) or not model:
        raise ValueError(f"{function}: model must be the fingerprint of the model, a string, got {model!r}")


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"{path}: damaged state: {' '.join(what.split())[:120]}: prefill again")


def _short(name: Any) -> str:
    """A name from a file on one line, cut if it is long."""
    return " ".join(str(name).split())[:80].strip()


def _describe(node: Any, path: str, arrays: list) -> Any:
    """The JSON description of a pytree, whose arrays are appended to `arrays` as (name, array, dtype)."""
    if node is None:
        return None
    if isinstance(node, jax.Array | np.ndarray) and not isinstance(node, jax.core.Tracer):
        if jnp.issubdtype(node.dtype, jax.dtypes.prng_key):
            return {
                "key": str(jax.random.key_impl(node)),
                "data": _describe(jax.random.key_data(node), path, arrays),
            }
        x, dtype = np.ascontiguousarray(node).reshape(node.shape), node.dtype.name
        if dtype not in _NUMPY:
            if x.dtype.kind != "V":
                raise ValueError(f"save: {path or 'the state'} has dtype {dtype}, which a file cannot hold")
            x = x.view(f"uint{8 * x.dtype.itemsize}")
        arrays.append((f"{len(arrays)} {path}", x, dtype))
        return len(arrays) - 1
    cls = type(node)
    if cls in (list, tuple):
        return {cls.__name__: [_describe(x, f"{path}/{i}", arrays) for i, x in enumerate(node)]}
    if cls is dict and all(isinstance(key, str) for key in node):
        return {"dict": {key: _describe(x, f"{path}/{key}", arrays) for key, x in node.items()}}
    name = stored_name(cls)
    if STORABLE.get(name) is not cls:
        where = path or "the state"
        raise ValueError(f"save: {where} is a {name}, which no file can hold: see caches.storable")
    data, static = _fields(cls)
    return {
        "class": name,
        "fields": {field: _describe(getattr(node, field), f"{path}/{field}", arrays) for field in data},
        "static": {field: _static(getattr(node, field), f"{path}/{field}") for field in static},
    }


def _fields(cls: type) -> tuple[list[str], list[str]]:
    """The names of the fields with arrays and of the static ones of a dataclass or NamedTuple."""
    if not dataclasses.is_dataclass(cls):
        return list(cls._fields), []
    fields = {field.name: bool(field.metadata.get("static")) for field in dataclasses.fields(cls)}
    data, static = ([name for name in fields if fields[name] == wanted] for wanted in (False, True))
    return data, static


def _static(value: Any, path: str) -> Any:
    """A static field in JSON."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple):
        return {"tuple": [_static(x, path) for x in value]}
    if isinstance(value, np.dtype) or (isinstance(value, type) and issubclass(value, np.generic)):
        return {"dtype": jnp.dtype(value).name}
    raise ValueError(f"save: the static field {path} is a {type(value).__name__}, which no file can hold")


def _write(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Write beside `path` and rename; an error leaves `path` as it was and no other file."""
    if path.exists() and not path.is_file():  # a rename would replace a device by a file
        raise ValueError(f"{path}: is a folder or a device, not a file: choose another name")
    path = path.resolve()  # a link goes on to lead to the file
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name[:100]}.", suffix=".tmp", dir=path.parent)
    try:
        os.close(descriptor)
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:
            raise OSError(f"{path}: {' '.join(str(error).split())}") from None
        allow_as_usual(temporary)
        sync_to_disk(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync_to_disk(path.parent)


def _header(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors of a file by name, with dtype and shape, and the description, both checked.

    The sizes that the header claims are compared with that of the file, before anything of them is allocated.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MOST_HEADER):
            raise _damaged(path, f"{size} bytes do not hold a header of {length}")
        text = file.read(length)
    try:
        header = _json(path, text)
        metadata = header.pop("__metadata__")
        description = metadata[_DESCRIPTION]
        if hashlib.sha256(description.encode()).hexdigest() != metadata[_DIGEST]:
            raise _damaged(path, "the description has another SHA-256 than when it was saved")
        claimed = sum(_BYTES[tensor["dtype"]] * math.prod(tensor["shape"]) for tensor in header.values())
        description = _json(path, description)
        description["model"], description["tensors"]
    except (LookupError, TypeError, AttributeError, UnicodeError, RecursionError):
        raise _damaged(path, "the header is not one that caches.save writes") from None
    if claimed != size - 8 - length:
        raise _damaged(path, f"its tensors need {claimed} bytes, and it has {size - 8 - length}")
    return header, description


def _json(path: Path, text: str | bytes) -> Any:
    """The value of a text; Python refuses integers of thousands of digits by a plain ValueError."""
    try:
        return json.loads(text)
    except ValueError:
        raise _damaged(path, "the header is not one that caches.save writes") from None


def _check_tensor(path: Path, tensor: dict[str, Any], found: dict[str, Any]) -> None:
    """ValueError unless the file has this tensor with the dtype and shape of the description."""
    name, dtype = tensor["name"], tensor["dtype"]
    if name not in found:
        raise _damaged(path, f"tensor {name!r} is missing")
    if found[name]["shape"] != tensor["shape"]:
        raise _damaged(path, f"tensor {name!r} has shape {found[name]['shape']}, not {tensor['shape']}")
    if _BYTES[found[name]["dtype"]] != jnp.dtype(dtype).itemsize:
        raise _damaged(path, f"tensor {name!r} has dtype {found[name]['dtype']}, not {dtype}")


def _tensors(path: Path, found: dict[str, Any], description: dict[str, Any]) -> list[np.ndarray]:
    """The arrays of a file in the order of its description, with their dtypes, shapes and bytes checked."""
    tensors = description["tensors"]
    for tensor in tensors:
        _check_tensor(path, tensor, found)
    digest, arrays = hashlib.sha256(), []
    try:
        with safe_open(path, framework="np") as file:
            for tensor in tensors:
                x = file.get_tensor(tensor["name"])
                digest.update(_bytes(x))
                arrays.append(x.view(jnp.dtype(tensor["dtype"])))
    except SafetensorError as error:
        raise _damaged(path, str(error)) from None
    if digest.hexdigest() != description["sha256"]:
        raise _damaged(path, "the tensors have another SHA-256 than when they were saved")
    return arrays


def _bytes(x: np.ndarray) -> memoryview:
    return np.ascontiguousarray(x).reshape(-1).view(np.uint8).data


def _on_device(path: Path, x: np.ndarray) -> jax.Array:
    if jnp.dtype(x.dtype) != jax.dtypes.canonicalize_dtype(x.dtype):
        raise ValueError(f"{path}: holds {x.dtype} numbers, which JAX would round: set jax_enable_x64")
    return jnp.array(x)


def _build(path: Path, node: Any, arrays: list[jax.Array | None]) -> Any:
    """The pytree of a description; the arrays that it takes become None."""
    if node is None:
        return None
    if isinstance(node, int):
        if isinstance(node, bool) or node < 0 or arrays[node] is None:
            raise LookupError("each array has one place, so that a small file cannot make a large state")
        x, arrays[node] = arrays[node], None
        return x
    if "key" in node:
        return jax.random.wrap_key_data(_build(path, node["data"], arrays), impl=node["key"])
    for name, cls in (("list", list), ("tuple", tuple)):
        if name in node:
            return cls(_build(path, x, arrays) for x in node[name])
    if "dict" in node:
        return {key: _build(path, x, arrays) for key, x in node["dict"].items()}
    cls = STORABLE.get(node["class"])
    if cls is None:
        name = _short(node["class"])
        raise ValueError(f"{path}: holds a {name}, an unknown class: import its module first")
    fields = {field: _build(path, x, arrays) for field, x in node["fields"].items()}
    static = {field: _built_static(value) for field, value in node["static"].items()}
    data, fixed = _fields(cls)
    if set(data) != set(fields) or set(fixed) != set(static):
        names = sorted(set(data + fixed) ^ (fields.keys() | static.keys()))
        raise ValueError(
            f"{path}: holds a {node['class']} of another version, which differs in {', '.join(names)}: "
            "prefill again"
        )
    return cls(**fields, **static)


def _built_static(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return tuple(map(_built_static, value["tuple"])) if "tuple" in value else jnp.dtype(value["dtype"])
