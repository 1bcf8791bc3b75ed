"""The layout of a model's weights for decoding, made once before the loop over tokens.

A token reads every weight once, so that whatever is done to a weight inside the loop costs as much as the product
itself. `prepare_model` therefore gives every layer its own weights, projections of the same input one kernel, and
kernels the order [out, in], in which a matrix-vector product reads memory from front to back. XLA's CPU backend
multiplies bfloat16 ten times slower than float32: there, kernels are rounded to bfloat16 and stored as float32,
which gives the same numbers.

Which projections read the same input is observed: a step of the layer is traced without computing anything, and
the calls of `fused_linear` are recorded. No mechanism is known here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax.dtypes import accumulator
from attention_jax.layers import PreparedLinear, prepare_linears, recorded_calls
from attention_jax.mixers import Context
from attention_jax.model.block import Block
from attention_jax.model.config import ModelConfig
from attention_jax.model.stack import Layers, unstack

Path = tuple[str | int, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prepared:
    """The weights of a model in their layout for decoding, in place of `params`; see `prepare_for_decoding`.

    weights: nested dicts of arrays. config: the configuration that they were prepared for.
    """

    weights: dict
    config: ModelConfig = dataclasses.field(metadata={"static": True})

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.weights))


def prepare_model(model: nnx.Module) -> nnx.Module:
    """The language model with its layers and its output projection laid out for decoding.

    The encoder, which runs once per source, stays as it is.
    """
    config: ModelConfig = model.config
    dtype = jnp.dtype(config.dtype)
    storage_dtype = _storage_dtype(dtype)
    blocks = unstack(model.stacks, config.num_layers)
    for block in blocks:
        _prepare_block(block, config)
    model.stacks = Layers(blocks)
    if config.tie_embeddings and dtype == storage_dtype == jnp.float32:
        kernel_VD = model.embed.embedding  # one array for both
    else:
        kernel = model.embed.embedding[...] if config.tie_embeddings else model.head.kernel[...].T
        kernel_VD = nnx.Param(kernel.astype(dtype).astype(storage_dtype))
    bias_V = nnx.Param(model.head.bias[...]) if config.head_bias else None
    model.head = PreparedLinear(kernel_VD, bias_V, dtype=dtype)
    return model


def _storage_dtype(dtype: Any) -> Any:
    """The dtype in which kernels of a layer are stored on the default backend."""
    return accumulator(dtype) if jax.default_backend() == "cpu" else jnp.dtype(dtype)


def _prepare_block(block: Block, config: ModelConfig) -> None:
    """Replace the linear layers of a block in place, and the stacks of its experts."""
    linears = {
        path: f for path, f in nnx.iter_graph(block) if isinstance(f, nnx.Linear) and f.dtype is not None
    }
    for paths in (*_common_inputs(block, config), *((path,) for path in linears)):
        if linears.keys() >= set(paths):  # a layer belongs to the first call that it appears in
            members = [linears.pop(path) for path in paths]
            prepared = prepare_linears(members, storage_dtype=_storage_dtype(members[0].dtype))
            for path, member in zip(paths, prepared, strict=True):
                _replace(block, path, member)
    if block.mlp is not None:
        block.mlp.prepare(_storage_dtype(block.mlp.dtype))


def _common_inputs(block: Block, config: ModelConfig) -> Iterable[tuple[Path, ...]]:
    """The paths of the linear layers of each `fused_linear` in a step of one token."""
    graphdef, weights = nnx.split(block)
    mixer, found, state = block.config.mixer, [], None
    if mixer is not None and not mixer.mixes_whole_row:
        state = block.mixer.init_state(1, capacity=1)
    x_BTD = jnp.zeros((1, 1, config.d_model), config.dtype)
    memory_BSD = jnp.zeros_like(x_BTD) if mixer is not None and mixer.reads_memory else None

    def step(weights):
        block = nnx.merge(graphdef, weights)
        paths = {id(node): path for path, node in nnx.iter_graph(block)}
        with recorded_calls() as calls:
            block.mix(x_BTD, state, ctx=Context(jnp.zeros((1, 1), jnp.int32), memory_BSD=memory_BSD))
        found.extend(tuple(paths[id(f)] for f in linears) for linears in calls)

    jax.eval_shape(step, weights)
    return found


def _replace(root: nnx.Module, path: Path, node: nnx.Module) -> None:
    """Set the node at a path below `root`."""
    *parents, last = path
    for name in parents:
        root = root[name] if isinstance(name, int) else getattr(root, name)
    if isinstance(last, int):
        root[last] = node
    else:
        setattr(root, last, node)
