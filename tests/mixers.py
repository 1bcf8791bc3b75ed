"""The table of mixers that the contract test runs over: one row per mechanism or combination."""

import dataclasses
from collections.abc import Callable

import numpy as np

from attention_jax.biases import T5, ALiBiConfig
from attention_jax.masks import Causal, Full, Global, Longformer, Mask, Sinks, SlidingWindow
from attention_jax.mixers import (
    AttentionConfig,
    BasedConfig,
    CosformerConfig,
    CrossAttentionConfig,
    DeltaNetConfig,
    DifferentialAttentionConfig,
    ForgettingAttentionConfig,
    GatedAttentionConfig,
    GatedDeltaNetConfig,
    GLAConfig,
    HedgehogConfig,
    KDAConfig,
    LatentAttentionConfig,
    LightningConfig,
    LinearAttentionConfig,
    LinformerConfig,
    Mamba2Config,
    MixerConfig,
    NSAConfig,
    NystromformerConfig,
    PerformerConfig,
    RetentionConfig,
)
from attention_jax.positions import RoPE, Temperature, XPos, YaRN
from tests.reference import decayed, linear, lowrank, variants
from tests.reference.attention import attention_mixer
from tests.reference.delta_mixers import delta_mixer
from tests.reference.nsa import nsa_mixer

D_MODEL = 32

ALIBI_4 = (0.25, 0.0625, 0.015625, 0.00390625)


@dataclasses.dataclass(frozen=True)
class MixerCase:
    """A mixer config, its NumPy `reference(params, x_TD, keep_TS) -> y_TD`, and its implementations.

    impls: the implementation that is the default for rows of this length, then another one.
    slow: the config differs from another row by one option. `make test` checks it against its reference, and
      the slow tests check the rest of the contract.
    fast: the longer tests, by their names in LONGER, that `make test` runs for this row: one row per op, and
      rows with code of their own after it. The slow tests run them for the other rows.
    """

    config: MixerConfig
    reference: Callable
    impls: tuple[str, str] = ("reference", "chunked")
    slow: bool = False
    fast: tuple[str, ...] = ()

    def __post_init__(self):
        assert set(self.fast) <= LONGER, self.fast


# Gradients to future tokens, gradients at invalid slots, decoding 512 tokens: each compiles a program.
LONGER = {"future", "empty slots", "decoding"}


# The fields of a config that a reference of this family takes by the same names.
SCORES = ("rope", "temperature", "qk_norm", "qk_norm_eps", "clip_qkv", "softcap", "scale")


def _softmax(mask: Mask = Causal(), alibi=None, t5=None, slow=False, fast=(), **options) -> MixerCase:  # noqa: B008 (frozen)
    config = AttentionConfig(mask=mask, **({"bias": "alibi" if alibi else t5} | options))
    rows = config.global_positions if config.global_projections else ()
    if t5 is not None:
        t5 = {"buckets": t5.buckets, "max_distance": t5.max_distance, "bidirectional": mask == Full()}

    def reference(params, x, keep):
        return attention_mixer(
            params, x, heads=config.num_heads, kv_heads=config.num_kv_heads or config.num_heads, keep=keep,
            alibi=alibi, t5=t5, rows=rows, **{name: getattr(config, name) for name in SCORES},
        )  # fmt: skip

    return MixerCase(config, reference, slow=slow, fast=fast)


