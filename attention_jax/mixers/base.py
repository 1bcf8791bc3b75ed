"""The interface of sequence mixers.

    y_BTD = mixer(x_BTD)                                         the parallel form over whole rows
    y_BTD, state, aux = mixer.mix(x_BTD, state, ctx=ctx)         the full interface

`state=None` is the parallel form. With a state, the call appends T >= 1 new tokens: they attend to the tokens
in the state and to one another (prefill, chunked prefill, decoding). Invalid tokens (position or segment < 0)
leave every state unchanged and give 0.

A mechanism consists of a frozen `MixerConfig` and a `Mixer` whose `config_type` it is. Defining the two classes
registers the config's `kind`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Literal, NamedTuple, Self

import flax.nnx.summary
import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax.about import About
from attention_jax.caches import DEFAULT_CACHE, Cache, CacheOptions
from attention_jax.choices import check_choices, check_dropout, check_epsilon
from attention_jax.dtypes import check_dtype
from attention_jax.hints import hint
from attention_jax.kinds import Built, Kind
from attention_jax.layers import linear
from attention_jax.masks import Causal, Mask, parse
from attention_jax.ops.softmax.api import implementations as softmax_implementations

_STATIC = {"static": True}
_MOST_HEADS = 2**16
#: The names allowed in `Context.capture`, and the captured arrays.
CAPTURES = {
    "attention": "the attention weights before dropout, float32 [B, N, T, S]",
    "queries": "q [B, T, N, H] as used in the scores",
    "keys": "k [B, S, K, H] as used in the scores",
    "values": "v [B, S, K, M]",
    "hidden": "the output x [B, T, D] of the layer",
    "router": "the scores of the experts, float32 [B, T, E]: softmax or sigmoid of the router's logits",
    "router_load": "float32 [E], the share of each expert in the choices of the valid tokens",
    "router_losses": "float32 [2], the load-balancing loss and the z-loss, each times its coefficient",
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """Information about the tokens of a call other than their features.

    positions_BT: int32; None means 0, 1, 2, ... (only without a state). A position < 0 marks an invalid slot.
    segment_ids_BT: int32 document ids; None means one document per row. An id < 0 marks an invalid slot.
      Positions restart in every document. Only for the parallel form: a state has one document per row.
    memory_BSD, memory_positions_BS: the input of cross-attention; positions default to 0, 1, 2, ...
    dropout_key: None disables all dropout.
    mask, mask_BNTS: a Mask and a boolean array [B | 1, N | 1, T, S]; both are intersected with the layer's own
      mask. Only softmax mixers support them, and mask_BNTS only without a state.
    capture: names from `CAPTURES` of arrays that each layer returns in `aux`.
    """

    positions_BT: jax.Array | None = None
    segment_ids_BT: jax.Array | None = None
    memory_BSD: jax.Array | None = None
    memory_positions_BS: jax.Array | None = None
    dropout_key: jax.Array | None = None
    mask_BNTS: jax.Array | None = None
    mask: Mask | None = dataclasses.field(default=None, metadata=_STATIC)
    capture: frozenset[str] = dataclasses.field(default=frozenset(), metadata=_STATIC)

    def __post_init__(self):
        if isinstance(self.capture, str):
            raise ValueError(
                f"capture must be a set of names, got {self.capture!r}: write {{{self.capture!r}}}"
            )
        if not isinstance(self.capture, frozenset):
            object.__setattr__(self, "capture", frozenset(self.capture))
        for name in sorted(self.capture - CAPTURES.keys()):
            raise ValueError(f"capture: unknown name {name!r}; choose from {', '.join(CAPTURES)}")
        if self.mask is not None and not isinstance(self.mask, Mask):
            raise ValueError(
                f"ctx.mask must be a Mask, got {type(self.mask).__name__}; pass an array as mask_BNTS"
            )

    def fold_key(self, data: Any) -> Context:
        """A copy with `data` folded into the dropout key."""
        if self.dropout_key is None:
            return self
        return dataclasses.replace(self, dropout_key=jax.random.fold_in(self.dropout_key, data))

    def refuse_capture(self, module: str, method: str) -> None:
        """ValueError if a call that returns one array alone is asked to capture others."""
        if self.capture:
            raise ValueError(
                f"ctx.capture: calling {module} returns no aux; call {module}.{method}(...) to get it"
            )

    def captured(self, **arrays: Callable[[], jax.Array]) -> dict[str, jax.Array]:
        """The arrays named in `capture`, by name; the others are not computed."""
        return {name: make() for name, make in arrays.items() if name in self.capture}


# `nnx.tabulate` prints the arguments of every method as YAML and fails for a pytree without arrays.
if (_dumper := getattr(flax.nnx.summary, "NoneDumper", None)) is not None:
    _dumper.add_representer(Context, lambda dumper, ctx: dumper.represent_str("Context()"))


class MixerOutput(NamedTuple):
    """The output of a mixer or a layer.

    y: [B, T, D]. state: the state with x appended, or None if none was given. aux: the arrays named in
    `Context.capture`, by name.
    """

    y: jax.Array
    state: Any = None
    aux: dict[str, Any] = {}


@dataclasses.dataclass(frozen=True)
class MixerConfig(Kind):
    """Base class of the configs of all mechanisms, validated on construction.

    A subclass that gives `kind` a default is registered under it; a kind that another class has is refused.
    Other code uses only these traits:
      about: title, paper and costs.
      module: the `Mixer` class, set when that class is defined.
      implementations: the allowed values of the option `impl`.
      direction: "any", "causal" (causal models only) or "bidirectional" (models that are not causal only).
      reason: the reason for a direction other than "any".
      reads_memory: whether it attends to `ctx.memory_BSD`, an encoder's output.
      mixes_whole_row: whether it mixes all tokens of a row, so that it does not support packed documents.
      takes_mask: whether it supports the masks of a `Context`.
      horizon: the maximum number of tokens per document, or None. horizon_key: the option that sets it.
    """

    noun: ClassVar[str] = "mixer"
    about: ClassVar[About]
    module: ClassVar[type[Mixer]]
    implementations: ClassVar[Callable[[], Iterable[str]]] = staticmethod(softmax_implementations)
    direction: ClassVar[Literal["any", "causal", "bidirectional"]] = "any"
    reason: ClassVar[str] = ""
    reads_memory: ClassVar[bool] = False
    mixes_whole_row: ClassVar[bool] = False
    takes_mask: ClassVar[bool] = False
    horizon: ClassVar[int | None] = None
    horizon_key: ClassVar[str] = "horizon"

    kind: str = ""

    def __post_init__(self):
        mask = getattr(self, "mask", None)
        if isinstance(mask, str):
            object.__setattr__(self, "mask", mask := parse(mask))
        if mask is not None and not isinstance(mask, Mask):
            more = f": write {mask.__name__}()" if isinstance(mask, type) and issubclass(mask, Mask) else ""
            raise ValueError(f"mask must be a Mask or a mask expression, got {type(mask).__name__}{more}")
        check_choices(self)
        if hasattr(self, "num_heads"):
            check_heads(self.num_heads, getattr(self, "num_kv_heads", None))
        check_dropout(getattr(self, "dropout", 0.0))
        for name in (field.name for field in dataclasses.fields(self) if field.name.endswith("_eps")):
            check_epsilon(self, name)
        known = tuple(self.implementations())
        if (impl := getattr(self, "impl", None)) not in (None, *known):
            more = hint("impl", impl, known)
            raise ValueError(f"unknown impl {impl!r}; choose from {', '.join(known)}{more}")

    def check(self, d_model: int, *, causal: bool) -> None:
        """Raise ValueError if this mixer does not fit a model of this width, causal or not."""
        if d_model < 1:
            raise ValueError(f"d_model must be >= 1, got {d_model}")
        if self.direction == "causal" and not causal:
            raise ValueError(
                f"{self.kind} is causal only: {self.reason}; use kind softmax in a model with causal: false"
            )
        if self.direction == "bidirectional" and causal:
            raise ValueError(
                f"{self.kind} cannot be causal: {self.reason}; model.causal is true, set it to false"
            )

    def restricted(self, causal: bool) -> Self:
        """The config of a layer in such a model: in a causal model, its mask is intersected with `Causal()`."""
        if not hasattr(self, "mask"):
            return self
        return dataclasses.replace(self, mask=restrict_to_causal(self.mask, causal))

    @property
    def biased_output(self) -> bool:
        """Whether the output projection has a bias: `out_bias`, or `use_bias` if that is null."""
        out_bias = getattr(self, "out_bias", None)
        return self.use_bias if out_bias is None else out_bias

    def build(self, d_model: int, rngs: nnx.Rngs, *, causal: bool = False, **options: Any) -> Mixer:
        """The mixer for a model of this width, after `check`. options: dtype, kernel_init and out_init."""
        return self.module(d_model, self, causal=causal, rngs=rngs, **options)

    def init_state(
        self,
        d_model: int,
        batch: int,
        capacity: int,
        *,
        causal: bool = True,
        cache: CacheOptions = DEFAULT_CACHE,
    ) -> Cache:
        """An empty state of `batch` rows for positions 0 .. capacity - 1; needs no built module.

        Raises: ValueError for a mixer without a state.
        """
        raise NotImplementedError


class Mixer(Built, nnx.Module):
    """Base class of all mixers. A subclass sets `config_type` and implements `setup` and `mix`.

    Args:
      config: the options; alternatively pass its fields as keywords, as in `Attention(256, num_heads=8)`.
      causal: whether it is a layer of a causal model, which intersects its mask with `Causal()`. The default
        is True for mechanisms that are always causal and False for all others.
      dtype: dtype of the computation; parameters are float32.
      kernel_init, out_init: initialisers of the projections and of the output projection (by default the same).
    """

    config_type: ClassVar[type[MixerConfig]]

    def __init__(
        self,
        d_model: int,
        config: MixerConfig | None = None,
        *,
        causal: bool | None = None,
        dtype: Any = jnp.float32,
        kernel_init: Any = nnx.initializers.lecun_normal(),  # noqa: B008 (frozen)
        out_init: Any = None,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        if not isinstance(rngs, nnx.Rngs):
            raise ValueError(f"rngs must be nnx.Rngs, such as nnx.Rngs(0), got {type(rngs).__name__}")
        config = self.chosen_config(config, options)
        check_dtype(dtype)
        self.causal = config.direction == "causal" if causal is None else causal
        config.check(d_model, causal=self.causal)
        self.config = config.restricted(self.causal)
        self.d_model, self.dtype = d_model, dtype
        self.setup(Parts(kernel_init, out_init or kernel_init, dtype, rngs))

    def setup(self, parts: Parts) -> None:
        """Create the parameters for `self.config` and `self.d_model`."""
        raise NotImplementedError

    def mix(self, x_BTD: jax.Array, state: Any = None, *, ctx: Context | None = None) -> MixerOutput:
        """y, the state with x appended, and the arrays named in `ctx.capture`."""
        raise NotImplementedError

    def __call__(self, x_BTD: jax.Array, *, ctx: Context | None = None) -> jax.Array:
        """y [B, T, D] for whole rows x [B, T, D], the parallel form."""
        if ctx is not None:
            ctx.refuse_capture(type(self).__name__, "mix")
        return self.mix(x_BTD, None, ctx=ctx).y

    def init_state(self, batch: int, capacity: int, *, cache: CacheOptions = DEFAULT_CACHE) -> Cache:
        """An empty state of `batch` rows for positions 0 .. capacity - 1."""
        return self.config.init_state(
            self.d_model, batch, capacity, causal=self.causal, cache=cache.of_layer(self.dtype)
        )


@dataclasses.dataclass(frozen=True)
class Parts:
    """Factory of the projections of a mixer or a feed-forward, with their dtype, initialisers and RNGs."""

    kernel_init: Any
    out_init: Any
    dtype: Any
    rngs: nnx.Rngs

    def linear(self, features_in: int, features_out: int, **options: Any) -> nnx.Linear:
        """A projection; options are those of `layers.linear`."""
        given = {"kernel_init": self.kernel_init, "dtype": self.dtype, "rngs": self.rngs}
        return linear(features_in, features_out, **(given | options))

    def out(self, features_in: int, features_out: int, **options: Any) -> nnx.Linear:
        """The projection back to the residual stream."""
        return self.linear(features_in, features_out, kernel_init=self.out_init, **options)


def mixer_kinds() -> dict[str, type[MixerConfig]]:
    """The config class of every mixer `kind`."""
    return MixerConfig.kinds()


def make_config(kind: str, **options: Any) -> MixerConfig:
    """The config of a `kind`; ValueError for an unknown kind or option, with what was probably meant."""
    return MixerConfig.make(kind, **options)


def make_mixer(
    kind: str, d_model: int, *, rngs: nnx.Rngs, causal: bool = False, dtype: Any = jnp.float32, **options: Any
) -> Mixer:
    """The mixer of a `kind`: `y_BTD = mixer(x_BTD)`.

    options: the fields of the kind's config, such as num_heads. causal: intersect its mask with Causal().
    Raises: ValueError for an unknown kind or option, or for inconsistent options.
    """
    return make_config(kind, **options).build(d_model, rngs, causal=causal, dtype=dtype)


def check_heads(num_heads: int, num_kv_heads: int | None) -> None:
    """Raise ValueError unless num_heads >= 1 and num_kv_heads divides it."""
    if num_heads < 1:
        raise ValueError(f"num_heads must be >= 1, got {num_heads}")
    if num_heads > _MOST_HEADS:
        raise ValueError(f"num_heads must be <= {_MOST_HEADS}, got {num_heads}: lower it")
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    if kv_heads < 1 or num_heads % kv_heads:
        raise ValueError(f"num_kv_heads {kv_heads} does not divide num_heads {num_heads}")


def check_encoder_memory(ctx: Context, B: int, d_model: int) -> None:
    """Raise ValueError unless the memory of a context is [B, S, d_model] and its positions [B or 1, S]."""
    shape = ctx.memory_BSD.shape
    if len(shape) != 3 or shape[0] != B or shape[2] != d_model:
        raise ValueError(
            f"ctx.memory_BSD must be [{B}, S, {d_model}], the rows of x and the width of the model, got "
            f"{list(shape)}: project an encoder of another width first"
        )
    positions_BS = ctx.memory_positions_BS
    if positions_BS is not None and tuple(positions_BS.shape) not in ((B, shape[1]), (1, shape[1])):
        raise ValueError(
            f"ctx.memory_positions_BS must be [{B} or 1, {shape[1]}], a position per slot of the memory, got "
            f"{list(positions_BS.shape)}"
        )


def restrict_to_causal(mask: Mask, causal: bool) -> Mask:
    """The mask of a layer: in a causal model, intersected with Causal() unless it has a `prefix`."""
    return mask & Causal() if causal and mask.prefix is None else mask
