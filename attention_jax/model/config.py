"""Configuration of language models: frozen dataclasses, validated on construction.

The text after a field's `#:` documents it, and `python -m train --help` prints it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax

from attention_jax.choices import check_between, check_choices, check_dropout, check_epsilon
from attention_jax.hints import hint
from attention_jax.layers import FeedForwardKind, is_gated
from attention_jax.masks import Full
from attention_jax.mixers import MixerConfig, make_config
from attention_jax.positions import RoPE

_DEFAULT_MIXERS = (make_config("softmax", rope=RoPE()),)
_MOST_LAYERS = 10_000  # each is traced, and has a state of its own in decoding
_MOST_WIDTH = 2**24
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
class EncoderConfig:
    """Bidirectional layers over the same token embedding; their output is the memory of `cross` mixers."""

    __pydantic_config__ = {"extra": "forbid", "strict": True, "arbitrary_types_allowed": True}

    num_layers: int = 2  #: number of encoder layers
    mixers: tuple[MixerConfig, ...] = _DEFAULT_MIXERS  #: mixer configs, tiled over the encoder layers

    def __post_init__(self):
        _check_sequence(self)
        _check_layers(self.num_layers)
        _check_period(self.mixers, self.num_layers)
        for index, mixer in enumerate(self.mixers):
            if mixer.reads_memory:
                raise ValueError(
                    f"mixers.{index}: kind {mixer.kind} is not allowed in an encoder, which has no memory"
                )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A language model; `causal=True` without an encoder is a decoder-only model."""

    __pydantic_config__ = {"extra": "forbid", "strict": True, "arbitrary_types_allowed": True}

    vocab_size: int | None = None  #: token ids (V); null in a training config: the tokenizer's
    d_model: int = 128  #: width of the residual stream (D)
    num_layers: int = 4  #: layers (L)
    mixers: tuple[MixerConfig, ...] = _DEFAULT_MIXERS  #: mixer configs, tiled over the layers
    #: feed-forward kind; _tanh: the tanh approximation of GELU, which GPT-2, Gemma and Phi have
    mlp: FeedForwardKind = "swiglu"
    #: feed-forward width (F); null: 4 d_model (without a gate) or 8/3 d_model rounded to a multiple of 8 (with)
    mlp_width: int | None = None
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"  #: norm of the layers and before the output projection
    #: where a layer has norms, with f a mixer or an mlp; pre: x + f(norm(x)); post: x + norm(f(x)), as OLMo 2;
    #: sandwich: x + norm(f(norm(x))), as Gemma 2
    norm_order: Literal["pre", "post", "sandwich"] = "pre"
    norm_eps: float = (
        1e-5  #: added to the variance by these norms; those inside a mixer have options of their own
    )
    use_bias: bool = False  #: biases in mlp and layernorm (mixers have their own option)
    tie_embeddings: bool = True  #: use the transposed token embedding as the output projection
    #: multiplies the token embedding, sqrt(d_model) in Gemma; null: 1, or sqrt(d_model) if sinusoidal
    embedding_scale: float | None = None
    max_positions: int | None = None  #: rows of a learned absolute position embedding; null: none
    #: add sines and cosines of the position to the scaled token embedding; any length
    sinusoidal: bool = False
    dropout: float = 0.0  #: dropout rate of the embeddings and of each residual branch
    logit_softcap: float | None = None  #: cap c: replaces a logit x by c tanh(x / c); null: off
    init_std: float = (
        0.02  #: standard deviation of embeddings and projections; residual projections: divided by sqrt(2 L)
    )
    causal: bool = True  #: intersect every mask with Causal(); false: a bidirectional model
    encoder: EncoderConfig | None = (
        None  #: encoder of a source text that `cross` mixers attend to; null: none
    )
    #: apply the layers by `lax.scan`, which compiles faster; false: unrolled, which runs faster on a CPU
    scan_layers: bool = False
    #: rematerialisation policy of each layer, a name in jax.checkpoint_policies; null: no rematerialisation
    remat: str | None = None
    dtype: Literal["float32", "bfloat16"] = (
        "float32"  #: dtype of the computation; parameters and logits are float32
    )

    def __post_init__(self):
        _check_sequence(self)
        for name in ("d_model", "vocab_size", "mlp_width", "max_positions"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if self.d_model > _MOST_WIDTH:
            raise ValueError(f"d_model must be <= {_MOST_WIDTH}, got {self.d_model}: lower it")
        _check_layers(self.num_layers)
        self._check_numbers()
        _check_period(self.mixers, self.num_layers)
        if self.sinusoidal and self.max_positions is not None:
            raise ValueError(
                f"sinusoidal and max_positions {self.max_positions} both add positions: set only one"
            )
        if self.sinusoidal and self.d_model % 2:
            raise ValueError(f"sinusoidal positions need an even d_model, got {self.d_model}")
        if self.remat is not None and self.remat not in _CHECKPOINT_POLICIES:
            known = ", ".join(_CHECKPOINT_POLICIES)
            more = hint("remat", self.remat, _CHECKPOINT_POLICIES)
            raise ValueError(f"remat: unknown policy {self.remat!r}; choose from {known}{more}")
        _check_mixers(self.mixers, self.d_model, self.causal, "mixers")
        if self.encoder is not None:
            _check_mixers(self.encoder.mixers, self.d_model, False, "encoder.mixers")
            if not any(mixer.reads_memory for mixer in self.mixers):
                raise ValueError("encoder: no mixer attends to it; add a mixer of kind cross to mixers")

    def _check_numbers(self) -> None:
        check_dropout(self.dropout)
        check_epsilon(self, "norm_eps")
        check_between(self, "embedding_scale", 1e-3, 1e6, "embeddings vanish or overflow otherwise")
        check_between(self, "init_std", 1e-6, 10, "the first gradients vanish or overflow otherwise")
        check_between(
            self, "logit_softcap", 0.1, 1e6, "less caps every logit at almost 0, and null turns it off"
        )

    @property
    def hidden_width(self) -> int:
        """The feed-forward width F."""
        if self.mlp_width is not None:
            return self.mlp_width
        return 8 * round(self.d_model / 3) if is_gated(self.mlp) else 4 * self.d_model

    @property
    def prefix(self) -> int:
        """The length of the bidirectional prefix: the longest `Prefix` of the mixers' masks, or 0."""
        return max(getattr(mixer, "mask", Full()).prefix or 0 for mixer in self.mixers)

    @property
    def limit(self) -> tuple[int, str] | None:
        """The maximum tokens per document and the option that sets it; None if there is no limit."""
        limits = [
            (mixer.horizon, f"mixers.{index}.{mixer.horizon_key}")
            for index, mixer in enumerate(self.mixers)
            if mixer.horizon is not None
        ]
        if self.max_positions is not None:
            limits.append((self.max_positions, "max_positions"))
        return min(limits, default=None)


def _check_sequence(config: Any) -> None:
    """Store `mixers` as a tuple, with all fields of the type that they are declared with."""
    if isinstance(config.mixers, MixerConfig):
        raise ValueError(
            f"mixers must be a sequence of configs, got one {type(config.mixers).__name__}: put it in a tuple"
        )
    object.__setattr__(config, "mixers", tuple(config.mixers))
    check_choices(config)


def _check_mixers(mixers: tuple[MixerConfig, ...], d_model: int, causal: bool, name: str) -> None:
    for index, mixer in enumerate(mixers):
        if not isinstance(mixer, MixerConfig):
            raise ValueError(
                f"{name}.{index} must be the config of a mixer, such as make_config('softmax'), got {mixer!r}"
            )
        try:
            mixer.check(d_model, causal=causal)
        except ValueError as error:
            raise ValueError(f"{name}.{index}: {error}") from None


def _check_layers(num_layers: int) -> None:
    if not 1 <= num_layers <= _MOST_LAYERS:
        limit = ">= 1" if num_layers < 1 else f"<= {_MOST_LAYERS}"
        raise ValueError(f"num_layers must be {limit}, got {num_layers}")


def _check_period(mixers: tuple[MixerConfig, ...], num_layers: int) -> None:
    if not 1 <= len(mixers) <= num_layers:
        raise ValueError(f"mixers: {len(mixers)} given for {num_layers} layers; give from 1 to {num_layers}")
