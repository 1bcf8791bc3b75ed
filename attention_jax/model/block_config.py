"""Configuration of one layer: which mixer and feed-forward it has, and how they join the residual stream."""

from __future__ import annotations

import dataclasses
from typing import Literal

from attention_jax.choices import check_between, check_choices
from attention_jax.feed_forwards import DenseConfig, FeedForwardConfig
from attention_jax.mixers import MixerConfig, make_config
from attention_jax.positions import RoPE

NormOrder = Literal["pre", "post", "sandwich", "residual"]

_SCALES = ("mixer_scale", "feed_forward_scale", "mixer_residual_scale", "feed_forward_residual_scale")


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """A layer. With f the mixer, then the feed-forward, b the scale of the branch and r that of the residual:

    pre:       x <- r x + b f(norm(x))               post:      x <- r x + b norm(f(x))     (OLMo 2)
    sandwich:  x <- r x + b norm(f(norm(x)))         residual:  x <- r n + b f(n), n = norm(x)   (MiniMax-01)

    parallel:  x <- r x + b_1 mixer(norm(x)) + b_2 feed_forward(norm'(x))    (GPT-NeoX; GPT-J: norm' = norm)
    """

    __pydantic_config__ = {"extra": "forbid", "strict": True, "arbitrary_types_allowed": True}

    mixer: MixerConfig | None = make_config("softmax", rope=RoPE())  #: null: a layer of a feed-forward alone
    feed_forward: FeedForwardConfig | None = DenseConfig()  #: null: a layer of a mixer alone
    norm_order: NormOrder | None = None  #: where the norms are; null: model.norm_order
    parallel: bool = False  #: mixer and feed-forward both read the layer's input
    shared_norm: bool = False  #: parallel only: both read the same norm of it
    mixer_scale: float = 1.0  #: multiplies the mixer's output (residual_multiplier in Granite)
    feed_forward_scale: float = 1.0  #: multiplies the feed-forward's output
    mixer_residual_scale: float = 1.0  #: multiplies what the mixer's output is added to
    feed_forward_residual_scale: float = 1.0  #: multiplies what the feed-forward's output is added to

    def __post_init__(self):
        check_choices(self)
        for name, family in (("mixer", MixerConfig), ("feed_forward", FeedForwardConfig)):
            value = getattr(self, name)
            if value is not None and not isinstance(value, family):
                raise ValueError(
                    f"{name} must be the config of a {family.noun} or None, got {type(value).__name__}"
                )
        if self.mixer is None and self.feed_forward is None:
            raise ValueError("a layer needs a mixer or a feed_forward: both are null")
        for name in _SCALES:
            check_between(self, name, 1e-6, 1e6, "activations vanish or overflow otherwise", signed=True)
        if self.parallel:
            self._check_parallel()
        elif self.shared_norm:
            raise ValueError("shared_norm is true: only a parallel layer has one norm; set parallel to true")

    def _check_parallel(self) -> None:
        if self.mixer is None or self.feed_forward is None:
            raise ValueError("parallel is true: the layer needs both a mixer and a feed_forward")
        if self.norm_order not in (None, "pre"):
            raise ValueError(f"parallel is true: norm_order must be pre, got {self.norm_order}")
        if self.feed_forward_residual_scale != 1:
            raise ValueError(
                "parallel is true: there is one sum, scaled by mixer_residual_scale; remove "
                "feed_forward_residual_scale"
            )
