"""What every sequence mixer is.

    y_BTD = mixer(x_BTD)                                         the parallel form over whole rows
    y_BTD, state, aux = mixer.mix(x_BTD, state, ctx=ctx)         the full contract

`state=None` is the parallel form. With a state the call appends: the T new tokens attend to what the state
holds and to one another, whatever T is (prefill, prefill in pieces, decode). Invalid tokens (position or
segment < 0) leave every state unchanged and give 0.

A mechanism is a frozen `MixerConfig` and a `Mixer` that names it as its `config_type`; defining the two
registers the config's `kind`.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Literal, NamedTuple, Self

import flax.nnx.summary
import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax.about import About
from attention_jax.caches import Cache
from attention_jax.choices import check_choices
from attention_jax.layers import linear
from attention_jax.masks import Causal, Mask, parse
from attention_jax.ops.softmax.api import implementations as softmax_implementations

_STATIC = {"static": True}
#: What `Context.capture` may name, and where it comes from.
CAPTURES = {
    "attention": "the weights of every pair, float32 [B, N, T, S], before dropout",
    "queries": "q [B, T, N, H] as it enters the scores",
    "keys": "k [B, S, K, H] as it enters the scores",
    "values": "v [B, S, K, M]",
    "hidden": "x [B, T, D] behind the layer",
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What a layer may know about its tokens beside their features.

    positions_BT: int32; None is 0, 1, 2, ... (only without a state). < 0 holds no token.
    segment_ids_BT: int32 document ids; None is one document a row. < 0 holds no token. Positions restart
      in every document. Only for the parallel form: a cached stream holds one document a row.
    memory_BSD, memory_positions_BS: what cross-attention reads; positions default to 0, 1, 2, ...
    dropout_key: None switches every dropout off.
    mask: a Mask, and mask_BNTS: a boolean array [B | 1, N | 1, T, S]; both are intersected with the layer's
      own mask. Softmax mixers take them, others refuse them; mask_BNTS only without a state.
    capture: names of `CAPTURES` that each layer returns in `aux`.
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
        if not isinstance(self.capture, frozenset):
            object.__setattr__(self, "capture", frozenset(self.capture))
        for name in sorted(self.capture - CAPTURES.keys()):
            raise ValueError(f"capture: there is no {name!r}; there are {', '.join(CAPTURES)}")
        if self.mask is not None and not isinstance(self.mask, Mask):
            raise ValueError(
                f"ctx.mask must be a Mask, got {type(self.mask).__name__}; an array is mask_BNTS"
            )

    def fold_key(self, data: Any) -> Context:
        """The same context with `data` folded into the dropout key."""
        if self.dropout_key is None:
            return self
        return dataclasses.replace(self, dropout_key=jax.random.fold_in(self.dropout_key, data))

    def captured(self, **arrays: Callable[[], jax.Array]) -> dict[str, jax.Array]:
        """The arrays that `capture` names, by name; the others are not computed."""
        return {name: make() for name, make in arrays.items() if name in self.capture}


# `nnx.tabulate` prints the arguments of every method as YAML, and fails on a pytree without arrays.
if (_dumper := getattr(flax.nnx.summary, "NoneDumper", None)) is not None:
    _dumper.add_representer(Context, lambda dumper, ctx: dumper.represent_str("Context()"))


class MixerOutput(NamedTuple):
    """What a mixer and a layer return.

    y: [B, T, D]. state: with x appended (None for None). aux: what `Context.capture` asked for, by name.
    """

    y: jax.Array
    state: Any = None
    aux: dict[str, Any] = {}


_KINDS: dict[str, type[MixerConfig]] = {}


@dataclasses.dataclass(frozen=True)
class MixerConfig:
    """A mechanism and its options, checked when made. A subclass gives `kind` its default and is registered.

    Traits, which say what others must know of a mechanism:
      about: title, paper and costs.
      module: the `Mixer`; set by its definition.
      implementations: names that the option `impl` may have.
      direction: "any"; "causal": causal models only; "bidirectional": models that are not causal only.
      reason: why, where the direction is not any.
      reads_memory: it attends to `ctx.memory_BSD`, an encoder's output.
      mixes_whole_row: it cannot keep the documents of a row apart.
      takes_mask: it takes the masks of a `Context`.
      horizon: the most tokens a document may have, or None; horizon_key: the option that says so.
    """

    # pydantic reads this where YAML enters; the library itself does not need pydantic.
    __pydantic_config__ = {"extra": "forbid", "strict": True, "arbitrary_types_allowed": True}

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

    def __init_subclass__(cls, **arguments: Any):
        super().__init_subclass__(**arguments)
        if kind := cls.__dict__.get("kind"):
            _KINDS[kind] = cls

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        """For pydantic: `MixerConfig` stands for all kinds, told apart by `kind`."""
        if cls is not MixerConfig:
            return handler(source)
        choices = {kind: handler.generate_schema(config) for kind, config in mixer_kinds().items()}
        return {"type": "tagged-union", "discriminator": "kind", "choices": choices}

    def __post_init__(self):
        mask = getattr(self, "mask", None)
        if isinstance(mask, str):
            object.__setattr__(self, "mask", mask := parse(mask))
        if mask is not None and not isinstance(mask, Mask):
            raise ValueError(f"mask must be a Mask or its expression, got {type(mask).__name__}")
        if hasattr(self, "num_heads"):
            check_heads(self.num_heads, getattr(self, "num_kv_heads", None))
        if not 0 <= (dropout := getattr(self, "dropout", 0.0)) < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        check_choices(self)
        known = tuple(self.implementations())
        if (impl := getattr(self, "impl", None)) not in (None, *known):
            raise ValueError(f"unknown impl {impl!r}; there are {', '.join(known)}")

    def check(self, d_model: int, *, causal: bool) -> None:
        """ValueError where this mixer cannot be part of a model of this width, causal or not."""
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
        """The config as a layer of such a model runs it: its mask within `Causal()` in a causal one."""
        if not hasattr(self, "mask"):
            return self
        return dataclasses.replace(self, mask=restrict_to_causal(self.mask, causal))

    def build(self, d_model: int, rngs: nnx.Rngs, *, causal: bool = False, **options: Any) -> Mixer:
        """The checked mixer of a model of this width; options: dtype, kernel_init and out_init."""
        return self.module(d_model, self, causal=causal, rngs=rngs, **options)

    def init_state(
        self, d_model: int, batch: int, capacity: int, *, causal: bool = True, dtype: Any = jnp.float32
    ) -> Cache:
        """An empty state of `batch` rows for positions 0 .. capacity - 1, without a built module.

        Raises: ValueError for a mixer that keeps no state.
        """
        raise NotImplementedError


class Mixer(nnx.Module):
    """A module that mixes along the sequence; a subclass names its `config_type` and defines two methods.

    Args:
      config: the mechanism's options; or give its fields as keywords, as in `Attention(256, num_heads=8)`.
      causal: whether it is a layer of a causal model, which intersects its mask with `Causal()`. By default
        only for mechanisms that are always causal.
      dtype: of the computation; parameters are float32.
      kernel_init, out_init: of the projections, and of the last one where it differs.
    """

    config_type: ClassVar[type[MixerConfig]]

    def __init_subclass__(cls, **arguments: Any):
        super().__init_subclass__(**arguments)
        if "config_type" in cls.__dict__:
            cls.config_type.module = cls

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
        if config is None:
            config = make_config(self.config_type.kind, **options)
        elif options or not isinstance(config, self.config_type):
            raise ValueError(
                f"{type(self).__name__} takes a {self.config_type.__name__} or its fields as keywords, got "
                f"{type(config).__name__} and {sorted(options)}"
            )
        self.causal = config.direction == "causal" if causal is None else causal
        config.check(d_model, causal=self.causal)
        self.config = config.restricted(self.causal)
        self.d_model, self.dtype = d_model, dtype
        self.setup(Parts(kernel_init, out_init or kernel_init, dtype, rngs))

    def setup(self, parts: Parts) -> None:
        """Make the parameters, from `self.config` and `self.d_model`."""
        raise NotImplementedError

    def mix(self, x_BTD: jax.Array, state: Any = None, *, ctx: Context | None = None) -> MixerOutput:
        """y, the state with x appended, and what `ctx.capture` asks for."""
        raise NotImplementedError

    def __call__(self, x_BTD: jax.Array, *, ctx: Context | None = None) -> jax.Array:
        """y [B, T, D] of whole rows x [B, T, D]."""
        return self.mix(x_BTD, None, ctx=ctx).y

    def init_state(self, batch: int, capacity: int, *, dtype: Any = None) -> Cache:
        """An empty state of `batch` rows for positions 0 .. capacity - 1."""
        return self.config.init_state(
            self.d_model, batch, capacity, causal=self.causal, dtype=dtype or self.dtype
        )


@dataclasses.dataclass(frozen=True)
class Parts:
    """How a mixer makes its parameters."""

    kernel_init: Any
    out_init: Any
    dtype: Any
    rngs: nnx.Rngs

    def linear(self, features_in: int, features_out: int, **options: Any) -> nnx.Linear:
        """A projection; options as of `layers.linear`."""
        given = {"kernel_init": self.kernel_init, "dtype": self.dtype, "rngs": self.rngs}
        return linear(features_in, features_out, **(given | options))

    def out(self, features_in: int, features_out: int, **options: Any) -> nnx.Linear:
        """The projection back to the residual stream."""
        return self.linear(features_in, features_out, kernel_init=self.out_init, **options)


def mixer_kinds() -> dict[str, type[MixerConfig]]:
    """The config class of every mixer `kind`."""
    return dict(_KINDS)


def make_config(kind: str, **options: Any) -> MixerConfig:
    """The config of a `kind`; ValueError names an unknown kind or option with the nearest known one."""
    if kind not in _KINDS:
        near = difflib.get_close_matches(str(kind), _KINDS, 1, 0)[0]
        raise ValueError(f"no mixer {kind!r}; did you mean {near!r}? There are {', '.join(_KINDS)}")
    known = [f.name for f in dataclasses.fields(_KINDS[kind]) if f.name != "kind"]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0)[0]
            raise ValueError(f"mixer {kind!r} has no option {name!r}; did you mean {near!r}?")
    return _KINDS[kind](**options)


def make_mixer(
    kind: str, d_model: int, *, rngs: nnx.Rngs, causal: bool = False, dtype: Any = jnp.float32, **options: Any
) -> Mixer:
    """The mixer of a `kind`: `y_BTD = mixer(x_BTD)`.

    options: the fields of the kind's config, such as num_heads. causal: intersects its mask with Causal().
    Raises: ValueError naming an unknown kind or option, or what does not fit together.
    """
    return make_config(kind, **options).build(d_model, rngs, causal=causal, dtype=dtype)


def check_heads(num_heads: int, num_kv_heads: int | None) -> None:
    """ValueError for head counts that cannot be."""
    if num_heads < 1:
        raise ValueError(f"num_heads must be >= 1, got {num_heads}")
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    if kv_heads < 1 or num_heads % kv_heads:
        raise ValueError(f"num_kv_heads {kv_heads} does not divide num_heads {num_heads}")


def restrict_to_causal(mask: Mask, causal: bool) -> Mask:
    """The mask a layer of such a model runs: a causal one adds Causal() where no prefix says otherwise."""
    return mask & Causal() if causal and mask.prefix is None else mask
