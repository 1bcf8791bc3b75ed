"""Softmax attention of published models: transformers' modules and our configs of the same functions."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from attention_jax.biases import T5, ALiBiConfig
from attention_jax.masks import Causal, Chunked, Full, Longformer, SlidingWindow
from attention_jax.mixers import (
    AttentionConfig,
    DifferentialAttentionConfig,
    GatedAttentionConfig,
    LatentAttentionConfig,
    NystromformerConfig,
)
from attention_jax.mixers.differential import lambda_of_depth
from attention_jax.positions import LinearScaling, Llama3, RoPE, Temperature, YaRN
from tests.parity.ours import SINK_LOGITS, SINK_LOGITS_PATH
from tests.parity.peers import B, D, Peer, T, causal_mask

N, K, H = 4, 2, 12
POSITIONS = torch.arange(T)[None]
# What most of the configs below share.
SIZES = {"hidden_size": D, "num_attention_heads": N, "num_key_value_heads": K, "head_dim": H}
EAGER = {"attn_implementation": "eager", "attention_dropout": 0.0}


def model_file(family: str):
    """The module that holds a family's layers."""
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


def config_of(family: str, name: str, **options):
    """A transformers config."""
    return getattr(importlib.import_module(f"transformers.models.{family}"), name)(**options)


def rope_parameters(theta: float, **scaling) -> dict:
    """transformers' description of a RoPE."""
    return {"rope_type": "default", "rope_theta": theta} | scaling


def linears(p: dict[str, np.ndarray], **names: str) -> dict[str, np.ndarray]:
    """Our linear layers from the peer's torch.nn.Linear, by name: kernels transposed, biases if any."""
    out = {}
    for ours, theirs in names.items():
        out[f"{ours}/kernel"] = p[f"{theirs}.weight"].T
        if f"{theirs}.bias" in p:
            out[f"{ours}/bias"] = p[f"{theirs}.bias"]
    return out


def fused(p: dict[str, np.ndarray], name: str, split: Callable) -> dict[str, np.ndarray]:
    """Our q, k and v from one torch.nn.Linear whose outputs `split` puts in order: rows -> (q, k, v) rows."""
    out = {}
    for ours, rows in zip("qkv", split(p[f"{name}.weight"]), strict=True):
        out[f"{ours}/kernel"] = rows.reshape(-1, rows.shape[-1]).T
    if f"{name}.bias" in p:
        for ours, rows in zip("qkv", split(p[f"{name}.bias"]), strict=True):
            out[f"{ours}/bias"] = rows.reshape(-1)
    return out


def by_head(rows: np.ndarray) -> list[np.ndarray]:
    """Rows laid out as [heads, 3, H]: GPT-NeoX, BLOOM."""
    return [rows.reshape(N, 3, -1, *rows.shape[1:])[:, i] for i in range(3)]


