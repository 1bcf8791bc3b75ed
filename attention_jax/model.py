"""The language model: a mixer per layer, everything else held equal.

    h_0 = E[tokens] (+ P[positions]);   h' = h + mixer(norm(h));   h'' = h' + mlp(norm(h'));   logits = W norm(h_L)

Layer i runs mixer i mod P of the config's P mixers. Parameters are stacked per place in that period:
stack p holds layers p, p + P, p + 2P, ... with a leading layer axis. The same layout is applied unrolled
(faster on a CPU) or by `lax.scan` over whole periods (compiles faster).

`init_params` and `apply` are the functional face: plain nested dicts in, arrays out.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax.layers import gelu, linear, matmul
from attention_jax.mixers import AttentionConfig, Context, MixerConfig
from attention_jax.positions import RoPE

_CHECKPOINT_POLICIES = tuple(
    name
    for name in (
        "nothing_saveable",
        "everything_saveable",
        "dots_saveable",
        "dots_with_no_batch_dims_saveable",
    )
    if hasattr(jax.checkpoint_policies, name)
)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A language model; `causal=True` is the decoder-only one."""

    __pydantic_config__ = {"extra": "forbid", "strict": True, "arbitrary_types_allowed": True}

    vocab_size: int | None = None  #: token ids (V); null in a training config: the tokenizer's
    d_model: int = 128  #: width of the residual stream (D)
    num_layers: int = 4  #: layers (L)
    mixers: tuple[MixerConfig, ...] = (AttentionConfig(rope=RoPE()),)  #: mixer configs, tiled over the layers
    mlp: Literal["swiglu", "geglu", "gelu"] = "swiglu"  #: feed-forward kind
    mlp_width: int | None = (
        None  #: its hidden width (F); null: 4 d_model (gelu) or 8/3 d_model to a multiple of 8
    )
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"  #: before each mixer, each mlp and the head
    norm_eps: float = 1e-5  #: added to the variance
    use_bias: bool = False  #: biases in mlp and layernorm (mixers have their own key)
    tie_embeddings: bool = True  #: the head is the transposed token embedding
    max_positions: int | None = None  #: rows of a learned absolute position embedding; null: none
    dropout: float = 0.0  #: on embeddings and on each residual branch
    logit_softcap: float | None = None  #: c turns a logit x into c tanh(x / c); null: off
    init_std: float = 0.02  #: of embeddings and projections; residual projections: divided by sqrt(2 L)
    causal: bool = True  #: every mixer sees the past only
    layers: Literal["unrolled", "scan"] = "unrolled"  #: how the stacked layers are applied
    remat: str | None = (
        None  #: a jax.checkpoint_policies name: what a layer's backward pass need not recompute; null: no rematerialisation
    )
    dtype: Literal["float32", "bfloat16"] = "float32"  #: of computation; parameters and logits are float32

    def __post_init__(self):
        object.__setattr__(self, "mixers", tuple(self.mixers))
        for name in ("d_model", "num_layers", "vocab_size", "mlp_width", "max_positions"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if not 1 <= len(self.mixers) <= self.num_layers:
            raise ValueError(
                f"mixers: {len(self.mixers)} given for {self.num_layers} layers; give 1 to that many"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.remat is not None and self.remat not in _CHECKPOINT_POLICIES:
            near = difflib.get_close_matches(self.remat, _CHECKPOINT_POLICIES, 1, 0)[0]
            raise ValueError(f"remat: no policy {self.remat!r}; did you mean {near!r}?")
        for index, mixer in enumerate(self.mixers):
            try:
                mixer.check(self.d_model, causal=self.causal)
            except ValueError as error:
                raise ValueError(f"mixers.{index}: {error}") from None

    @property
    def hidden_width(self) -> int:
        """The mlp's width F."""
        if self.mlp_width is not None:
            return self.mlp_width
        return 4 * self.d_model if self.mlp == "gelu" else 8 * round(self.d_model / 3)

    @property
    def stack_sizes(self) -> tuple[int, ...]:
        """Layers on each stack; the remainder rides on the first ones."""
        period = len(self.mixers)
        return tuple(len(range(p, self.num_layers, period)) for p in range(period))


class MLP(nnx.Module):
    """down(act(gate(x)) * up(x)), or down(gelu(up(x))): Shazeer 2020 (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, *, dtype, rngs: nnx.Rngs):
        D, F = config.d_model, config.hidden_width
        common = {"use_bias": config.use_bias, "dtype": dtype, "rngs": rngs}
        self.kind = config.mlp
        if config.mlp != "gelu":
            self.gate = linear(D, F, kernel_init=_init(config), **common)
        self.up = linear(D, F, kernel_init=_init(config), **common)
        self.down = linear(F, D, kernel_init=_out_init(config), **common)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        up_BTF = self.up(x_BTD)
        if self.kind == "gelu":
            return self.down(gelu(up_BTF))
        act = nnx.silu if self.kind == "swiglu" else gelu
        return self.down(act(self.gate(x_BTD)) * up_BTF)


class Block(nnx.Module):
    """One layer: x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, mixer: MixerConfig, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        inits = {"kernel_init": _init(config), "out_init": _out_init(config)}
        self.norm1 = _norm(config, rngs)
        self.mixer = mixer.build(config.d_model, rngs, causal=config.causal, dtype=dtype, **inits)
        self.norm2 = _norm(config, rngs)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)
        self.dropout = config.dropout

    def __call__(self, x_BTD: jax.Array, state: Any = None, *, ctx: Context) -> tuple[jax.Array, Any]:
        y_BTD, state = self.mixer(self.norm1(x_BTD), state, ctx=ctx.fold_key(0))
        x_BTD = x_BTD + dropout(y_BTD, self.dropout, ctx.fold_key(1).dropout_key)
        y_BTD = self.mlp(self.norm2(x_BTD))
        return x_BTD + dropout(y_BTD, self.dropout, ctx.fold_key(2).dropout_key), state


class LanguageModel(nnx.Module):
    """Token ids to next-token logits, over any list of mixers."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        if config.vocab_size is None:
            raise ValueError("vocab_size is not set: give the number of token ids")
        self.config = config
        init = _init(config)
        self.embed = nnx.Embed(config.vocab_size, config.d_model, embedding_init=init, rngs=rngs)
        if config.max_positions is not None:
            self.positions = nnx.Embed(config.max_positions, config.d_model, embedding_init=init, rngs=rngs)
        self.stacks = nnx.List(
            _stacked(lambda rngs, m=mixer: Block(config, m, rngs=rngs), size, rngs)
            for size, mixer in zip(config.stack_sizes, config.mixers, strict=True)
        )
        self.final_norm = _norm(config, rngs)
        if not config.tie_embeddings:
            self.head = linear(config.d_model, config.vocab_size, kernel_init=init, rngs=rngs)

    def __call__(
        self, tokens_BT: jax.Array, state: Any = None, *, ctx: Context | None = None
    ) -> tuple[jax.Array, Any]:
        """logits_BTV (float32) and the state of every layer, in the form `init_state` gave it."""
        x_BTD, state = self.hidden(tokens_BT, state, ctx=ctx)
        return self.logits(x_BTD), state

    def hidden(
        self, tokens_BT: jax.Array, state: Any = None, *, ctx: Context | None = None
    ) -> tuple[jax.Array, Any]:
        """The normalised features before the head, x_BTD, and the state."""
        ctx = ctx or Context()
        x_BTD = self._embed(tokens_BT, ctx)
        x_BTD, state = self._layers(x_BTD, state, ctx)
        return self.final_norm(x_BTD), state

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """The head: logits_BTV float32 of normalised features."""
        if self.config.tie_embeddings:
            kernel_DV = self.embed.embedding[...].T
        else:
            kernel_DV = self.head.kernel[...]
        logits_BTV = matmul(x_BTD, kernel_DV.astype(x_BTD.dtype), preferred_element_type=jnp.float32)
        cap = self.config.logit_softcap
        return logits_BTV if cap is None else cap * jnp.tanh(logits_BTV / cap)

    def init_state(
        self, batch: int, capacity: int, *, memory: tuple[jax.Array, jax.Array | None] | None = None
    ) -> Any:
        """Empty mixer states for `capacity` tokens a row: one per layer, or stacked for `layers: scan`."""
        limit = self.config.max_positions
        if limit is not None and capacity > limit:
            raise ValueError(f"capacity {capacity} exceeds the {limit} learned positions (max_positions)")
        states = []
        for layer in range(self.config.num_layers):
            mixer = self._layer(layer).mixer
            states.append(mixer.init_state(batch, capacity, memory=memory))
        return states if self.config.layers == "unrolled" else self._stack_states(states)

    def _embed(self, tokens_BT: jax.Array, ctx: Context) -> jax.Array:
        for ids in (ctx.positions_BT, ctx.segment_ids_BT):
            if ids is not None:  # an invalid slot may hold any id: it must not reach the table
                tokens_BT = jnp.where(ids >= 0, tokens_BT, 0)
        x_BTD = self.embed(tokens_BT)
        limit = self.config.max_positions
        if limit is not None:
            positions_BT = ctx.positions_BT
            if positions_BT is None:
                if tokens_BT.shape[1] > limit:
                    raise ValueError(f"{tokens_BT.shape[1]} tokens exceed the {limit} learned positions")
                positions_BT = jnp.arange(tokens_BT.shape[1])[None]
            # Past the table nnx.Embed gives NaN, which is seen; a clamped row would not be.
            x_BTD = x_BTD + self.positions(jnp.maximum(positions_BT, 0))
        x_BTD = dropout(x_BTD, self.config.dropout, ctx.fold_key(self.config.num_layers).dropout_key)
        return x_BTD.astype(self.config.dtype)

    def _layers(self, x_BTD: jax.Array, state: Any, ctx: Context) -> tuple[jax.Array, Any]:
        if self.config.layers == "scan":
            return self._scanned(x_BTD, state, ctx)
        states = [None] * self.config.num_layers if state is None else list(state)
        weights = [_unstacked(stack) for stack in self.stacks]
        for i in range(self.config.num_layers):
            graphdef, layers = weights[i % len(weights)]
            x_BTD, states[i] = self._apply(graphdef, layers[i // len(weights)], x_BTD, states[i], ctx, i)
        return x_BTD, None if state is None else states

    def _scanned(self, x_BTD: jax.Array, state: Any, ctx: Context) -> tuple[jax.Array, Any]:
        """`lax.scan` over whole periods, then the remaining layers."""
        period, L = len(self.stacks), self.config.num_layers
        rounds = L // period
        split = [nnx.split(stack) for stack in self.stacks]
        head = [jax.tree.map(lambda a: a[:rounds], weights) for _, weights in split]
        states = [None] * period if state is None else list(state)
        state_head = [jax.tree.map(lambda a: a[:rounds], s) for s in states]

        def one_round(x_BTD, step):
            index, weights, states = step
            states = list(states)
            for p, (graphdef, _) in enumerate(split):
                layer = index * period + p
                x_BTD, states[p] = self._apply(graphdef, weights[p], x_BTD, states[p], ctx, layer)
            return x_BTD, states

        x_BTD, out = jax.lax.scan(one_round, x_BTD, (jnp.arange(rounds), head, state_head))
        for p in range(L - rounds * period):
            weights, s = jax.tree.map(lambda a: a[rounds], (split[p][1], states[p]))
            x_BTD, s = self._apply(split[p][0], weights, x_BTD, s, ctx, rounds * period + p)
            out[p] = jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), out[p], s)
        return x_BTD, None if state is None else out

    def _apply(self, graphdef, weights, x_BTD, state, ctx: Context, layer):
        def run(weights, x_BTD, state, ctx):
            return nnx.merge(graphdef, weights)(x_BTD, state, ctx=ctx)

        if self.config.remat is not None and state is None:
            run = jax.checkpoint(run, policy=getattr(jax.checkpoint_policies, self.config.remat))
        return run(weights, x_BTD, state, ctx.fold_key(layer))

    def _layer(self, layer: int) -> Block:
        """Layer `layer` as a module of its own."""
        graphdef, layers = _unstacked(self.stacks[layer % len(self.stacks)])
        return nnx.merge(graphdef, layers[layer // len(self.stacks)])

    def _stack_states(self, states: list) -> list:
        period = len(self.stacks)
        return [jax.tree.map(lambda *leaves: jnp.stack(leaves), *states[p::period]) for p in range(period)]


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """x with entries dropped at `rate` and the rest scaled by 1 / (1 - rate); key None keeps all."""
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), jnp.zeros((), x.dtype))


def init_params(config: ModelConfig, key: jax.Array) -> dict:
    """Fresh float32 parameters as a nested dict of strings, such as stacks/0/mixer/q/kernel."""
    return _init_params(config, key)


@functools.partial(jax.jit, static_argnums=0)
def _init_params(config: ModelConfig, key: jax.Array) -> dict:
    return _to_strings(nnx.to_pure_dict(nnx.state(LanguageModel(config, rngs=nnx.Rngs(key)))))


def bind(config: ModelConfig, params: dict) -> LanguageModel:
    """The module that holds `params`; ValueError names a leaf that is missing, unknown or misshapen."""
    graphdef, template = _template(config)
    return nnx.merge(graphdef, _fill(template, params, ""))


def apply(
    config: ModelConfig, params: dict, tokens_BT: jax.Array, state: Any = None, *, ctx: Context | None = None
) -> tuple[jax.Array, Any]:
    """logits_BTV float32 and the new state; a pure function of its arguments."""
    return bind(config, params)(tokens_BT, state, ctx=ctx)


def count_params(params: dict) -> int:
    """Numbers in the parameters."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


@functools.lru_cache(maxsize=64)
def _template(config: ModelConfig):
    abstract = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    return graphdef, nnx.to_pure_dict(state)


def _fill(template: Any, params: Any, path: str) -> Any:
    """`params` with the template's own keys (integers in lists), checked leaf by leaf."""
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


def _stacked(make, size: int, rngs: nnx.Rngs) -> nnx.Module:
    """`size` modules from `make(rngs)` as one whose parameters have a leading layer axis."""
    keys = jax.random.split(rngs.params(), size)
    weights = jax.lax.map(lambda key: nnx.state(make(nnx.Rngs(key))), keys)
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    return nnx.merge(graphdef, weights)


def _unstacked(stack: nnx.Module) -> tuple[Any, list]:
    """(graphdef, the weights of each layer). `lax.split`, because its transpose is one concatenation."""
    graphdef, weights = nnx.split(stack)
    leaves, treedef = jax.tree.flatten(weights)
    size = leaves[0].shape[0]
    parts = [[a[0] for a in jax.lax.split(leaf, [1] * size)] for leaf in leaves]
    return graphdef, [jax.tree.unflatten(treedef, layer) for layer in zip(*parts, strict=True)]


def _norm(config: ModelConfig, rngs: nnx.Rngs) -> nnx.Module:
    dtype = jnp.dtype(config.dtype)
    if config.norm == "rmsnorm":
        return nnx.RMSNorm(config.d_model, epsilon=config.norm_eps, dtype=dtype, rngs=rngs)
    return nnx.LayerNorm(
        config.d_model, epsilon=config.norm_eps, use_bias=config.use_bias, dtype=dtype, rngs=rngs
    )


def _init(config: ModelConfig):
    return nnx.initializers.normal(config.init_std)


def _out_init(config: ModelConfig):
    return nnx.initializers.normal(config.init_std / math.sqrt(2 * config.num_layers))
