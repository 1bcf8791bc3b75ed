"""OLMo 2 and 3: norms behind mixer and feed-forward, and an RMS norm over all heads of queries and of
keys."""

from __future__ import annotations

from attention_jax.model import BlockConfig, ModelConfig
from attention_jax.pretrained.description import Description
from attention_jax.pretrained.families import llama
from attention_jax.pretrained.family import Family
from attention_jax.pretrained.rope import read_rope
from attention_jax.pretrained.table import Place, reshaped


def _of_heads(place: Place) -> tuple[int, int]:
    return -1, place.block.mixer.head_width(place.config.d_model)


#: The norms over all heads, which are stored flat.
QK_NORMS = tuple(
    reshaped(f"mixer/{x}_norm/scale", f"model.layers.{{i}}.self_attn.{x}_norm.weight", _of_heads)
    for x in "qk"
)
TABLE = (
    *llama.OUTER,
    *llama.norms_table(post_norm1="post_attention_layernorm", post_norm2="post_feedforward_layernorm"),
    *QK_NORMS,
    *llama.attention_table(),
    *llama.dense_table(),
)


def _olmo(d: Description, theta: float) -> ModelConfig:
    layers, size = d.layers(), d.integer("sliding_window", None)
    windows = (
        None
        if size is None
        else ["full_attention" if i % 4 == 3 else "sliding_attention" for i in range(layers)]
    )
    eps = float(d.number("rms_norm_eps", 1e-5))
    blocks = []
    for kind in llama.layer_types(d, layers, windows):
        rope = read_rope(d, llama.head_dim(d), layer_type=kind, theta=theta, scaled=kind == "full_attention")
        mixer = llama.attention(
            d,
            llama.window(d, kind, size),
            rope=rope,
            qk_norm="rms_all_heads",
            qk_norm_eps=eps,
            use_bias=d.flag("attention_bias", False),
        )
        blocks.append(BlockConfig(mixer, llama.gated(d)))
    return llama.model(d, blocks, norm_order="post", norm_eps=eps)


FAMILIES = (
    Family("OLMo 2", ("olmo2",), lambda d: _olmo(d, 1e4), TABLE),
    Family("OLMo 3", ("olmo3",), lambda d: _olmo(d, 5e5), TABLE),
)
