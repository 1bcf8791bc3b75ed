"""Tables between our parameters and the tensors of published checkpoints.

An `Entry` says which tensors hold which parameters, and how to convert both ways. In names of tensors {i}
stands for the layer and {e} for an expert; paths of ours are those below the top or, with {i} in the names,
of a layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from attention_jax.model import BlockConfig, ModelConfig

Arrays = Sequence[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Place:
    """What a conversion may depend on: the model, and the layer with its index (None outside of layers)."""

    config: ModelConfig
    block: BlockConfig | None = None
    layer: int | None = None


def _unchanged(arrays: Arrays, place: Place) -> Arrays:
    return arrays


@dataclasses.dataclass(frozen=True)
class Entry:
    """Tensors `theirs` that hold the parameters `ours`.

    load: from their arrays to ours. save: its exact inverse. A name with {e} stands for one tensor per
    expert, all of which are given in order. when: only for layers of which this is true.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    load: Callable[[Arrays, Place], Arrays] = _unchanged
    save: Callable[[Arrays, Place], Arrays] = _unchanged
    when: Callable[[BlockConfig], bool] | None = None

    @property
    def of_layers(self) -> bool:
        """Whether it stands for every layer."""
        return any("{i}" in name for name in self.theirs)


def same(ours: str, theirs: str, **options: Any) -> Entry:
    """A parameter that is stored as it is."""
    return Entry((ours,), (theirs,), **options)


def transposed(ours: str, theirs: str, **options: Any) -> Entry:
    """A kernel [in, out] that is stored as [out, in]."""
    return Entry((ours,), (theirs,), _transpose, _transpose, **options)


def linear(ours: str, theirs: str, **options: Any) -> list[Entry]:
    """The kernel and the bias, if it has one, of a projection."""
    return [
        transposed(f"{ours}/kernel", f"{theirs}.weight", **options),
        same(f"{ours}/bias", f"{theirs}.bias", **options),
    ]


def conv1d(ours: str, theirs: str, **options: Any) -> list[Entry]:
    """The kernel and the bias of a projection that is stored as [in, out], as in GPT-2."""
    return [
        same(f"{ours}/kernel", f"{theirs}.weight", **options),
        same(f"{ours}/bias", f"{theirs}.bias", **options),
    ]


def norm(ours: str, theirs: str, **options: Any) -> list[Entry]:
    """The scale and the bias, if it has one, of a norm."""
    return [
        same(f"{ours}/scale", f"{theirs}.weight", **options),
        same(f"{ours}/bias", f"{theirs}.bias", **options),
    ]


def convolution(ours: str, theirs: str, **options: Any) -> list[Entry]:
    """The depthwise kernel [W, C], stored as [C, 1, W], and the bias of a short convolution."""

    def load(arrays: Arrays, place: Place) -> Arrays:
        return [x[:, 0].T for x in arrays]

    def save(arrays: Arrays, place: Place) -> Arrays:
        return [x.T[:, None] for x in arrays]

    return [
        Entry((f"{ours}/kernel",), (f"{theirs}.weight",), load, save, **options),
        same(f"{ours}/bias", f"{theirs}.bias", **options),
    ]


def joined(
    ours: Sequence[str],
    theirs: str,
    widths: Callable[[Place], Sequence[int]],
    *,
    axis: int = 0,
    **options: Any,
) -> list[Entry]:
    """Projections that are stored one after another in one: kernels [out, in] along `axis`, and their biases.

    widths: the outputs of each. axis: 0 for kernels [out, in], 1 for kernels [in, out], as GPT-2 has.
    """

    def split(arrays: Arrays, place: Place) -> Arrays:
        (whole,) = arrays
        along = axis if whole.ndim == 2 else 0
        sizes = list(widths(place))
        if whole.shape[along] != sum(sizes):
            raise ValueError(f"its shape is {whole.shape}, not {sum(sizes)} along axis {along}")
        parts = np.split(whole, np.cumsum(sizes)[:-1], axis=along)
        return [part.T if part.ndim == 2 and axis == 0 else part for part in parts]

    def join(arrays: Arrays, place: Place) -> Arrays:
        del place
        along = axis if arrays[0].ndim == 2 else 0
        return [np.concatenate([x.T if x.ndim == 2 and axis == 0 else x for x in arrays], axis=along)]

    return [
        Entry(tuple(f"{name}/{leaf}" for name in ours), (f"{theirs}.{suffix}",), split, join, **options)
        for leaf, suffix in (("kernel", "weight"), ("bias", "bias"))
    ]


def reshaped(ours: str, theirs: str, shape: Callable[[Place], tuple[int, ...]], **options: Any) -> Entry:
    """A parameter of this shape that is stored flat."""

    def load(arrays: Arrays, place: Place) -> Arrays:
        return [x.reshape(shape(place)) for x in arrays]

    def save(arrays: Arrays, place: Place) -> Arrays:
        return [x.reshape(-1) for x in arrays]

    return Entry((ours,), (theirs,), load, save, **options)


