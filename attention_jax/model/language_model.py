"""The language model: one mixer per layer, in an architecture that is the same for all mixers.

    h_0 = scale E[tokens] (+ P[positions]);   layers (`block.py`);   logits = W norm(h_L)

With an encoder, bidirectional layers encode the source, and `cross` mixers attend to their output. `init_params`,
`apply` and `encode` are the functional interface, with parameters as nested dicts of arrays.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attention_jax.caches import DEFAULT_CACHE, CacheOptions
from attention_jax.dtypes import accumulator, check_dtype
from attention_jax.layers import PreparedLinear, linear, matmul
from attention_jax.mixers import Context
from attention_jax.model.block import dropout, make_norm, weight_init
from attention_jax.model.config import ModelConfig
from attention_jax.model.prepared import Prepared, prepare_model
from attention_jax.model.stack import init_states, make_stacks, run_stacks
from attention_jax.positions import sinusoidal


class ModelOutput(NamedTuple):
    """The output of a language model.

    logits: float32, or float64 of a model with that dtype, [B, T, V]. state: the states of all layers, in the form that `init_state` returns, or None if
    none was given. aux: the arrays named in `Context.capture`, one dict per layer.
    """

    logits: jax.Array
    state: Any = None
    aux: tuple[dict[str, Any], ...] = ()


class LanguageModel(nnx.Module):
    """A model from token ids to logits, with any list of mixers."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        check_dtype(config.dtype)
        if config.vocab_size is None:
            raise ValueError("vocab_size is not set: set ModelConfig.vocab_size to the number of token ids")
        self.config = config
        kernel_init = weight_init(config)
        table = {"embedding_init": kernel_init, "dtype": accumulator(config.dtype), "rngs": rngs}
        self.embed = nnx.Embed(config.vocab_size, config.d_model, **table)
        if config.max_positions is not None:
            self.positions = nnx.Embed(config.max_positions, config.d_model, **table)
        self.stacks = make_stacks(config, config.period, config.num_layers, causal=config.causal, rngs=rngs)
        self.final_norm = make_norm(config, rngs)
        if config.encoder is not None:
            self.encoder = Encoder(config, rngs=rngs)
        if not config.tie_embeddings:
            self.head = linear(
                config.d_model,
                config.vocab_size,
                use_bias=config.head_bias,
                kernel_init=kernel_init,
                rngs=rngs,
            )
        if config.embedding_norm:
            self.embed_norm = make_norm(config, rngs)

    def __call__(self, tokens_BT: jax.Array, *, ctx: Context | None = None) -> jax.Array:
        """The logits_BTV of whole rows."""
        if ctx is not None:
            ctx.refuse_capture("LanguageModel", "run")
        return self.run(tokens_BT, None, ctx=ctx).logits

    def run(
        self,
        tokens_BT: jax.Array,
        state: Any = None,
        *,
        ctx: Context | None = None,
        last_only: bool = False,
    ) -> ModelOutput:
        """The logits, the state with the tokens appended, and the arrays named in `ctx.capture`.

        last_only: return the logits of the last slot only, [B, 1, V].
        """
        ctx = ctx or Context()
        x_BTD = self._embed(tokens_BT, ctx)
        x_BTD, state, aux = run_stacks(self.config, self.stacks, self.config.num_layers, x_BTD, state, ctx)
        x_BTD = self.final_norm(x_BTD)
        return ModelOutput(self.logits(x_BTD[:, -1:] if last_only else x_BTD), state, aux)

    def encode(self, source_BS: jax.Array, *, ctx: Context | None = None) -> jax.Array:
        """The encoder output memory_BSD for source tokens; a position < 0 marks an invalid slot.

        Raises: ValueError if the model has no encoder.
        """
        if self.config.encoder is None:
            raise ValueError("the model has no encoder: set ModelConfig.encoder")
        ctx = (ctx or Context()).fold_key(self.config.num_layers + 1)
        return self.encoder.run(self._embed(source_BS, ctx), ctx)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """The output projection: logits_BTV of normalised features."""
        head = getattr(self, "head", None)
        if isinstance(head, PreparedLinear):
            logits_BTV = head.product(x_BTD)
        else:
            kernel_DV = self.embed.embedding[...].T if head is None else head.kernel[...]
            logits_BTV = matmul(
                x_BTD, kernel_DV.astype(x_BTD.dtype), preferred_element_type=accumulator(x_BTD)
            )
        if self.config.head_bias:
            logits_BTV = logits_BTV + jnp.broadcast_to(
                head.bias[...].astype(logits_BTV.dtype), logits_BTV.shape
            )
        if self.config.logit_scale is not None:
            logits_BTV = logits_BTV * self.config.logit_scale
        cap = self.config.logit_softcap
        return logits_BTV if cap is None else cap * jnp.tanh(logits_BTV / cap)

    def init_state(self, batch: int, capacity: int, *, cache: CacheOptions = DEFAULT_CACHE) -> Any:
        """`init_state(self.config, batch, capacity)`."""
        return init_state(self.config, batch, capacity, cache=cache)

    def _embed(self, tokens_BT: jax.Array, ctx: Context) -> jax.Array:
        shape, dtype = jnp.shape(tokens_BT), jnp.result_type(tokens_BT)
        if len(shape) != 2 or not jnp.issubdtype(dtype, jnp.integer):
            raise ValueError(f"tokens must be integers [B, T], got {dtype} {list(shape)}")
        if 0 in shape:
            raise ValueError(
                f"tokens must hold at least one row and one token, got {list(shape)}: skip the call"
            )
        tokens_BT = _narrowed(tokens_BT)
        for ids in (ctx.positions_BT, ctx.segment_ids_BT):
            if ids is not None:  # an invalid slot may hold any id, which must not index the table
                tokens_BT = jnp.where(ids >= 0, tokens_BT, 0)
        x_BTD = self.embed(_checked_ids(tokens_BT, self.config.vocab_size))
        scale = self.config.embedding_scale
        if scale is None and self.config.sinusoidal:
            scale = math.sqrt(self.config.d_model)
        x_BTD = x_BTD if scale is None else x_BTD * scale
        if self.config.embedding_norm:
            x_BTD = self.embed_norm(x_BTD)
        limit = self.config.max_positions
        if limit is not None:
            positions_BT = ctx.positions_BT
            if positions_BT is None:
                if tokens_BT.shape[1] > limit:
                    raise ValueError(f"{tokens_BT.shape[1]} tokens exceed the {limit} learned positions")
                positions_BT = jnp.arange(tokens_BT.shape[1])[None]
            # Past the table nnx.Embed gives NaN, which makes the error visible.
            x_BTD = x_BTD + self.positions(jnp.maximum(positions_BT, 0))
        if self.config.sinusoidal:
            positions_BT = (
                jnp.arange(tokens_BT.shape[1])[None] if ctx.positions_BT is None else ctx.positions_BT
            )
            x_BTD = x_BTD + sinusoidal(positions_BT, self.config.d_model, accumulator(self.config.dtype))
        rate = self.config.embedding_dropout
        rate = self.config.dropout if rate is None else rate
        x_BTD = dropout(x_BTD, rate, ctx.fold_key(self.config.num_layers).dropout_key)
        return x_BTD.astype(self.config.dtype)