MIXERS = {
    "mha": _softmax(slow=True),
    "gqa-rope": _softmax(num_kv_heads=2, rope=RoPE(), fast=("empty slots",)),
    "mqa-rope-interleaved-partial": _softmax(
        num_kv_heads=1, rope=RoPE(width=4, layout="interleaved"), slow=True
    ),
    "alibi": _softmax(alibi=ALIBI_4, use_bias=True),
    "window": _softmax(SlidingWindow(5), rope=RoPE()),
    "window-1": _softmax(SlidingWindow(1), slow=True),
    "window-sinks": _softmax(
        (SlidingWindow(4) | Sinks(2)) & Causal(), num_kv_heads=2, rope=RoPE(theta=99.0), fast=("future",)
    ),
    "all-but-window": _softmax(Causal() & ~SlidingWindow(3), slow=True),
    "qk-rms-softcap": _softmax(qk_norm="rms", softcap=2.0, rope=RoPE(), slow=True),
    "qk-l2-scale-sinks": _softmax(
        qk_norm="l2", scale=0.7, sink_logits=True, num_kv_heads=2, fast=("empty slots",)
    ),
    "wide-heads": _softmax(num_heads=2, head_dim=24, value_dim=10, rope=RoPE(width=16), slow=True),
    "yarn-temperature": _softmax(
        rope=RoPE(50.0, scaling=YaRN(factor=4.0, original_length=64, beta_fast=10.0, truncate=False)),
        temperature=Temperature(floor=4, scale=0.5),
    ),
    "xpos": _softmax(rope=RoPE(xpos=XPos(scale_base=16.0, centre=5))),
    "t5-gqa": _softmax(t5=T5(buckets=8, max_distance=14), num_kv_heads=2),
    "qk-layer-clipped-qkv-bias": _softmax(
        qk_norm="layer", qk_norm_eps=0.05, clip_qkv=0.8, use_bias=True, out_bias=False, rope=RoPE(), slow=True
    ),
    "qk-layer-per-head": _softmax(
        qk_norm="layer_per_head", qk_norm_eps=0.05, num_kv_heads=2, rope=RoPE(), slow=True
    ),
    "qk-all-heads-steeper-alibi": _softmax(
        qk_norm="rms_all_heads",
        num_kv_heads=2,
        qk_norm_eps=0.05,
        slow=True,
        alibi=[0.3 * 2 ** (-5.0 * n / 4) for n in (1, 2, 3, 4)],
        bias=ALiBiConfig(scale=0.3, max_exponent=5.0),
    ),
    "longformer-global-projections": _softmax(
        (SlidingWindow(4) | Global((0, 9))) & Causal(),
        num_kv_heads=2,
        global_projections=True,
        rope=RoPE(),
        qk_norm="rms",
        use_bias=True,
        slow=True,
    ),
}


def _variant(formula: Callable, config: MixerConfig, *names: str, slow=False, fast=(), **given) -> MixerCase:
    """A row whose reference takes the config fields of these names."""
    options = {name: getattr(config, name) for name in names} | given
    return MixerCase(
        config, lambda params, x, keep: formula(params, x, keep, heads=config.num_heads, **options),
        slow=slow, fast=fast,
    )  # fmt: skip


FORGETTING = ("output_gate", "output_norm", "norm_eps", *SCORES)
LATENT = ("head_dim", "rotary_dim", "rope", "norm_eps", "softcap", "scale")

