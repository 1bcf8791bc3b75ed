"""Recurrent layers: transformers' mixers, and layers of torch's own parts around fla's naive recurrences."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from attention_jax.mixers import (
    BasedConfig,
    DeltaNetConfig,
    ForgettingAttentionConfig,
    GatedDeltaNetConfig,
    GLAConfig,
    KDAConfig,
    LightningConfig,
    LinearAttentionConfig,
    Mamba2Config,
    RetentionConfig,
)
from tests.parity.peers import D, Peer, fla_naive
from tests.parity.softmax_rows import config_of, linears, model_file

# The epsilon of the norms of the layers of torch's own parts: the default of ours.
EPSILON = 1e-5
# What Qwen3-Next, Kimi Linear and MiniMax publish.
PUBLISHED = {"norm_eps": 1e-6}

PEERS: dict[str, Peer] = {}


def _convolution(p, name: str) -> dict[str, np.ndarray]:
    """Our depthwise kernel [W, C] and bias from torch's [C, 1, W]."""
    out = {"convolution/kernel": p[f"{name}.weight"][:, 0].T}
    if f"{name}.bias" in p:
        out["convolution/bias"] = p[f"{name}.bias"]
    return out


def _gated_deltanet() -> Peer:
    """Its projections are laid out by key head: [queries, keys, values, gates] and [betas, decays]."""
    heads, qk_heads, H, M = 4, 2, 8, 12
    G = heads // qk_heads

    def build():
        config = config_of(
            "qwen3_next", "Qwen3NextConfig", hidden_size=D, linear_num_value_heads=heads,
            linear_num_key_heads=qk_heads, linear_key_head_dim=H, linear_value_head_dim=M,
            rms_norm_eps=1e-6,
        )  # fmt: skip
        return model_file("qwen3_next").Qwen3NextGatedDeltaNet(config, layer_idx=0)

    def weights(p, one):
        def split(name, *widths):
            rows = p[f"{name}.weight"].reshape(qk_heads, sum(widths), D)
            return [x.reshape(-1, D).T for x in np.split(rows, np.cumsum(widths)[:-1], axis=1)]

        names = ("q", "k", "v", "gate", "beta", "decay")
        kernels = [*split("in_proj_qkvz", H, H, G * M, G * M), *split("in_proj_ba", G, G)]
        out = {f"{name}/kernel": kernel for name, kernel in zip(names, kernels, strict=True)}
        out |= {"A_log": p["A_log"], "dt_bias": p["dt_bias"], "norm/scale": p["norm.weight"]}
        return out | linears(p, out="out_proj") | _convolution(p, "conv1d")

    sizes = {"num_heads": heads, "num_qk_heads": qk_heads, "head_dim": H, "value_dim": M}
    ours = GatedDeltaNetConfig(**sizes, **PUBLISHED)
    return Peer(ours, build, lambda module, x: module(x), weights)


PEERS["qwen3-next-gated-deltanet"] = _gated_deltanet()


def _kda() -> Peer:
    heads, H = 4, 12

    def build():
        config = config_of(
            "kimi_linear", "KimiLinearConfig", hidden_size=D, linear_num_heads=heads, linear_head_dim=H,
            rms_norm_eps=1e-6, num_hidden_layers=4,
        )  # fmt: skip
        return model_file("kimi_linear").KimiLinearDeltaAttention(config, layer_idx=0)

    def weights(p, one):
        out = linears(
            p, q="q_proj", k="k_proj", v="v_proj", beta="b_proj", decay_down="forget_gate.f_a_proj",
            decay_up="forget_gate.f_b_proj", gate_down="g_a_proj", gate_up="g_b_proj", out="o_proj",
        )  # fmt: skip
        out |= {"A_log": p["forget_gate.A_log"].reshape(-1), "dt_bias": p["forget_gate.dt_bias"]}
        return out | {"norm/scale": p["o_norm.weight"]} | _convolution(p, "conv1d")

    ours = KDAConfig(num_heads=heads, head_dim=H, gate_bias=False, **PUBLISHED)
    return Peer(ours, build, lambda module, x: module(x), weights)


PEERS["kimi-linear-kda"] = _kda()


def _mamba2(groups: int, epsilon: float, **limits) -> Peer:
    H, M = 8, 16

    def build():
        config = config_of(
            "mamba2", "Mamba2Config", hidden_size=D, num_heads=2 * D // M, head_dim=M, state_size=H, expand=2,
            n_groups=groups, conv_kernel=4, chunk_size=8, layer_norm_epsilon=epsilon,
            time_step_limit=tuple(limits.values()) or (0.0, float("inf")),
        )  # fmt: skip
        return model_file("mamba2").Mamba2Mixer(config, layer_idx=0)

    def weights(p, one):
        out = {"norm/scale": p["norm.weight"]} | {name: p[name] for name in ("A_log", "dt_bias", "D")}
        return out | linears(p, in_proj="in_proj", out="out_proj") | _convolution(p, "conv1d")

    ours = Mamba2Config(head_dim=M, state_dim=H, groups=groups, norm_eps=epsilon, **limits)
    return Peer(ours, build, lambda module, x: module(x), weights)