def _narrowed(tokens_BT: Any) -> Any:
    """The ids; NumPy's 64-bit integers as int32, those out of its range at its ends, and not their low bits."""
    if isinstance(tokens_BT, jax.Array) or tokens_BT.dtype.itemsize <= 4:
        return tokens_BT
    ends, ids_BT = np.iinfo(np.int32), tokens_BT.astype(np.int32)
    ids_BT[tokens_BT > ends.max] = ends.max
    ids_BT[tokens_BT < ends.min] = ends.min
    return ids_BT


def _checked_ids(tokens_BT: jax.Array, vocab_size: int) -> jax.Array:
    """The ids; ValueError for one outside the vocabulary.

    Traced ids raise no error. Those past the table give NaN, and negative ones, which would count from its
    end, are moved there.
    """
    if isinstance(tokens_BT, jax.core.Tracer):
        if jnp.issubdtype(tokens_BT.dtype, jnp.unsignedinteger):
            return tokens_BT
        tokens_BT = tokens_BT.astype(jnp.promote_types(tokens_BT.dtype, jnp.int32))
        return jnp.where(tokens_BT < 0, vocab_size, tokens_BT)
    if getattr(tokens_BT, "is_fully_addressable", True):  # not if other processes hold a part
        ids = np.asarray(tokens_BT)
        outside = ids[(ids < 0) | (ids >= vocab_size)]
        if outside.size:
            raise ValueError(f"token id {outside[0]} is outside 0..{vocab_size - 1}, the model's vocabulary")
    return tokens_BT