MIXERS |= {
    "gated": _variant(
        variants.gated,
        GatedAttentionConfig(
            num_kv_heads=2, rope=RoPE(), mask=Causal(), qk_norm="rms_per_head", qk_norm_eps=0.05, scale=0.7,
            softcap=2.0, sink_logits=True, temperature=Temperature(floor=4, scale=0.5), use_bias=True,
            out_bias=False, bias=ALiBiConfig(scale=0.5), value_dim=6,
        ),
        "gate", *SCORES, kv_heads=2, alibi=[0.5 * slope for slope in ALIBI_4], fast=("empty slots",),
    ),
    "gated-plain": _variant(
        variants.gated, GatedAttentionConfig(mask=Causal()), "gate", *SCORES, kv_heads=4, slow=True
    ),
    "gated-headwise-window": _variant(
        variants.gated,
        GatedAttentionConfig(gate="headwise", qk_norm="rms", mask=SlidingWindow(5), use_bias=True),
        "gate", *SCORES, kv_heads=4, slow=True,
    ),
    "forgetting": _variant(
        variants.forgetting,
        ForgettingAttentionConfig(
            num_kv_heads=2, mask=Causal(), gate_bias=1.0, qk_norm="rms_per_head", qk_norm_eps=0.05,
            output_gate="sigmoid", output_norm="rms_per_head", norm_eps=0.05, sink_logits=True, softcap=2.0,
        ),
        *FORGETTING, kv_heads=2, fast=("future", "empty slots"),
    ),
    "forgetting-plain": _variant(
        variants.forgetting, ForgettingAttentionConfig(mask=Causal()), *FORGETTING, kv_heads=4, slow=True
    ),
    "forgetting-window": _variant(
        variants.forgetting,
        ForgettingAttentionConfig(
            mask=SlidingWindow(6), output_gate="silu", use_bias=True, rope=RoPE(), scale=0.7, clip_qkv=0.9,
            temperature=Temperature(floor=4, scale=0.5), output_norm="rms",
        ),
        *FORGETTING, kv_heads=4, slow=True,
    ),
    "differential": _variant(
        variants.differential,
        DifferentialAttentionConfig(
            num_heads=4, num_kv_heads=2, rope=RoPE(), mask=Causal(), qk_norm="rms", qk_norm_eps=0.05,
            norm_eps=0.05, scale=0.7, softcap=2.0, sink_logits=True,
        ),
        "lambda_init", "norm_eps", *SCORES, kv_heads=2, fast=("empty slots",),
    ),
    "differential-plain": _variant(
        variants.differential, DifferentialAttentionConfig(mask=Causal()), "lambda_init", "norm_eps", *SCORES,
        kv_heads=2, slow=True,
    ),
    "differential-clipped": _variant(
        variants.differential,
        DifferentialAttentionConfig(
            mask=Causal(), clip_qkv=0.7, use_bias=True, out_bias=False, qk_norm="layer",
            temperature=Temperature(floor=4, scale=0.5),
        ),
        "lambda_init", "norm_eps", *SCORES, kv_heads=2, slow=True,
    ),
    "mla": _variant(
        variants.latent,
        LatentAttentionConfig(
            latent_dim=12, head_dim=8, rotary_dim=4, value_dim=6, mask=Causal(), use_bias=True, norm_eps=0.05,
            softcap=2.0, scale=0.4,
        ),
        *LATENT, fast=("future", "empty slots"),
    ),
    "mla-window-query-latent": _variant(
        variants.latent,
        LatentAttentionConfig(
            latent_dim=10, query_latent_dim=9, head_dim=6, rotary_dim=0, mask=SlidingWindow(5)
        ),
        *LATENT, slow=True,
    ),
    "mla-no-rotation": _variant(
        variants.latent,
        LatentAttentionConfig(
            latent_dim=10, query_latent_dim=9, head_dim=6, rotary_dim=4, rope=None, mask=Causal(),
            norm_eps=0.05, use_bias=True, out_bias=False,
        ),
        *LATENT, slow=True,
    ),
}  # fmt: skip


def nsa_reference(config: NSAConfig, params, x_TD, **options) -> np.ndarray:
    """The NumPy reference of an NSA config; it is always causal."""
    names = ("rope", "compress_block", "compress_stride", "select_block", "select_count", "window")
    given = {name: getattr(config, name) for name in names} | options
    kv_heads = config.num_kv_heads or config.num_heads
    return nsa_mixer(params, x_TD, heads=config.num_heads, kv_heads=kv_heads, **given)


def _nsa(slow=False, fast=(), **options) -> MixerCase:
    config = NSAConfig(**options)
    return MixerCase(config, lambda params, x, keep: nsa_reference(config, params, x), slow=slow, fast=fast)


MIXERS |= {
    "nsa-rope": _nsa(
        num_kv_heads=2, rope=RoPE(), compress_block=4, compress_stride=2, select_block=4, select_count=4,
        window=5, fast=("future",),
    ),
    # Compressed blocks longer than selected ones, a stretch of one token, many blocks to choose among.
    "nsa-fine": _nsa(
        num_kv_heads=1, compress_block=3, compress_stride=1, compress_width=7, select_block=2,
        select_count=5, window=3, use_bias=True, slow=True,
    ),
}  # fmt: skip


def _decayed(formula: Callable, config: MixerConfig, *names: str, slow=False, fast=(), **given) -> MixerCase:
    """A row of a recurrence with decay, always causal; its reference takes the config fields named."""
    options = {name: getattr(config, name) for name in names} | given
    return MixerCase(
        config, lambda params, x, keep: formula(params, x, **options), ("chunked", "recurrent"), slow, fast
    )