def joined_by_head(
    ours: Sequence[str], theirs: str, widths: Callable[[Place], tuple[int, Sequence[int]]], **options: Any
) -> list[Entry]:
    """Projections whose outputs are stored head by head in one: for each head, its outputs of each in turn.

    widths: the number of heads, and the outputs per head of each projection.
    """

    def split(arrays: Arrays, place: Place) -> Arrays:
        (whole,) = arrays
        heads, sizes = widths(place)
        if whole.shape[0] != heads * sum(sizes):
            raise ValueError(f"its shape is {list(whole.shape)}, not {heads * sum(sizes)} along axis 0")
        rest = whole.shape[1:]
        parts = np.split(whole.reshape(heads, sum(sizes), *rest), np.cumsum(sizes)[:-1], axis=1)
        return [part.reshape(-1, *rest).T for part in parts]  # a bias is its own transpose

    def join(arrays: Arrays, place: Place) -> Arrays:
        heads, sizes = widths(place)
        rest = arrays[0].T.shape[1:]
        parts = [x.T.reshape(heads, size, *rest) for x, size in zip(arrays, sizes, strict=True)]
        return [np.concatenate(parts, axis=1).reshape(-1, *rest)]

    return [
        Entry(tuple(f"{name}/{leaf}" for name in ours), (f"{theirs}.{suffix}",), split, join, **options)
        for leaf, suffix in (("kernel", "weight"), ("bias", "bias"))
    ]


def joined_by_group(theirs: str, **options: Any) -> list[Entry]:
    """The mixer's q, k and v in one projection, for each key-value head its queries, its key and its value.

    Its rows are [K, N / K + 2, H], as in GPT-NeoX and BLOOM, where K = N, and in Falcon.
    """

    def widths(place: Place) -> tuple[int, Sequence[int]]:
        mixer = place.block.mixer
        K, H = mixer.kv_heads, mixer.head_width(place.config.d_model)
        return K, (mixer.num_heads // K * H, H, H)

    return joined_by_head(("mixer/q", "mixer/k", "mixer/v"), theirs, widths, **options)


def stacked(ours: str, theirs: str, *, transpose: bool = True, **options: Any) -> Entry:
    """The parameter [E, ...] of all experts, stored as one tensor per expert, kernels as [out, in]."""

    def stack(arrays: Arrays, place: Place) -> Arrays:
        return [np.stack([x.T if transpose and x.ndim == 2 else x for x in arrays])]

    def unstack(arrays: Arrays, place: Place) -> Arrays:
        return [x.T if transpose and x.ndim == 2 else x for x in arrays[0]]

    return Entry((ours,), (theirs,), stack, unstack, **options)


def _transpose(arrays: Arrays, place: Place) -> Arrays:
    return [x.T for x in arrays]


@dataclasses.dataclass(frozen=True)
class Item:
    """An entry at one place: the tensors' names, and where the parameters lie: (leaf's path, row or None)."""

    entry: Entry
    place: Place
    names: tuple[str, ...]
    targets: tuple[tuple[str, int | None], ...]


def plan(config: ModelConfig, table: Sequence[Entry], leaves: dict[str, Any]) -> list[Item]:
    """The items that give every parameter once, ordered by entry. leaves: paths to shapes of all parameters.

    Raises: ValueError for a parameter that no entry gives.
    """
    period, items, given = config.period, [], set()
    for entry in table:
        for layer in range(config.num_layers) if entry.of_layers else (None,):
            block = None if layer is None else period[layer % len(period)]
            if block is not None and entry.when is not None and not entry.when(block):
                continue
            targets = tuple(_target(path, layer, len(period)) for path in entry.ours)
            if not all(path in leaves for path, _ in targets) or given >= set(targets):
                continue
            given.update(targets)
            place = Place(config, block, layer)
            items.append(Item(entry, place, tuple(_names(entry, place)), targets))
    for path, leaf in leaves.items():
        rows = range(leaf.shape[0]) if path.startswith("stacks/") else (None,)
        if missing := [row for row in rows if (path, row) not in given]:
            raise ValueError(f"no tensor of the family's table holds the parameter {path} (row {missing[0]})")
    return items


def _target(path: str, layer: int | None, period: int) -> tuple[str, int | None]:
    if layer is None:
        return path, None
    return f"stacks/{layer % period}/{path}", layer // period


def _names(entry: Entry, place: Place) -> list[str]:
    names = []
    for name in entry.theirs:
        name = name.replace("{i}", str(place.layer))
        if "{e}" in name:
            names += [name.replace("{e}", str(e)) for e in range(place.block.feed_forward.num_experts)]
        else:
            names.append(name)
    return names