class Encoder(nnx.Module):
    """Bidirectional layers and a norm; `cross` mixers attend to its output."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        assert config.encoder is not None
        self.config = config
        self.stacks = make_stacks(
            config, config.encoder_period, config.encoder.num_layers, causal=False, rngs=rngs
        )
        self.final_norm = make_norm(config, rngs)

    def run(self, x_BSD: jax.Array, ctx: Context) -> jax.Array:
        """The output memory_BSD for embedded source tokens."""
        layers = self.config.encoder.num_layers
        return self.final_norm(run_stacks(self.config, self.stacks, layers, x_BSD, None, ctx).y)


def init_params(config: ModelConfig, key: jax.Array) -> dict:
    """New float32 parameters, a nested dict with string keys, such as stacks/0/mixer/q/kernel."""
    if not isinstance(key, jax.Array):
        raise ValueError(f"key must be a PRNG key such as jax.random.key(0), got {type(key).__name__}")
    return _init_params(config, key)


@functools.partial(jax.jit, static_argnums=0)
def _init_params(config: ModelConfig, key: jax.Array) -> dict:
    return _to_strings(nnx.to_pure_dict(nnx.state(LanguageModel(config, rngs=nnx.Rngs(key)))))


def bind(config: ModelConfig, params: dict | Prepared) -> LanguageModel:
    """The module with `params`; ValueError for a leaf that is missing, unknown or of the wrong shape.

    `params` may be what `prepare_for_decoding` returns for the same config.
    """
    check_dtype(config.dtype)
    if isinstance(params, Prepared):
        _check_prepared(config, params)
        return nnx.merge(_prepared_graphdef(config), params.weights)
    graphdef, template = _template(config)
    return nnx.merge(graphdef, _fill(template, params, ""))


def prepare_for_decoding(config: ModelConfig, params: dict | Prepared) -> Prepared:
    """The weights laid out once for many calls of `prefill`, `decode_step`, `generate`, `apply` and `encode`.

    These accept it in place of `params`, with the same config. Each layer has its own weights whatever
    `config.scan_layers` is, and projections of the same input share a kernel [out, in]. The numbers are those
    of `params` up to the order of summation. It has no gradient layout: train with `params`.

    One pass over the weights, compiled; while it runs the memory holds them twice, and afterwards `params` may
    be deleted. Prepared weights are returned as they are. A pure function; raises the errors of `bind`.
    """
    if isinstance(params, Prepared):
        _check_prepared(config, params)
        return params
    return Prepared(_prepare(config, params), config)


@functools.partial(jax.jit, static_argnums=0)
def _prepare(config: ModelConfig, params: dict) -> dict:
    return nnx.to_pure_dict(nnx.state(prepare_model(bind(config, params))))


@functools.lru_cache(maxsize=64)
def _prepared_graphdef(config: ModelConfig):
    abstract = nnx.eval_shape(lambda: prepare_model(LanguageModel(config, rngs=nnx.Rngs(0))))
    return nnx.graphdef(abstract)


def _check_prepared(config: ModelConfig, params: Prepared) -> None:
    if params.config != config:
        raise ValueError(
            f"params were prepared for another configuration{_difference(params.config, config)}: call "
            "prepare_for_decoding with this one"
        )


def _difference(prepared: ModelConfig, config: ModelConfig) -> str:
    """The first field in which two configurations differ, for an error message."""
    for field in dataclasses.fields(ModelConfig):
        values = getattr(prepared, field.name), getattr(config, field.name)
        if values[0] != values[1]:
            return f" ({field.name} differs)"
    return ""


def init_state(config: ModelConfig, batch: int, capacity: int, *, cache: CacheOptions = DEFAULT_CACHE) -> Any:
    """Empty states of `batch` rows for positions 0 .. capacity - 1, without parameters.

    There is one state per layer. capacity: the largest position + 1. Raises: ValueError for a mixer without a
    state, a capacity beyond the learned positions, and a `cache` that is no `CacheOptions`.
    """
    check_capacity(config, capacity)
    if not isinstance(cache, CacheOptions):
        raise ValueError(
            f"cache must be a CacheOptions, such as CacheOptions(quantize='int8'), got {cache!r:.80}"
        )
    return init_states(config, batch, capacity, cache=cache)


def check_capacity(config: ModelConfig, capacity: int) -> None:
    """Raise ValueError for a capacity beyond the learned positions."""
    limit = config.max_positions
    if limit is not None and capacity > limit:
        raise ValueError(f"capacity {capacity} exceeds the {limit} learned positions (max_positions)")


def apply(
    config: ModelConfig, params: dict, tokens_BT: jax.Array, state: Any = None, *, ctx: Context | None = None
) -> ModelOutput:
    """The logits_BTV, the new state and aux; a pure function of its arguments.

    Raises: ValueError for a token id outside the vocabulary. Under `jit`, where ids are traced, it gives NaN
    logits from its token on. An invalid slot may hold any id.
    """
    return bind(config, params).run(tokens_BT, state, ctx=ctx)


def encode(
    config: ModelConfig,
    params: dict,
    source_BS: jax.Array,
    positions_BS: jax.Array | None = None,
    *,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """The encoder output, for `ctx.memory_BSD`; a position < 0 marks an invalid source slot."""
    ctx = Context(positions_BT=positions_BS, dropout_key=dropout_key)
    return bind(config, params).encode(source_BS, ctx=ctx)


def count_params(params: dict) -> int:
    """The total number of parameters."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


@functools.lru_cache(maxsize=64)
def _template(config: ModelConfig):
    abstract = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    return graphdef, nnx.to_pure_dict(state)


def _fill(template: Any, params: Any, path: str) -> Any:
    """`params` with the keys of the template (integers in lists) and the shape of each leaf checked."""
    if not isinstance(template, dict):
        if getattr(params, "shape", None) != template.shape:
            got = getattr(params, "shape", type(params).__name__)
            raise ValueError(f"parameter {path[1:]} must have shape {template.shape}, got {got}")
        return params
    if not isinstance(params, dict):
        raise ValueError(f"parameters at {path[1:] or 'the top'} must be a dict, got {type(params).__name__}")
    names = {str(key): key for key in template}
    for name in sorted(names.keys() ^ params.keys()):
        raise ValueError(f"parameter {path[1:]}/{name} is {'missing' if name in names else 'unknown'}")
    return {key: _fill(template[key], params[name], f"{path}/{name}") for name, key in names.items()}


def _to_strings(tree: Any) -> Any:
    return {str(k): _to_strings(v) for k, v in tree.items()} if isinstance(tree, dict) else tree