MIXERS |= {
    "retention": _decayed(
        decayed.retention, RetentionConfig(norm_eps=0.05), "rope", "norm_eps", heads=4
    ),
    "retention-rms": _decayed(
        decayed.retention, RetentionConfig(norm="rms", norm_eps=0.05), "rope", "norm", "norm_eps", heads=4,
        slow=True,
    ),
    "retention-range": _decayed(
        decayed.retention,
        RetentionConfig(num_heads=2, head_dim=6, value_dim=5, rope=None, first_exponent=0.5, last_exponent=3,
                        use_bias=True),
        "first_exponent", "last_exponent", "norm_eps", heads=2, slow=True,
    ),
    "gla": _decayed(decayed.gla, GLAConfig(norm_eps=0.05), "norm_eps", heads=4, tau=16.0),
    "gla-fast": _decayed(
        decayed.gla,
        GLAConfig(num_heads=2, head_dim=5, value_dim=7, decay_rank=3, decay_temperature=0.5, use_bias=True,
                  out_bias=False),
        "norm_eps", heads=2, tau=0.5, slow=True,
    ),
    "lightning": _decayed(decayed.lightning, LightningConfig(norm_eps=0.05), "norm_eps", slopes=ALIBI_4),
    "lightning-rope": _decayed(
        decayed.lightning,
        LightningConfig(head_dim=6, rope=RoPE(), slope_factor=2.0, use_bias=True, out_bias=False),
        "rope", "norm_eps", slopes=[2 * slope for slope in ALIBI_4], slow=True,
    ),
    "mamba2": _decayed(
        decayed.mamba2, Mamba2Config(head_dim=16, state_dim=8, norm_eps=0.05), "groups", "norm_eps", heads=4,
        fast=("future", "decoding"),
    ),
    # Groups of two heads, other widths, steps held between limits.
    "mamba2-groups": _decayed(
        decayed.mamba2,
        Mamba2Config(expand=3, head_dim=24, state_dim=5, groups=2, convolution=3, dt_limit_low=0.4,
                     dt_limit_high=0.9, use_bias=True, out_bias=False, convolution_bias=False),
        "groups", "norm_eps", heads=4, limits=(0.4, 0.9), slow=True,
    ),
}  # fmt: skip


def _delta(config: MixerConfig, slow=False, fast=()) -> MixerCase:
    """A row of a delta rule, always causal."""
    options = {
        "kind": config.kind, "heads": config.num_heads, "largest_beta": 1 + config.negative_eigenvalues,
        "qk_heads": getattr(config, "num_qk_heads", None) or config.num_heads,
        "qk_norm_eps": config.qk_norm_eps, "norm_eps": config.norm_eps,
    }  # fmt: skip
    return MixerCase(
        config,
        lambda params, x, keep: delta_mixer(params, x, **options),
        ("chunked", "recurrent"),
        slow,
        fast,
    )


MIXERS |= {
    "deltanet": _delta(DeltaNetConfig(chunk_size=8, qk_norm_eps=0.05, norm_eps=0.02)),
    "deltanet-negative": _delta(
        DeltaNetConfig(num_heads=2, head_dim=6, value_dim=5, convolution=2, negative_eigenvalues=True),
        slow=True,
    ),
    "gated-deltanet": _delta(
        GatedDeltaNetConfig(chunk_size=8, qk_norm_eps=0.05, norm_eps=0.02), fast=("future", "decoding")
    ),
    "gated-deltanet-shared-keys": _delta(
        GatedDeltaNetConfig(num_qk_heads=2, head_dim=6, value_dim=5, negative_eigenvalues=True), slow=True
    ),
    "kda": _delta(KDAConfig(chunk_size=8, gate_bias=False, qk_norm_eps=0.05, norm_eps=0.02)),
    "kda-low-rank": _delta(KDAConfig(num_heads=2, head_dim=6, value_dim=5, rank=3, convolution=3), slow=True),
}


def _linear(
    formula: Callable, config: MixerConfig, *names: str, causal: bool = True, slow=False, fast=()
) -> MixerCase:
    """A row of the linear attention family; its reference needs no mask."""
    options = {name: getattr(config, name) for name in (*names, "norm_eps", "normalizer_eps")}
    options |= {"heads": config.num_heads, "kv_heads": config.num_kv_heads or config.num_heads}
    return MixerCase(
        config, lambda params, x, keep: formula(params, x, causal=causal, **options),
        ("chunked", "recurrent"), slow, fast,
    )  # fmt: skip


