"""Kimi Linear: Kimi Delta Attention, some layers of latent attention without positions, and experts.

transformers names tensors as the authors do, except for those of dense layers, which it writes under
block_sparse_moe instead of mlp. Both names are read.
"""

from __future__ import annotations

import numpy as np

from attention_jax.feed_forwards import RouterConfig
from attention_jax.mixers import KDAConfig
from attention_jax.model import BlockConfig, ModelConfig
from attention_jax.pretrained.description import Description
from attention_jax.pretrained.families.deepseek import latent_attention, latent_table
from attention_jax.pretrained.families.llama import OUTER, dense_table, gated, layer_types, model, norms_table
from attention_jax.pretrained.families.moe import NUMBERED, experts, experts_table
from attention_jax.pretrained.family import Family
from attention_jax.pretrained.table import Arrays, Entry, Place, linear, norm, same

_MIXER = "model.layers.{i}.self_attn"


def _is_delta(block: BlockConfig) -> bool:
    return isinstance(block.mixer, KDAConfig)


def _join_convolutions(arrays: Arrays, place: Place) -> Arrays:
    return [np.concatenate([x[:, 0].T for x in arrays], axis=1)]


def _split_convolutions(arrays: Arrays, place: Place) -> Arrays:
    return [x.T[:, None] for x in np.split(arrays[0], 3, axis=1)]


def _flat(arrays: Arrays, place: Place) -> Arrays:
    return [x.reshape(-1) for x in arrays]


def _by_head(arrays: Arrays, place: Place) -> Arrays:
    return [x.reshape(1, 1, -1, 1) for x in arrays]


_PROJECTIONS = {
    "q": "q_proj", "k": "k_proj", "v": "v_proj", "beta": "b_proj", "decay_down": "f_a_proj",
    "decay_up": "f_b_proj", "gate_down": "g_a_proj", "gate_up": "g_b_proj", "out": "o_proj",
}  # fmt: skip
TABLE = (
    *OUTER,
    *norms_table(norm1="input_layernorm", norm2="post_attention_layernorm"),
    *(
        entry
        for ours, theirs in _PROJECTIONS.items()
        for entry in linear(f"mixer/{ours}", f"{_MIXER}.{theirs}", when=_is_delta)
    ),
    Entry(
        ("mixer/convolution/kernel",),
        tuple(f"{_MIXER}.{name}_conv1d.weight" for name in "qkv"),
        _join_convolutions,
        _split_convolutions,
    ),
    Entry(("mixer/A_log",), (f"{_MIXER}.A_log",), _flat, _by_head),
    same("mixer/dt_bias", f"{_MIXER}.dt_bias"),
    *norm("mixer/norm", f"{_MIXER}.o_norm", when=_is_delta),
    *latent_table(),
    *dense_table(),
    *experts_table("model.layers.{i}.block_sparse_moe", NUMBERED, shared="shared_experts"),
)


def _delta(d: Description, types: list[str]) -> tuple[KDAConfig, list[str]]:
    """The mixer and the type of each layer: the authors nest both in linear_attn_config."""
    keys = {"linear_num_heads": "num_heads", "linear_head_dim": "head_dim"}
    keys |= {"linear_conv_kernel_dim": "short_conv_kernel_size"}
    sizes = [d.integer(key, value) for key, value in zip(keys, (32, 128, 4), strict=True)]
    nested = d.mapping("linear_attn_config", None)
    if nested is not None:
        sizes = [nested.integer(key, size) for key, size in zip(keys.values(), sizes, strict=True)]
        types = _nested_types(nested, types)
        nested.finish()
    heads, width, taps = sizes
    mixer = KDAConfig(
        num_heads=heads,
        head_dim=width,
        convolution=taps,
        gate_bias=False,
        norm_eps=float(d.number("rms_norm_eps", 1e-5)),
    )
    return mixer, types


def _nested_types(nested: Description, types: list[str]) -> list[str]:
    """The types of layers that are counted from 1 in two lists."""
    full, delta = nested.items("full_attn_layers", None), nested.items("kda_layers", None)
    if full is None and delta is None:
        return types
    full, delta = full or [], delta or []
    if sorted(full + delta) != list(range(1, len(types) + 1)):
        raise ValueError(
            f"{nested.where}: full_attn_layers and kda_layers must hold each of 1 to {len(types)} once"
        )
    return ["full_attention" if i + 1 in full else "linear_attention" for i in range(len(types))]


def _is_sparse(d: Description, layers: int) -> list[bool]:
    dense = d.integer("first_k_dense_replace", 1)
    types = d.items("mlp_layer_types", ["dense" if i < dense else "sparse" for i in range(layers)])
    if len(types) != layers or not set(types) <= {"dense", "sparse"}:
        raise ValueError(f"{d.where}: mlp_layer_types must be {layers} of dense and sparse, got {types}")
    return [kind == "sparse" for kind in types]


def _experts(d: Description):
    d.only("moe_router_activation_func", "sigmoid")
    d.only("use_grouped_topk", True)
    router = RouterConfig(
        scoring="sigmoid",
        normalize=d.flag("moe_renormalize", True),
        scale=float(d.number("routed_scaling_factor", 2.446)),
        correction_bias=True,
        num_groups=d.integer("num_expert_group", 1),
        groups_per_token=d.integer("topk_group", 1),
        group_score="top2",
    )
    keys = {"number": ("num_experts",), "chosen": "num_experts_per_token", "width": "moe_intermediate_size"}
    shared = d.integer("num_shared_experts", 1) * d.integer("moe_intermediate_size")
    return experts(d, router, **keys, shared_width=shared or None)


def _model(d: Description) -> ModelConfig:
    layers = d.layers()
    for key, value in {
        "mla_use_nope": True, "moe_layer_freq": 1, "num_nextn_predict_layers": 0, "hidden_act": "silu",
        "mlp_bias": False,
    }.items():  # fmt: skip
        d.only(key, value)
    # Latent attention has no positions, and head_dim is that of no layer.
    d.ignore("rope_theta", "rope_scaling", "rope_parameters", "head_dim", "model_max_length")
    d.ignore("output_router_logits", "router_aux_loss_coef")
    types = ["full_attention" if i and i % 4 == 0 else "linear_attention" for i in range(layers)]
    delta, types = _delta(d, types)
    mixers = {"linear_attention": delta, "full_attention": latent_attention(d, None)}
    sparse, mlp, moe = _is_sparse(d, layers), gated(d), None
    if any(sparse):
        moe = _experts(d)
    blocks = []
    for kind, has_experts in zip(layer_types(d, layers, types), sparse, strict=True):
        if kind not in mixers:
            raise ValueError(f"{d.where}: a layer of type {kind!r} is not supported here")
        blocks.append(BlockConfig(mixers[kind], moe if has_experts else mlp))
    return model(d, blocks, norm_eps=float(d.number("rms_norm_eps", 1e-5)))


_DENSE = (r"(model\.layers\.\d+)\.block_sparse_moe\.((gate|up|down)_proj\.weight)", r"\1.mlp.\2")
FAMILIES = (Family("Kimi Linear", ("kimi_linear",), _model, TABLE, older_names=(_DENSE,)),)