PEERS["mamba2"] = _mamba2(1, 1e-5)
PEERS["mamba2-groups-limits"] = _mamba2(2, 1e-2, dt_limit_low=0.03, dt_limit_high=0.08)


def _minimax() -> Peer:
    heads, H, index, layers = 4, 12, 1, 5

    def build():
        config = config_of(
            "minimax", "MiniMaxConfig", hidden_size=D, num_attention_heads=heads, head_dim=H,
            num_hidden_layers=layers, block_size=7,
        )  # fmt: skip
        return model_file("minimax").MiniMaxLightningAttention(config, layer_idx=index)

    def weights(p, one):
        rows = p["qkv_proj.weight"].reshape(heads, 3, H, D)
        out = {f"{name}/kernel": rows[:, i].reshape(-1, D).T for i, name in enumerate("qkv")}
        out["norm/scale"] = p["norm.weight"]
        return out | linears(p, gate="output_gate", out="out_proj")

    def call(module, x):
        return module(x, position_embeddings=None, attention_mask=None)[0]

    factor = 1 - index / (layers - 1 + 1e-5) + 1e-5
    ours = LightningConfig(num_heads=heads, head_dim=H, slope_factor=factor, **PUBLISHED)
    return Peer(ours, build, call, weights)


PEERS["minimax-lightning"] = _minimax()


class _Around(nn.Module):
    """Linear layers by our names around a naive recurrence: core(module, projections) -> [B, T, values].

    Parameters beside the linear layers are given by shape.
    """

    def __init__(self, core: Callable, linear: dict[str, tuple], parameters: dict[str, tuple], width: int):
        super().__init__()
        self.core, self.names = core, tuple(linear)
        for name, (size, bias) in linear.items():
            self.add_module(name, nn.Linear(D, size, bias=bias))
        for name, shape in parameters.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.out = nn.Linear(width, D, bias=False)

    def forward(self, x):
        return self.out(self.core(self, {name: getattr(self, name)(x) for name in self.names}))


def _around(ours, core, linear, parameters, width, renamed: dict[str, str] | None = None, **row) -> Peer:
    """The row of such a layer; renamed: our paths of the parameters beside the linear layers."""
    linear = {name: size if isinstance(size, tuple) else (size, False) for name, size in linear.items()}

    def weights(p, one):
        out = linears(p, **{name: name for name in (*linear, "out")})
        for name, path in (renamed or {}).items():
            out[path] = p[name]
        return out

    return Peer(
        ours, lambda: _Around(core, linear, parameters, width), lambda module, x: module(x), weights,
        source="fla", **row,
    )  # fmt: skip


def _heads(x: torch.Tensor, count: int) -> torch.Tensor:
    return x.unflatten(-1, (count, -1))


def _gla_core(module, y):
    q, k, v, gate = (_heads(y[name], 4) for name in ("q", "k", "v", "gate"))
    decay = F.logsigmoid(_heads(F.linear(y["decay_down"], module.up, module.up_bias), 4)) / 4.0
    o, _ = fla_naive("gla").naive_recurrent_gla(q, k, v, decay)
    return (F.rms_norm(o, o.shape[-1:], module.norm_weight, EPSILON) * F.silu(gate)).flatten(2)


def _gla() -> Peer:
    H, M, rank = 6, 10, 5
    row = _around(
        GLAConfig(num_heads=4, head_dim=H, value_dim=M, decay_rank=rank, decay_temperature=4.0), _gla_core,
        {"q": 4 * H, "k": 4 * H, "v": 4 * M, "gate": 4 * M, "decay_down": rank},
        {"up": (4 * H, rank), "up_bias": (4 * H,), "norm_weight": (M,)}, 4 * M,
        {"up_bias": "decay_up/bias", "norm_weight": "norm/scale"},
    )  # fmt: skip
    return _also(row, lambda p: {"decay_up/kernel": p["up"].T})


def _also(row: Peer, more: Callable) -> Peer:
    """The row with further weights."""

    def weights(p, one):
        return row.weights(p, one) | more(p)

    return Peer(**(vars(row) | {"weights": weights}))


PEERS["gla"] = _gla()


