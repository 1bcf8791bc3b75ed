"""The table of mixers that the contract test runs over: one row per mechanism or combination."""

import dataclasses
from collections.abc import Callable

import numpy as np

from attention_jax.masks import Causal, Full, Mask, Sinks, SlidingWindow
from attention_jax.mixers import AttentionConfig, CrossAttentionConfig, MixerConfig
from attention_jax.positions import RoPE
from tests.reference.attention import attention_mixer

D_MODEL = 32

ALIBI_4 = (0.25, 0.0625, 0.015625, 0.00390625)


@dataclasses.dataclass(frozen=True)
class MixerCase:
    """A mixer's config and its NumPy twin `reference(params, x_TD, keep_TS) -> y_TD`."""

    config: MixerConfig
    reference: Callable


def _softmax(mask: Mask = Causal(), alibi=None, **options) -> MixerCase:  # noqa: B008 (frozen)
    config = AttentionConfig(mask=mask, bias="alibi" if alibi else None, **options)
    names = ("rope", "qk_norm", "softcap", "scale")

    def reference(params, x, keep):
        return attention_mixer(
            params, x, heads=config.num_heads, kv_heads=config.num_kv_heads or config.num_heads, keep=keep,
            alibi=alibi, **{name: getattr(config, name) for name in names},
        )  # fmt: skip

    return MixerCase(config, reference)


MIXERS = {
    "mha": _softmax(),
    "gqa-rope": _softmax(num_kv_heads=2, rope=RoPE()),
    "mqa-rope-interleaved-partial": _softmax(num_kv_heads=1, rope=RoPE(width=4, layout="interleaved")),
    "alibi": _softmax(alibi=ALIBI_4, use_bias=True),
    "window": _softmax(SlidingWindow(5), rope=RoPE()),
    "window-1": _softmax(SlidingWindow(1)),
    "window-sinks": _softmax((SlidingWindow(4) | Sinks(2)) & Causal(), num_kv_heads=2, rope=RoPE(theta=99.0)),
    "all-but-window": _softmax(Causal() & ~SlidingWindow(3)),
    "qk-rms-softcap": _softmax(qk_norm="rms", softcap=2.0, rope=RoPE()),
    "qk-l2-scale-sinks": _softmax(qk_norm="l2", scale=0.7, sinks=True, num_kv_heads=2),
    "wide-heads": _softmax(num_heads=2, head_dim=24, rope=RoPE(width=16)),
}

TWO_SIDED = {
    "full": _softmax(Full(), rope=RoPE()),
    "window-both": _softmax(SlidingWindow(4, right=3)),
}


def cross_reference(params, x, memory, keep):
    return attention_mixer(params, x, memory, heads=4, kv_heads=2, keep=keep)


CROSS = CrossAttentionConfig(num_heads=4, num_kv_heads=2)


def dense(mask: Mask, T: int, S: int | None = None) -> np.ndarray:
    """The truth table of a mask as loops over `keep`, one pair at a time."""
    S = T if S is None else S
    return np.array([[bool(mask.keep(np.int64(q), np.int64(k))) for k in range(S)] for q in range(T)])
