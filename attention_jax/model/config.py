"""Configuration of language models: frozen dataclasses, validated on construction.

The text after a field's `#:` documents it, and `python -m train --help` prints it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax

from attention_jax.choices import check_between, check_choices, check_dropout, check_epsilon
from attention_jax.dtypes import check_dtype
from attention_jax.feed_forwards import DenseConfig, FeedForwardWord
from attention_jax.hints import hint
from attention_jax.masks import Full
from attention_jax.mixers import MixerConfig
from attention_jax.model.block_config import BlockConfig, NormOrder

_DEFAULT_MIXERS = (BlockConfig.mixer,)
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
    #: a dense feed-forward; _tanh: the tanh approximation of GELU, which GPT-2, Gemma and Phi have
    mlp: FeedForwardWord = "swiglu"
    #: feed-forward width (F); null: 4 d_model (without a gate) or 8/3 d_model rounded to a multiple of 8 (with)
    mlp_width: int | None = None
    #: layers in full, tiled over the layers; null: one layer per entry of `mixers`, each with the same `mlp`
    blocks: tuple[BlockConfig, ...] | None = None
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"  #: norm of the layers and before the output projection
    #: where a layer has norms, with f a mixer or an mlp; pre: x + f(norm(x)); post: x + norm(f(x)), as OLMo 2;
    #: sandwich: x + norm(f(norm(x))), as Gemma 2; residual: n + f(n) with n = norm(x), as MiniMax-01
    norm_order: NormOrder = "pre"
    #: added to the learned scale of these norms, which then starts at 1 - norm_offset; 1 in Gemma and Qwen3-Next
    norm_offset: float = 0.0
    norm_bias: bool | None = None  #: biases of layernorm; null: use_bias
    norm_eps: float = (
        1e-5  #: added to the variance by these norms; those inside a mixer have options of their own
    )
    use_bias: bool = False  #: biases in feed-forwards and layernorm (mixers have their own option)
    embedding_norm: bool = False  #: a norm after the embedding, as in BLOOM
    head_bias: bool = False  #: a bias of the output projection, as in GPT-J; not with tie_embeddings
    tie_embeddings: bool = True  #: use the transposed token embedding as the output projection
    #: multiplies the token embedding, sqrt(d_model) in Gemma; null: 1, or sqrt(d_model) if sinusoidal
    embedding_scale: float | None = None
    max_positions: int | None = None  #: rows of a learned absolute position embedding; null: none
    #: add sines and cosines of the position to the scaled token embedding; any length
    sinusoidal: bool = False
    dropout: float = 0.0  #: dropout rate of the embeddings and of each residual branch
    embedding_dropout: float | None = None  #: dropout rate of the embeddings; null: dropout
    logit_scale: float | None = None  #: multiplies the logits, before logit_softcap; null: 1
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
    #: dtype of the computation; parameters and logits are float32. float64, also of the logits, is for checks of
    #: exactness; it needs jax_enable_x64 and runs no kernel
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"

    def __post_init__(self):
        check_dtype(self.dtype)
        _check_sequence(self)
        for name in ("d_model", "vocab_size", "mlp_width", "max_positions"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if self.d_model > _MOST_WIDTH:
            raise ValueError(f"d_model must be <= {_MOST_WIDTH}, got {self.d_model}: lower it")
        _check_layers(self.num_layers)
        self._check_numbers()
        self._check_blocks()
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
        if self.head_bias and self.tie_embeddings:
            raise ValueError(
                "head_bias is true: a tied output projection has no bias; set tie_embeddings to false"
            )
        for key, mixer in self.named_mixers:
            _check_mixer(mixer, self.d_model, self.causal, key)
        if self.encoder is not None:
            for index, mixer in enumerate(self.encoder.mixers):
                _check_mixer(mixer, self.d_model, False, f"encoder.mixers.{index}")
            if not any(mixer.reads_memory for _, mixer in self.named_mixers):
                raise ValueError("encoder: no mixer attends to it; add a mixer of kind cross to mixers")

    def _check_blocks(self) -> None:
        """Store `blocks` as a tuple, and refuse the short form beside it."""
        if self.blocks is None:
            return _check_period(self.mixers, self.num_layers)
        if isinstance(self.blocks, BlockConfig):
            raise ValueError("blocks must be a sequence of BlockConfigs, got one: put it in a tuple")
        object.__setattr__(self, "blocks", tuple(self.blocks))
        for index, block in enumerate(self.blocks):
            if not isinstance(block, BlockConfig):
                raise ValueError(f"blocks.{index} must be a BlockConfig, got {type(block).__name__}")
            if block.parallel and block.norm_order is None and self.norm_order != "pre":
                raise ValueError(
                    f"blocks.{index} is parallel, whose norm_order is pre, but the model's is {self.norm_order}"
                )
        _check_period(self.blocks, self.num_layers, "blocks")
        if self.mixers != _DEFAULT_MIXERS:
            raise ValueError("blocks and mixers are both set: mixers is the short form; move it into blocks")
        if self.encoder is None and (self.mlp, self.mlp_width) != (ModelConfig.mlp, ModelConfig.mlp_width):
            raise ValueError("blocks and mlp are both set: give each block its feed_forward")
        if not self.named_mixers:
            raise ValueError("blocks: no layer has a mixer; a model of feed-forwards alone reads one token")

    def _check_numbers(self) -> None:
        check_dropout(self.dropout)
        if self.embedding_dropout is not None:
            check_dropout(self.embedding_dropout, "embedding_dropout")
        check_epsilon(self, "norm_eps")
        check_between(self, "embedding_scale", 1e-3, 1e6, "embeddings vanish or overflow otherwise")
        check_between(self, "norm_offset", 1e-3, 10, "1 is usual, and 0 turns it off", zero=True)
        check_between(self, "logit_scale", 1e-6, 1e6, "logits vanish or overflow otherwise", signed=True)
        check_between(self, "init_std", 1e-6, 10, "the first gradients vanish or overflow otherwise")
        check_between(
            self, "logit_softcap", 0.1, 1e6, "less caps every logit at almost 0, and null turns it off"
        )

    @property
    def period(self) -> tuple[BlockConfig, ...]:
        """The layers that are tiled: layer i is period[i % len(period)]. No `norm_order` is None."""
        blocks = self.blocks
        if blocks is None:
            blocks = tuple(BlockConfig(mixer, self.feed_forward) for mixer in self.mixers)
        return tuple(
            dataclasses.replace(block, norm_order=self.norm_order) if block.norm_order is None else block
            for block in blocks
        )

    @property
    def encoder_period(self) -> tuple[BlockConfig, ...]:
        """The layers that are tiled over the encoder's."""
        mixers = () if self.encoder is None else self.encoder.mixers
        return tuple(BlockConfig(mixer, self.feed_forward, self.norm_order) for mixer in mixers)

    @property
    def feed_forward(self) -> DenseConfig:
        """The dense feed-forward that `mlp` and `mlp_width` describe: of every layer without `blocks`."""
        return DenseConfig.of_word(self.mlp, self.mlp_width)

    @property
    def hidden_width(self) -> int:
        """The hidden features that the widest feed-forward of a layer computes for a token; 0 without one."""
        widths = (
            b.feed_forward.hidden_width(self.d_model) for b in self.period if b.feed_forward is not None
        )
        return max(widths, default=0)

    @property
    def named_mixers(self) -> tuple[tuple[str, MixerConfig], ...]:
        """The mixers of the period, each behind its key, such as mixers.0 or blocks.0.mixer."""
        if self.blocks is None:
            return tuple((f"mixers.{index}", mixer) for index, mixer in enumerate(self.mixers))
        return tuple(
            (f"blocks.{index}.mixer", block.mixer)
            for index, block in enumerate(self.blocks)
            if block.mixer is not None
        )

    @property
    def prefix(self) -> int:
        """The length of the bidirectional prefix: the longest `Prefix` of the mixers' masks, or 0."""
        return max(getattr(mixer, "mask", Full()).prefix or 0 for _, mixer in self.named_mixers)

    @property
    def limit(self) -> tuple[int, str] | None:
        """The maximum tokens per document and the option that sets it; None if there is no limit."""
        limits = [
            (mixer.horizon, f"{key}.{mixer.horizon_key}")
            for key, mixer in self.named_mixers
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


def _check_mixer(mixer: MixerConfig, d_model: int, causal: bool, key: str) -> None:
    if not isinstance(mixer, MixerConfig):
        raise ValueError(
            f"{key} must be the config of a mixer, such as make_config('softmax'), got {mixer!r}"
        )
    try:
        mixer.check(d_model, causal=causal)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def _check_layers(num_layers: int) -> None:
    if not 1 <= num_layers <= _MOST_LAYERS:
        limit = ">= 1" if num_layers < 1 else f"<= {_MOST_LAYERS}"
        raise ValueError(f"num_layers must be {limit}, got {num_layers}")


def _check_period(period: tuple[Any, ...], num_layers: int, key: str = "mixers") -> None:
    if not 1 <= len(period) <= num_layers:
        raise ValueError(f"{key}: {len(period)} given for {num_layers} layers; give from 1 to {num_layers}")
