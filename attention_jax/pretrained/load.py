"""Parameters from the tensors of a checkpoint and back, one tensor at a time."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.model import ModelConfig, init_params
from attention_jax.pretrained.family import Family
from attention_jax.pretrained.files import Tensors
from attention_jax.pretrained.table import Item, plan

Put = Callable[[str, np.ndarray], jax.Array]
_ALIGNMENT = 64  # bytes, with which JAX takes a NumPy array on the CPU without a copy


def load_params(
    family: Family, config: ModelConfig, tensors: Tensors, *, dtype: Any = None, put: Put | None = None
) -> dict:
    """The parameters of a model, a nested dict as `init_params` returns.

    Memory holds the model and one tensor, or, with `put`, the parameters that an entry of the table fills.

    Args:
      dtype: of all floating parameters; None: that of the tensor in the file.
      put: from a parameter's path and its array in host memory to the array on devices; `jax.device_put`
        unless given.

    Raises: ValueError for a missing, unknown or misshapen tensor, by name.
    """
    leaves, tensors = leaf_shapes(config), _renamed(family, tensors)
    items = plan(config, family.table, leaves)
    _check_names(family, config, tensors, items)
    put = put or (lambda path, array: jax.device_put(array))
    arrays: dict[str, Any] = {}
    missing = {path: leaf.shape[0] if path.startswith("stacks/") else 1 for path, leaf in leaves.items()}
    for item in items:
        for (path, row), x in zip(item.targets, _loaded(item, tensors), strict=True):
            shape = leaves[path].shape
            wanted = shape if row is None else shape[1:]
            if x.shape != wanted:
                raise ValueError(
                    f"tensor {item.names[0]} gives {path} the shape {list(x.shape)}, the configuration has "
                    f"{list(wanted)}"
                )
            if path not in arrays:
                arrays[path] = _aligned(shape, _stored_dtype(x.dtype, dtype))
            arrays[path][... if row is None else row] = x
            missing[path] -= 1
            if not missing[path]:
                arrays[path] = put(path, arrays[path])
    return _nested(arrays)


def saved_specs(family: Family, config: ModelConfig, params: Mapping[str, Any]) -> dict[str, Any]:
    """The shapes and dtypes of the tensors that `saved_tensors` gives, by name."""
    flat = flatten(params)
    dummies = {path: np.broadcast_to(np.zeros((), x.dtype), x.shape) for path, x in flat.items()}
    return {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype)
        for name, x in _saved(family, config, dummies.__getitem__, flat)
    }


def saved_tensors(
    family: Family, config: ModelConfig, params: Mapping[str, Any]
) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of all tensors of a checkpoint of the family, one at a time."""
    flat = flatten(params)

    @functools.lru_cache(maxsize=4)  # an entry reads its stacks layer by layer
    def on_host(path: str) -> np.ndarray:
        return np.asarray(flat[path])

    yield from _saved(family, config, on_host, flat)


def _saved(family, config, read, flat) -> Iterator[tuple[str, np.ndarray]]:
    for item in plan(config, family.table, leaf_shapes(config)):
        arrays = [read(path) if row is None else read(path)[row] for path, row in item.targets]
        for name, x in zip(item.names, item.entry.save(arrays, item.place), strict=True):
            yield name, np.ascontiguousarray(x)


def _loaded(item: Item, tensors: Tensors) -> list[np.ndarray]:
    arrays = [tensors.read(name) for name in item.names]
    try:
        return list(item.entry.load(arrays, item.place))
    except ValueError as error:
        raise ValueError(f"tensor {item.names[0]}: {error}") from None


class _Renamed:
    """Tensors under other names. older: the names in the files, by those to use."""

    def __init__(self, tensors: Tensors, older: Mapping[str, str]):
        self._tensors, self._older, self.metadata = tensors, dict(older), tensors.metadata

    def names(self) -> list[str]:
        return list(self._older)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors.shape(self._older[name])

    def dtype(self, name: str) -> np.dtype:
        return self._tensors.dtype(self._older[name])

    def read(self, name: str) -> np.ndarray:
        return self._tensors.read(self._older[name])

    def read_slice(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        return self._tensors.read_slice(self._older[name], index)


def _renamed(family: Family, tensors: Tensors) -> Tensors:
    """The tensors under the names of the family's table, as its view shows them."""
    if family.view is not None:
        tensors = family.view(tensors)
    if not family.older_names:
        return tensors
    older: dict[str, str] = {}
    for old in tensors.names():
        new = old
        for pattern, replacement in family.older_names:
            if match := re.fullmatch(pattern, old):
                new = match.expand(replacement)
                break
        if new in older:
            raise ValueError(f"tensor {new} is there twice, also as {old if old != new else older[new]}")
        older[new] = old
    return _Renamed(tensors, older)


def _check_names(family: Family, config: ModelConfig, tensors: Tensors, items: list[Item]) -> None:
    """Raise ValueError for a tensor that is needed and missing, or there and not needed."""
    there, needed = set(tensors.names()), {name for item in items for name in item.names}
    if absent := sorted(needed - there):
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise ValueError(f"tensor {absent[0]}{more} is missing: the configuration needs it")
    unused = [re.compile(pattern) for pattern in family.unused]
    extra = sorted(name for name in there - needed if not any(p.fullmatch(name) for p in unused))
    if config.tie_embeddings and family.head in extra:
        embedding = next(item.names[0] for item in items if item.targets[0][0] == "embed/embedding")
        if not np.array_equal(tensors.read(family.head), tensors.read(embedding)):
            raise ValueError(
                f"tensor {family.head} differs from {embedding}, to which the configuration ties it"
            )
        extra.remove(family.head)
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise ValueError(f"tensor {extra[0]}{more} is not known in a checkpoint of {family.title}")


def _stored_dtype(stored: np.dtype, wanted: Any) -> np.dtype:
    return np.dtype(stored if wanted is None else jnp.dtype(wanted))


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array that begins at a multiple of 64 bytes, uninitialised."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def leaf_shapes(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """The paths of all parameters, such as stacks/0/mixer/q/kernel, and their shapes."""
    return flatten(jax.eval_shape(lambda: init_params(config, jax.random.key(0))))


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts as one, with paths as keys."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _nested(arrays: dict[str, Any]) -> dict:
    tree: dict[str, Any] = {}
    for path, x in arrays.items():
        *parents, last = path.split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = x
    return tree