MIXERS |= {
    "linear": _linear(linear.linear, LinearAttentionConfig(num_kv_heads=2, chunk_size=4), slow=True),
    "linear-rope": _linear(
        linear.linear,
        LinearAttentionConfig(
            num_kv_heads=2, rope=RoPE(theta=99.0), use_bias=True, out_bias=False, chunk_size=8,
            normalizer_eps=0.3,
        ),
        "rope",
    ),
    "linear-identity-norm": _linear(
        linear.linear,
        LinearAttentionConfig(
            feature_map="identity", output_norm="rms", norm_eps=0.05, rope=RoPE(), chunk_size=8
        ),
        "feature_map", "rope",
    ),
    "performer": _linear(
        linear.performer, PerformerConfig(num_kv_heads=2, num_features=24, chunk_size=8, use_bias=True),
        fast=("future", "decoding"),
    ),
    "cosformer": _linear(linear.cosformer, CosformerConfig(horizon=20, chunk_size=8), "horizon"),
    "based": _linear(
        linear.based, BasedConfig(feature_dim=5, num_kv_heads=2, chunk_size=8, normalizer_eps=0.3)
    ),
    "hedgehog": _linear(
        linear.hedgehog, HedgehogConfig(num_kv_heads=1, chunk_size=8, map_bias=True)
    ),
}  # fmt: skip

BIDIRECTIONAL = {
    "full": _softmax(Full(), rope=RoPE()),
    "window-both": _softmax(SlidingWindow(4, right=3)),
    "global-projections-both": _softmax(Longformer(4, (0, 9)), num_kv_heads=2, global_projections=True),
    "t5-both": _softmax(Full(), t5=T5(buckets=8, max_distance=14)),
    "linear-both": _linear(
        linear.linear, LinearAttentionConfig(rope=RoPE(), normalizer_eps=0.3), "rope", causal=False
    ),
    "linear-identity-both": _linear(
        linear.linear, LinearAttentionConfig(feature_map="identity"), "feature_map", causal=False
    ),
    "performer-both": _linear(
        linear.performer, PerformerConfig(num_kv_heads=2, num_features=24), causal=False
    ),
    "cosformer-both": _linear(linear.cosformer, CosformerConfig(horizon=20), "horizon", causal=False),
    "based-both": _linear(linear.based, BasedConfig(feature_dim=5, normalizer_eps=0.3), causal=False),
    "hedgehog-both": _linear(linear.hedgehog, HedgehogConfig(num_kv_heads=2), causal=False),
}


def cross_reference(params, x, memory, keep):
    return attention_mixer(params, x, memory, heads=4, kv_heads=2, keep=keep, rope=CROSS.rope)


CROSS = CrossAttentionConfig(num_heads=4, num_kv_heads=2, rope=RoPE(xpos=XPos(scale_base=16.0)))


def mask_of(config: MixerConfig) -> Mask:
    """The mask of a mixer in a causal model; Causal() for a mixer without a mask."""
    return getattr(config, "mask", Causal())


def dense(mask: Mask, T: int, S: int | None = None) -> np.ndarray:
    """The boolean array of a mask, by loops over `keep`, one pair at a time."""
    S = T if S is None else S
    return np.array([[bool(mask.keep(np.int64(q), np.int64(k))) for k in range(S)] for q in range(T)])


def _bidirectional(formula: Callable, config: MixerConfig, *names: str, slow=False) -> MixerCase:
    """A row whose reference takes (params, x of valid tokens) and the config fields of these names."""
    options = {name: getattr(config, name) for name in names}
    return MixerCase(
        config, lambda params, x: formula(params, x, heads=config.num_heads, **options), slow=slow
    )


# Never causal: tests/test_lowrank.py is their contract.
BIDIRECTIONAL_ONLY = {
    f"linformer-{sharing}": _bidirectional(
        lowrank.linformer,
        LinformerConfig(length=24, projected_length=6, sharing=sharing, use_bias=sharing == "kv"),
        "sharing", slow=sharing != "head",
    )
    for sharing in ("none", "head", "kv")
} | {
    "nystromformer": _bidirectional(
        lowrank.nystromformer, NystromformerConfig(landmarks=6, conv_width=5),
        "landmarks", "iterations", "conv_width",
    ),
    "nystromformer-plain": _bidirectional(
        lowrank.nystromformer, NystromformerConfig(landmarks=4, conv_width=None, head_dim=12, use_bias=True),
        "landmarks", "iterations", "conv_width", slow=True,
    ),
}  # fmt: skip