def with_output(p, weights: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """The weights with the output projection of that name."""
    return weights | linears(p, out=name)


def llama_weights(p, one, *, norms: bool = False, sinks: bool = False, shifted: bool = False):
    """q_proj, k_proj, v_proj, o_proj; with head norms (scale w, or 1 + w where shifted); with sink logits."""
    out = linears(p, q="q_proj", k="k_proj", v="v_proj", out="o_proj")
    if norms:
        for ours, theirs in (("q_norm/scale", "q_norm.weight"), ("k_norm/scale", "k_norm.weight")):
            out[ours] = one + p[theirs] if shifted else p[theirs]
    if sinks:
        out[SINK_LOGITS_PATH] = p["sinks"]
    return out


def layer(
    family: str,
    names: tuple[str, str, str],
    ours,
    *,
    keep: Callable | None = None,
    layer_idx: int = 0,
    kind: str | None = None,
    weights: Callable = llama_weights,
    options: dict | None = None,
    **row,
) -> Peer:
    """A row whose peer takes (hidden_states, position_embeddings, attention_mask).

    names: its attention, rotary embedding and config. keep: what its model's mask hides beside the future.
    kind: the layer type that the rotary embedding is asked for.
    """
    attention, rotary, config_name = names
    options = SIZES | EAGER | {"num_hidden_layers": 4} | (options or {})

    @functools.cache
    def parts():
        file = model_file(family)
        config = config_of(family, config_name, **options)
        return config, getattr(file, attention), getattr(file, rotary)(config)

    def build() -> nn.Module:
        config, attention, _ = parts()
        return attention(config, layer_idx=layer_idx)

    def call(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        angles = parts()[2](x, POSITIONS, *([] if kind is None else [kind]))
        return module(x, position_embeddings=angles, attention_mask=causal_mask(T, keep).to(x.dtype))[0]

    return Peer(config=ours, build=build, call=call, weights=weights, **row)


def _plain(**options) -> AttentionConfig:
    return AttentionConfig(num_heads=N, num_kv_heads=K, head_dim=H, **options)


def _window(width: int) -> Callable:
    return lambda q, k: q - k < width


PEERS: dict[str, Peer] = {}

LLAMA = ("LlamaAttention", "LlamaRotaryEmbedding", "LlamaConfig")
PEERS["llama"] = layer(
    "llama", LLAMA, _plain(rope=RoPE(theta=500.0)), options={"rope_parameters": rope_parameters(500.0)}
)
PEERS["llama-3.1-rope"] = layer(
    "llama", LLAMA,
    _plain(rope=RoPE(
        theta=99.0,
        scaling=Llama3(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=64),
    )),
    options={"rope_parameters": rope_parameters(
        99.0, rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=64,
    )},
)  # fmt: skip
PEERS["llama-attention-bias"] = layer(
    "llama", LLAMA, _plain(rope=RoPE(), use_bias=True),
    options={"attention_bias": True, "rope_parameters": rope_parameters(10000.0)},
)  # fmt: skip
PEERS["mistral"] = layer(
    "mistral", ("MistralAttention", "MistralRotaryEmbedding", "MistralConfig"),
    _plain(rope=RoPE(), mask=SlidingWindow(7)), keep=_window(7),
    options={"sliding_window": 7, "rope_parameters": rope_parameters(10000.0)},
)  # fmt: skip
PEERS["qwen2"] = layer(
    "qwen2", ("Qwen2Attention", "Qwen2RotaryEmbedding", "Qwen2Config"),
    _plain(rope=RoPE(theta=1e6), use_bias=True, out_bias=False),
    options={"rope_parameters": rope_parameters(1e6)},
)  # fmt: skip
PEERS["qwen3"] = layer(
    "qwen3", ("Qwen3Attention", "Qwen3RotaryEmbedding", "Qwen3Config"),
    _plain(rope=RoPE(theta=1e6), qk_norm="rms"), weights=functools.partial(llama_weights, norms=True),
    options={"rope_parameters": rope_parameters(1e6)},
)  # fmt: skip
PEERS["gemma2"] = layer(
    "gemma2", ("Gemma2Attention", "Gemma2RotaryEmbedding", "Gemma2Config"),
    _plain(rope=RoPE(), softcap=2.0, scale=24**-0.5), layer_idx=1,
    options={"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 24,
             "rope_parameters": rope_parameters(10000.0)},
)  # fmt: skip
PEERS["gemma2-sliding"] = layer(
    "gemma2", ("Gemma2Attention", "Gemma2RotaryEmbedding", "Gemma2Config"),
    _plain(rope=RoPE(), softcap=2.0, scale=24**-0.5, mask=SlidingWindow(5)), keep=_window(5),
    options={"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 24, "sliding_window": 5,
             "rope_parameters": rope_parameters(10000.0)},
)  # fmt: skip
GEMMA3 = {
    "query_pre_attn_scalar": 24, "sliding_window": 5,
    "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
    "rope_parameters": {
        "sliding_attention": rope_parameters(100.0),
        "full_attention": rope_parameters(1e4, rope_type="linear", factor=8.0),
    },
}  # fmt: skip
GEMMA3_NAMES = ("Gemma3Attention", "Gemma3RotaryEmbedding", "Gemma3TextConfig")
_GEMMA3_WEIGHTS = functools.partial(llama_weights, norms=True, shifted=True)
PEERS["gemma3-sliding"] = layer(
    "gemma3", GEMMA3_NAMES,
    _plain(rope=RoPE(theta=100.0), qk_norm="rms", scale=24**-0.5, mask=SlidingWindow(5)),
    keep=_window(5), kind="sliding_attention", weights=_GEMMA3_WEIGHTS, options=GEMMA3,
)  # fmt: skip
PEERS["gemma3-full"] = layer(
    "gemma3", GEMMA3_NAMES,
    _plain(rope=RoPE(theta=1e4, scaling=LinearScaling(factor=8.0)), qk_norm="rms", scale=24**-0.5),
    layer_idx=3, kind="full_attention", weights=_GEMMA3_WEIGHTS, options=GEMMA3,
)  # fmt: skip
LLAMA4 = ("Llama4TextAttention", "Llama4TextRotaryEmbedding", "Llama4TextConfig")
LLAMA4_OPTIONS = {
    "no_rope_layers": [1, 1, 1, 0], "floor_scale": 4, "attn_scale": 0.5, "attn_temperature_tuning": True,
    "use_qk_norm": True, "rms_norm_eps": 1e-5, "rope_parameters": rope_parameters(5e5),
}  # fmt: skip


def _llama4(ours, keep=None, layer_idx: int = 0) -> Peer:
    return layer("llama4", LLAMA4, ours, keep=keep, layer_idx=layer_idx, options=LLAMA4_OPTIONS)


# Llama 4 rotates, then normalises; we normalise, then rotate: an unscaled norm does not see the rotation.
PEERS["llama4-chunked"] = _llama4(
    _plain(rope=RoPE(theta=5e5, layout="interleaved"), qk_norm="l2", qk_norm_eps=1e-5, mask=Chunked(8)),
    keep=lambda q, k: q // 8 == k // 8,
)
PEERS["llama4-no-rope"] = _llama4(_plain(temperature=Temperature(floor=4, scale=0.5)), layer_idx=3)
GPT_OSS = ("GptOssAttention", "GptOssRotaryEmbedding", "GptOssConfig")


def _gpt_oss(mask, keep, layer_idx: int) -> Peer:
    scaling = {"rope_type": "yarn", "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
               "original_max_position_embeddings": 64}  # fmt: skip
    rope = RoPE(theta=150.0, scaling=YaRN(factor=8.0, original_length=64, truncate=False))
    return layer(
        "gpt_oss", GPT_OSS, _plain(rope=rope, use_bias=True, mask=mask, **SINK_LOGITS), keep=keep,
        layer_idx=layer_idx, weights=functools.partial(llama_weights, sinks=True),
        options={"sliding_window": 6, "attention_bias": True,
                 "rope_parameters": rope_parameters(150.0, **scaling)},
    )  # fmt: skip


PEERS["gpt-oss-sliding"] = _gpt_oss(SlidingWindow(6), _window(6), 0)
PEERS["gpt-oss-full"] = _gpt_oss(Causal(), None, 1)


def _gpt2() -> Peer:
    def build():
        config = config_of("gpt2", "GPT2Config", n_embd=D, n_head=N, attn_implementation="eager")
        return model_file("gpt2").GPT2Attention(config, layer_idx=0)

    def call(module, x):
        return module(x, attention_mask=causal_mask(T).to(x.dtype))[0]

    def weights(p, one):
        out = {f"{n}/kernel": w for n, w in zip("qkv", np.split(p["c_attn.weight"], 3, axis=1), strict=True)}
        out |= {f"{n}/bias": b for n, b in zip("qkv", np.split(p["c_attn.bias"], 3), strict=True)}
        return out | {"out/kernel": p["c_proj.weight"], "out/bias": p["c_proj.bias"]}

    return Peer(AttentionConfig(num_heads=N, use_bias=True), build, call, weights)


PEERS["gpt2"] = _gpt2()
HIDDEN = {"hidden_size": D, "num_attention_heads": N}
PEERS["gpt-neox"] = layer(
    "gpt_neox", ("GPTNeoXAttention", "GPTNeoXRotaryEmbedding", "GPTNeoXConfig"),
    AttentionConfig(num_heads=N, rope=RoPE(width=4), use_bias=True),
    weights=lambda p, one: with_output(p, fused(p, "query_key_value", by_head), "dense"),
    options=HIDDEN | {"rope_parameters": rope_parameters(1e4, partial_rotary_factor=1 / 3)},
)  # fmt: skip


def _gptj() -> Peer:
    @functools.cache
    def parts():
        config = config_of("gptj", "GPTJConfig", n_embd=D, n_head=N, rotary_dim=8, n_positions=64,
                           attn_pdrop=0.0, resid_pdrop=0.0, attn_implementation="eager")  # fmt: skip
        file = model_file("gptj")
        return config, file.GPTJAttention, file.GPTJRotaryEmbedding(config)

    def call(module, x):
        return module(x, parts()[2](x, POSITIONS), attention_mask=causal_mask(T).to(x.dtype))[0]

    return Peer(
        AttentionConfig(num_heads=N, rope=RoPE(width=8, layout="interleaved")),
        lambda: parts()[1](parts()[0], layer_idx=0),
        call,
        lambda p, one: linears(p, q="q_proj", k="k_proj", v="v_proj", out="out_proj"),
    )


PEERS["gpt-j"] = _gptj()
PEERS["phi"] = layer(
    "phi", ("PhiAttention", "PhiRotaryEmbedding", "PhiConfig"),
    _plain(rope=RoPE(width=6), use_bias=True),
    weights=lambda p, one: linears(p, q="q_proj", k="k_proj", v="v_proj", out="dense"),
    options={"rope_parameters": rope_parameters(1e4, partial_rotary_factor=0.5)},
)  # fmt: skip


def _phi_weights(p, one):
    out = linears(p, q="q_proj", k="k_proj", v="v_proj", out="dense")
    names = [(a, b) for a in "qk" for b in (("scale", "weight"), ("bias", "bias"))]
    return out | {f"{a}_norm/{ours}": p[f"{a}_layernorm.{theirs}"] for a, (ours, theirs) in names}


PEERS["phi-qk-layernorm"] = layer(
    "phi", ("PhiAttention", "PhiRotaryEmbedding", "PhiConfig"),
    AttentionConfig(num_heads=N, rope=RoPE(width=6), use_bias=True, qk_norm="layer", qk_norm_eps=1e-5),
    weights=_phi_weights,
    options={"num_key_value_heads": N, "qk_layernorm": True, "layer_norm_eps": 1e-5,
             "rope_parameters": rope_parameters(1e4, partial_rotary_factor=0.5)},
)  # fmt: skip
PEERS["olmo2"] = layer(
    "olmo2", ("Olmo2Attention", "Olmo2RotaryEmbedding", "Olmo2Config"),
    _plain(rope=RoPE(), qk_norm="rms_all_heads", qk_norm_eps=1e-5),
    weights=lambda p, one: llama_weights(p, one) | {
        f"{name}_norm/scale": p[f"{name}_norm.weight"].reshape(-1, H) for name in "qk"
    },
    options={"rms_norm_eps": 1e-5, "rope_parameters": rope_parameters(1e4)},
)  # fmt: skip


def _falcon(kv_heads: int, **options) -> Peer:
    """Queries of a group stand beside its key and its value: rows [kv heads, queries + 2, H]."""

    @functools.cache
    def parts():
        config = config_of("falcon", "FalconConfig", hidden_size=D, num_attention_heads=N, bias=False,
                           alibi=False, attn_implementation="eager", attention_dropout=0.0,
                           rope_parameters=rope_parameters(1e4), **options)  # fmt: skip
        file = model_file("falcon")
        return config, file.FalconAttention, file.FalconRotaryEmbedding(config)

    def call(module, x):
        angles = parts()[2](x, POSITIONS)
        return module(x, None, causal_mask(T).to(x.dtype), position_embeddings=angles)[0]

    def split(rows):
        rows = rows.reshape(kv_heads, N // kv_heads + 2, H, *rows.shape[1:])
        return rows[:, :-2].reshape(-1, *rows.shape[3:]), rows[:, -2], rows[:, -1]

    return Peer(
        AttentionConfig(num_heads=N, num_kv_heads=kv_heads, rope=RoPE()),
        lambda: parts()[1](parts()[0], layer_idx=0),
        call,
        lambda p, one: with_output(p, fused(p, "query_key_value", split), "dense"),
    )


PEERS["falcon-7b"] = _falcon(1, new_decoder_architecture=False, multi_query=True)
PEERS["falcon-40b"] = _falcon(2, new_decoder_architecture=True, num_kv_heads=2)


def _bloom() -> Peer:
    def build():
        config = config_of("bloom", "BloomConfig", hidden_size=D, n_head=N, attention_dropout=0.0,
                           hidden_dropout=0.0)  # fmt: skip
        return model_file("bloom").BloomAttention(config, layer_idx=0)

    def call(module, x):
        alibi = model_file("bloom").build_alibi_tensor(torch.ones(B, T), N, x.dtype)
        return module(x, torch.zeros_like(x), alibi, causal_mask(T).to(x.dtype))[0]

    return Peer(
        AttentionConfig(num_heads=N, bias="alibi", use_bias=True), build, call,
        lambda p, one: with_output(p, fused(p, "query_key_value", by_head), "dense"),
    )  # fmt: skip


PEERS["bloom"] = _bloom()


def _mpt(heads: int, largest: float = 8.0, clip: float | None = None) -> Peer:
    def build():
        config = config_of("mpt", "MptConfig", d_model=D, n_heads=heads, attn_config={"clip_qkv": clip})
        return model_file("mpt").MptAttention(config, layer_idx=0)

    def call(module, x):
        alibi = model_file("mpt").build_mpt_alibi_tensor(heads, T, alibi_bias_max=largest).to(x.dtype)
        return module(x, alibi, attention_mask=causal_mask(T) < 0)[0]

    def weights(p, one):
        split = functools.partial(np.split, indices_or_sections=3)
        return with_output(p, fused(p, "Wqkv", split), "out_proj")

    bias = ALiBiConfig(max_exponent=largest)
    return Peer(AttentionConfig(num_heads=heads, bias=bias, clip_qkv=clip), build, call, weights)


PEERS["mpt"] = _mpt(N)
PEERS["mpt-bias-max-clip-qkv"] = _mpt(N, largest=4.0, clip=0.9)
PEERS["mpt-6-heads"] = _mpt(6)  # the slopes of a count that is no power of two


def _t5(decoder: bool) -> Peer:
    def build():
        config = config_of("t5", "T5Config", d_model=D, d_kv=H, num_heads=N, dropout_rate=0.0,
                           relative_attention_num_buckets=8, relative_attention_max_distance=14,
                           is_decoder=decoder, attn_implementation="eager")  # fmt: skip
        return model_file("t5").T5Attention(
            config, has_relative_attention_bias=True, layer_idx=0, is_causal=decoder
        )

    def call(module, x):
        return module(x, mask=causal_mask(T).to(x.dtype) if decoder else None)[0]

    def weights(p, one):
        table = {"bias_table": p["relative_attention_bias.weight"]}
        return linears(p, q="q", k="k", v="v", out="o") | table

    bias = T5(buckets=8, max_distance=14)
    ours = AttentionConfig(
        num_heads=N, head_dim=H, bias=bias, scale=1.0, mask=Causal() if decoder else Full()
    )
    return Peer(ours, build, call, weights, causal=decoder)


PEERS["t5-decoder"] = _t5(True)
PEERS["t5-encoder"] = _t5(False)

R, C, P, M, Q = 20, 10, 6, 8, 14  # latent, content, rotary, value and query latent widths


def _mla(
    family: str,
    prefix: str,
    *,
    query_latent: int | None,
    rope: RoPE | None,
    scaling: dict | None = None,
    use_bias: bool = False,
) -> Peer:
    sizes = {
        "hidden_size": D, "num_attention_heads": N, "num_key_value_heads": N, "head_dim": P,
        "kv_lora_rank": R, "q_lora_rank": query_latent, "qk_nope_head_dim": C, "qk_rope_head_dim": P,
        "v_head_dim": M, "attention_bias": use_bias,
        "rope_parameters": rope_parameters(1e4 if rope is None else rope.theta, **scaling or {}),
    }  # fmt: skip

    def weights(p, one):
        down = p["kv_a_proj_with_mqa.weight"]
        up = p["kv_b_proj.weight"].reshape(N, C + M, R)
        out = {
            "kv_down/kernel": down[:R].T, "k_rotary/kernel": down[R:].T,
            "kv_latent_norm/scale": p["kv_a_layernorm.weight"],
            "k_up/kernel": up[:, :C].reshape(-1, R).T, "v_up/kernel": up[:, C:].reshape(-1, R).T,
        }  # fmt: skip
        if use_bias:
            bias = p["kv_a_proj_with_mqa.bias"]
            out |= {"kv_down/bias": bias[:R], "k_rotary/bias": bias[R:]}
        if query_latent is None:
            return out | linears(p, q="q_proj", out="o_proj")
        out["q_latent_norm/scale"] = p["q_a_layernorm.weight"]
        return out | linears(p, q_down="q_a_proj", q="q_b_proj", out="o_proj")

    ours = LatentAttentionConfig(
        num_heads=N, latent_dim=R, query_latent_dim=query_latent, head_dim=C, rotary_dim=P, value_dim=M,
        rope=rope, use_bias=use_bias,
    )  # fmt: skip
    if family != "kimi_linear":
        names = (f"{prefix}Attention", f"{prefix}RotaryEmbedding", f"{prefix}Config")
        return layer(family, names, ours, weights=weights, options=sizes)

    def build():
        options = EAGER | {"num_hidden_layers": 4} | sizes
        return model_file(family).KimiLinearAttention(config_of(family, f"{prefix}Config", **options), 0)

    def call(module, x):
        return module(x, attention_mask=causal_mask(T).to(x.dtype))[0]

    return Peer(ours, build, call, weights)


_INTERLEAVED = RoPE(layout="interleaved")
PEERS["deepseek-v2-lite"] = _mla("deepseek_v2", "DeepseekV2", query_latent=None, rope=_INTERLEAVED)
PEERS["deepseek-v2"] = _mla("deepseek_v2", "DeepseekV2", query_latent=Q, rope=_INTERLEAVED)
PEERS["deepseek-v3"] = _mla("deepseek_v3", "DeepseekV3", query_latent=Q, rope=_INTERLEAVED)
PEERS["deepseek-v3-yarn"] = _mla(
    "deepseek_v3", "DeepseekV3", query_latent=Q,
    rope=RoPE(layout="interleaved", theta=99.0, scaling=YaRN(
        factor=40.0, original_length=64, beta_fast=8.0, mscale=0.707, mscale_all_dim=1.0,
    )),
    scaling={"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 64, "beta_fast": 8.0,
             "beta_slow": 1.0, "mscale": 0.707, "mscale_all_dim": 1.0},
)  # fmt: skip
PEERS["deepseek-v3-bias"] = _mla(
    "deepseek_v3", "DeepseekV3", query_latent=Q, rope=_INTERLEAVED, use_bias=True
)
# Kimi's latent attention shares a part of the keys but rotates nothing.
PEERS["kimi-linear-mla"] = _mla("kimi_linear", "KimiLinear", query_latent=None, rope=None)


def _qwen3_next_weights(p, one):
    out = linears(p, k="k_proj", v="v_proj", out="o_proj")
    for i, name in enumerate(("q", "gate")):  # per head, its queries and then its gate
        out[f"{name}/kernel"] = p["q_proj.weight"].reshape(N, 2, H, D)[:, i].reshape(-1, D).T
        out[f"{name}/bias"] = p["q_proj.bias"].reshape(N, 2, H)[:, i].reshape(-1)
    norms = {f"{n}_norm/scale": one + p[f"{n}_norm.weight"] for n in "qk"}
    return out | norms


PEERS["qwen3-next-attention"] = layer(
    "qwen3_next", ("Qwen3NextAttention", "Qwen3NextRotaryEmbedding", "Qwen3NextConfig"),
    GatedAttentionConfig(
        num_heads=N, num_kv_heads=K, head_dim=H, qk_norm="rms", rope=RoPE(width=6), mask=Causal(),
        qk_norm_eps=1e-5, use_bias=True,
    ),
    weights=_qwen3_next_weights,
    options={"rms_norm_eps": 1e-5, "attention_bias": True,
             "rope_parameters": rope_parameters(1e4, partial_rotary_factor=0.5)},
)  # fmt: skip


def _diffllama_weights(p, one):
    """Its pair n is of heads n and n + N / 2, ours of 2n and 2n + 1; values of a pair stand side by side."""

    def paired(name, heads):
        rows = p[f"{name}.weight"].reshape(2, heads // 2, H, D)
        return rows.swapaxes(0, 1).reshape(-1, D).T

    out = {"q/kernel": paired("q_proj", N), "k/kernel": paired("k_proj", 4), "v/kernel": paired("v_proj", 4)}
    out |= {name: p[name] for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")}
    return out | linears(p, out="o_proj")


PEERS["diffllama"] = layer(
    "diffllama", ("DiffLlamaAttention", "DiffLlamaRotaryEmbedding", "DiffLlamaConfig"),
    DifferentialAttentionConfig(
        num_heads=2, head_dim=H, rope=RoPE(), lambda_init=lambda_of_depth(2), norm_eps=1e-6
    ),
    layer_idx=2, weights=_diffllama_weights, fixed=("head_norm/scale",),
    options={"num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_parameters": rope_parameters(1e4)},
)  # fmt: skip


class _WithOutput(nn.Module):
    """A self-attention module and the projection that its model puts behind it."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.attention, self.out = attention, nn.Linear(D, D)


def _bert_weights(p, one):
    names = {"q": "attention.query", "k": "attention.key", "v": "attention.value", "out": "out"}
    out = linears(p, **names)
    if "attention.conv.weight" in p:
        out["conv/kernel"] = p["attention.conv.weight"][:, 0, :, 0].T
    return out


def _longformer() -> Peer:
    """Global tokens have queries of their own, and keys and values of their own to attend to."""
    positions = (0, 5)

    def build():
        config = config_of("longformer", "LongformerConfig", hidden_size=D, num_attention_heads=N,
                           attention_window=[8], attention_probs_dropout_prob=0.0)  # fmt: skip
        return _WithOutput(model_file("longformer").LongformerSelfAttention(config, layer_id=0))

    def weights(p, one):
        names = {"q": "query_global", "k": "key_global", "v": "value_global"}
        further = linears(p, **{f"{ours}_global": f"attention.{theirs}" for ours, theirs in names.items()})
        return _bert_weights(p, one) | further

    def call(module, x):
        masked, is_global = (torch.zeros(B, T, dtype=torch.bool) for _ in range(2))
        is_global[:, list(positions)] = True
        y = module.attention(
            x, attention_mask=is_global.to(x.dtype) * 10000, is_index_masked=masked,
            is_index_global_attn=is_global, is_global_attn=True,
        )[0]  # fmt: skip
        return module.out(y)

    ours = AttentionConfig(num_heads=N, mask=Longformer(8, positions), use_bias=True, global_projections=True)
    return Peer(ours, build, call, weights, causal=False)


PEERS["longformer"] = _longformer()


def _nystromformer() -> Peer:
    """Z_0 scaled for each matrix by itself; its default, one maximum over batch and heads, is not ours."""

    def build():
        config = config_of("nystromformer", "NystromformerConfig", hidden_size=D, num_attention_heads=N,
                           num_landmarks=6, segment_means_seq_len=T, conv_kernel_size=5,
                           attention_probs_dropout_prob=0.0)  # fmt: skip
        module = model_file("nystromformer").NystromformerSelfAttention(config)
        module.init_option = "exact"  # the option that its constructor reads by a name that fails
        return _WithOutput(module)

    def call(module, x):
        return module.out(module.attention(x)[0])

    ours = NystromformerConfig(num_heads=N, landmarks=6, conv_width=5, use_bias=True)
    return Peer(ours, build, call, _bert_weights, causal=False)


PEERS["nystromformer"] = _nystromformer()
