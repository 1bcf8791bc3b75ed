"""The interface of feed-forwards, which a layer applies to each token.

    y_BTD = feed_forward(x_BTD)                          y_BTD, aux = feed_forward.run(x_BTD, ctx=ctx)

A kind consists of a frozen `FeedForwardConfig` and a `FeedForward` whose `config_type` it is. Defining the
two classes registers the config's `kind`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax.choices import check_choices
from attention_jax.kinds import Built, Kind
from attention_jax.mixers import Context, Parts


class FeedForwardOutput(NamedTuple):
    """The output of a feed-forward. y: [B, T, D]. aux: the arrays named in `Context.capture`, by name."""

    y: jax.Array
    aux: dict[str, Any] = {}


@dataclasses.dataclass(frozen=True)
class FeedForwardConfig(Kind):
    """Base class of the configs of all feed-forwards, validated on construction.

    module: the `FeedForward` class, set when that class is defined.
    """

    noun: ClassVar[str] = "feed-forward"
    module: ClassVar[type[FeedForward]]

    kind: str = ""

    def __post_init__(self):
        check_choices(self)

    def hidden_width(self, d_model: int) -> int:
        """The hidden features that are computed for a token."""
        raise NotImplementedError

    def build(self, d_model: int, rngs: nnx.Rngs, **options: Any) -> FeedForward:
        """The feed-forward for a model of this width. options: dtype, use_bias, kernel_init and out_init."""
        return self.module(d_model, self, rngs=rngs, **options)


class FeedForward(Built, nnx.Module):
    """Base class of all feed-forwards. A subclass sets `config_type` and implements `setup` and `run`.

    Args:
      use_bias: whether projections have biases where the config leaves it to the model.
      dtype: dtype of the computation; parameters are float32.
      kernel_init, out_init: initialisers of the projections and of the last one, by default the same.
    """

    config_type: ClassVar[type[FeedForwardConfig]]

    def __init__(
        self,
        d_model: int,
        config: FeedForwardConfig | None = None,
        *,
        use_bias: bool = False,
        dtype: Any = jnp.float32,
        kernel_init: Any = nnx.initializers.lecun_normal(),  # noqa: B008 (frozen)
        out_init: Any = None,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        config = self.chosen_config(config, options)
        self.config, self.d_model, self.use_bias, self.dtype = config, d_model, use_bias, dtype
        self.setup(Parts(kernel_init, out_init or kernel_init, dtype, rngs))

    def setup(self, parts: Parts) -> None:
        """Create the parameters for `self.config` and `self.d_model`."""
        raise NotImplementedError

    def run(self, x_BTD: jax.Array, *, ctx: Context, cached: bool = False) -> FeedForwardOutput:
        """y and the arrays named in `ctx.capture`; what invalid slots give is unused.

        cached: the layer has a state, so that x need not be a whole row.
        """
        raise NotImplementedError

    def prepare(self, storage_dtype: Any) -> None:
        """Lay out in place, for decoding, what is no linear layer; see `model/prepared.py`."""

    def __call__(self, x_BTD: jax.Array, *, ctx: Context | None = None) -> jax.Array:
        """y [B, T, D]."""
        if ctx is not None:
            ctx.refuse_capture(type(self).__name__, "run")
        return self.run(x_BTD, ctx=ctx or Context()).y