def _deltanet_core(module, y):
    mixed = torch.cat([y[name] for name in "qkv"], dim=-1).mT
    width = module.conv.shape[-1]
    mixed = F.silu(F.conv1d(F.pad(mixed, (width - 1, 0)), module.conv, groups=mixed.shape[1])).mT
    q, k, v = (
        _heads(x, 4).transpose(1, 2) for x in mixed.split([y[name].shape[-1] for name in "qkv"], dim=-1)
    )
    q, k = (x / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    beta = torch.sigmoid(y["beta"]).transpose(1, 2)
    o, _ = fla_naive("delta_rule").delta_rule_recurrence(q, k, v, beta)
    o = o.transpose(1, 2)
    return F.rms_norm(o, o.shape[-1:], module.norm_weight, EPSILON).flatten(2)


def _deltanet() -> Peer:
    H, M = 8, 10
    row = _around(
        DeltaNetConfig(num_heads=4, head_dim=H, value_dim=M), _deltanet_core,
        {"q": 4 * H, "k": 4 * H, "v": 4 * M, "beta": 4},
        {"conv": (8 * H + 4 * M, 1, 4), "norm_weight": (M,)}, 4 * M, {"norm_weight": "norm/scale"},
    )  # fmt: skip
    return _also(row, lambda p: {"convolution/kernel": p["conv"][:, 0].T})


PEERS["deltanet"] = _deltanet()


def _retention_core(module, y):
    q, k, v, gate = (_heads(y[name], 4) for name in ("q", "k", "v", "gate"))
    o = fla_naive("retention").naive_retention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    normed = F.group_norm(o.flatten(0, 1).flatten(1), 4, eps=EPSILON).reshape(o.shape)
    return ((normed * module.norm_weight + module.norm_bias) * F.silu(gate)).flatten(2)


PEERS["retention-group-norm"] = _around(
    RetentionConfig(num_heads=4, head_dim=8, value_dim=10, rope=None), _retention_core,
    {"q": 32, "k": 32, "v": 40, "gate": 40}, {"norm_weight": (4, 10), "norm_bias": (4, 10)}, 40,
    {"norm_weight": "norm/scale", "norm_bias": "norm/bias"},
)  # fmt: skip


def _retention_rms_core(module, y):
    q, k, v, gate = (_heads(y[name], 4) for name in ("q", "k", "v", "gate"))
    o = fla_naive("retention").naive_retention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    return (F.rms_norm(o, o.shape[-1:], module.norm_weight, EPSILON) * F.silu(gate)).flatten(2)


# As fla's layer and torchscale's.
PEERS["retention-rms-norm"] = _around(
    RetentionConfig(num_heads=4, head_dim=8, value_dim=10, rope=None, norm="rms"), _retention_rms_core,
    {"q": 32, "k": 32, "v": 40, "gate": 40}, {"norm_weight": (10,)}, 40, {"norm_weight": "norm/scale"},
)  # fmt: skip


def _forgetting_core(module, y, window: int | None):
    q, k, v = _heads(y["q"], 4), _heads(y["k"], 2), _heads(y["v"], 2)
    gate = F.logsigmoid(y["gate"])
    o = fla_naive("forgetting_attn").naive_forgetting_attn(q, k, v, gate, window_size=window)
    return o.flatten(2).to(q.dtype)


def _forgetting(window: int | None) -> Peer:
    mask = {} if window is None else {"mask": f"SlidingWindow({window})"}
    return _around(
        ForgettingAttentionConfig(num_heads=4, num_kv_heads=2, head_dim=12, **mask),
        functools.partial(_forgetting_core, window=window),
        {"q": 48, "k": 24, "v": 24, "gate": (4, True)}, {}, 48,
    )  # fmt: skip


PEERS["forgetting"] = _forgetting(None)
PEERS["forgetting-window"] = _forgetting(6)


def _group_rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The RMS norm of each head [..., heads, H] with its own scale [heads, H]."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-6) * weight


def _forgetting_gated_core(module, y):
    q, k = _group_rms(_heads(y["q"], 4), module.q_norm), _group_rms(_heads(y["k"], 2), module.k_norm)
    gate, v = F.logsigmoid(y["gate"]), _heads(y["v"], 2)
    o = fla_naive("forgetting_attn").naive_forgetting_attn(q, k, v, gate).to(q.dtype)
    return _group_rms(o, module.o_norm).flatten(2) * torch.sigmoid(y["output_gate"])


# The Pro block of the Forgetting Transformer, without its shift of keys and values.
PEERS["forgetting-gate-and-norms"] = _around(
    ForgettingAttentionConfig(
        num_heads=4, num_kv_heads=2, head_dim=12, qk_norm="rms_per_head", output_norm="rms_per_head",
        output_gate="sigmoid",
    ),
    _forgetting_gated_core,
    {"q": 48, "k": 24, "v": 24, "gate": (4, True), "output_gate": 48},
    {"q_norm": (4, 12), "k_norm": (2, 12), "o_norm": (4, 12)}, 48,
    {"q_norm": "q_norm/scale", "k_norm": "k_norm/scale", "o_norm": "output_norm/scale"},
)  # fmt: skip


def _linear_core(module, y):
    q, k, v = (_heads(y[name], 4) for name in "qkv")
    naive = fla_naive("linear_attn").naive_recurrent_linear_attn
    return naive(F.elu(q) + 1, F.elu(k) + 1, v, scale=1.0, normalize=True)[0].flatten(2)


PEERS["linear-elu"] = _around(
    LinearAttentionConfig(num_heads=4), _linear_core, {"q": D, "k": D, "v": D}, {}, D
)


def _based_core(module, y):
    q, k, v = (_heads(y[name], 4).transpose(1, 2) for name in "qkv")
    return fla_naive("based").naive_parallel_based(q, k, v).transpose(1, 2).flatten(2)


# It adds 1e-6 to the sum of the weights.
PEERS["based"] = _around(
    BasedConfig(num_heads=4, feature_dim=5, normalizer_eps=1e-6),
    _based_core,
    {"q": 20, "k": 20, "v": D},
    {},
    D,
)
