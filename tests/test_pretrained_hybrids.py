"""DeepSeek, MiniMax-01, Qwen3-Next and Kimi Linear: layouts against the formats, and what is refused."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from attention_jax.mixers import KDAConfig, LatentAttentionConfig
from attention_jax.pretrained import family_of
from attention_jax.pretrained.description import Description
from attention_jax.pretrained.load import flatten, load_params, saved_tensors
from attention_jax.pretrained.models import read_config
from attention_jax.pretrained.table import joined_by_head
from tests.params import random_params
from tests.tensor_files import Held

SIZES = {
    "vocab_size": 7, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "intermediate_size": 6, "head_dim": 4,
}  # fmt: skip
MOE = {"moe_intermediate_size": 3, "num_experts_per_tok": 1}
LATENT = {"kv_lora_rank": 5, "qk_nope_head_dim": 3, "qk_rope_head_dim": 4, "v_head_dim": 2}
GROUPS = {"n_group": 1, "topk_group": 1}
DEEPSEEK = SIZES | MOE | LATENT | GROUPS | {
    "n_routed_experts": 2, "q_lora_rank": 4, "first_k_dense_replace": 1, "n_shared_experts": 1
}  # fmt: skip
ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
NESTED = {
    "num_heads": 2,
    "head_dim": 4,
    "short_conv_kernel_size": 3,
    "full_attn_layers": [2],
    "kda_layers": [1],
}
DESCRIPTIONS = {
    "deepseek_v2": DEEPSEEK | {"q_lora_rank": None},
    "deepseek_v3": DEEPSEEK,
    "minimax": SIZES | {"num_local_experts": 2, "num_experts_per_tok": 1},
    "qwen3_next": SIZES | MOE | {
        "num_experts": 2, "shared_expert_intermediate_size": 3, "linear_num_value_heads": 4,
        "linear_num_key_heads": 2, "linear_key_head_dim": 3, "linear_value_head_dim": 2,
        "full_attention_interval": 2, "partial_rotary_factor": 0.5,
    },
    "kimi_linear": SIZES | LATENT | {
        "num_experts": 2, "num_experts_per_token": 1, "moe_intermediate_size": 3,
        "linear_attn_config": NESTED,
    },
}  # fmt: skip


def _config(model_type: str, **changes):
    keys = {"model_type": model_type} | DESCRIPTIONS[model_type] | changes
    return read_config(family_of(model_type), Description(keys))


@pytest.mark.parametrize(
    ("model_type", "change", "message"),
    [
        ("deepseek_v3", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config .* is not"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method 'greedy' is not supported, only noaux_tc"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func 'softmax' is not supported"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq 2 is not supported, only 1"),
        ("deepseek_v3", {"num_key_value_heads": 1}, "num_key_value_heads 1 is not supported, only 2"),
        ("deepseek_v3", {"index_topk": 4}, "index_topk 4 is not supported for model_type deepseek_v3"),
        ("deepseek_v3", {"qk_rope_head_dim": 0, "head_dim": 0}, "qk_rope_head_dim must be >= 2, got 0"),
        ("deepseek_v3", {"n_group": 3}, "num_groups 3 does not divide num_experts 2"),
        ("deepseek_v3", {"rope_scaling": ROPE | {"mscale_all_dim": 1.0}}, "not supported without mscale"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob True is not supported, only False"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method must be one of greedy"),
        ("minimax", {"num_attention_heads": 6}, "num_attention_heads 6 is not supported, only powers of two"),
        ("minimax", {"rotary_dim": 2}, "rotary_dim 2 is not supported, only 4"),
        ("minimax", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported"),
        ("minimax", {"layer_types": ["linear_attention", "conv"]}, "a layer of type 'conv' is not supported"),
        ("minimax", {"attn_type_list": [0, 1]}, "attn_type_list .* is not supported"),
        ("qwen3_next", {"decoder_sparse_step": 0}, "decoder_sparse_step must be >= 1, got 0"),
        ("qwen3_next", {"layer_types": ["conv"] * 2}, "a layer of type 'conv' is not supported"),
        ("qwen3_next", {"linear_num_key_heads": 3}, "num_qk_heads 3 does not divide num_heads 4"),
        ("kimi_linear", {"linear_attn_config": NESTED | {"lower_bound": -5}}, "lower_bound -5 is not supp"),
        ("kimi_linear", {"linear_attn_config": NESTED | {"kda_layers": [1, 2]}}, "must hold each of 1 to 2"),
        ("kimi_linear", {"mla_use_nope": False}, "mla_use_nope False is not supported, only True"),
        ("kimi_linear", {"mlp_layer_types": ["moe"] * 2}, "mlp_layer_types must be 2 of dense and sparse"),
    ],
)
def test_descriptions_that_are_refused(model_type, change, message):
    with pytest.raises(ValueError, match=message) as error:
        _config(model_type, **change)
    assert str(error.value).startswith("config.json: ") and len(str(error.value)) < 200


@functools.cache
def _saved(model_type: str):
    config = _config(model_type)
    params = random_params(config)
    return config, params, dict(saved_tensors(family_of(model_type), config, params))


@pytest.mark.parametrize("model_type", DESCRIPTIONS)
def test_every_parameter_is_saved_and_loaded_bit_for_bit(model_type):
    config, params, tensors = _saved(model_type)
    found, wanted = flatten(load_params(family_of(model_type), config, Held(tensors))), flatten(params)
    assert found.keys() == wanted.keys()
    jax.tree.map(assert_array_equal, found, wanted)


def test_tensors_beside_the_language_model():
    """Layers that predict further tokens and stored decays are left out; scales of float8 are refused."""
    one = np.ones(1, np.float32)
    for model_type, name in [
        ("deepseek_v3", "model.layers.61.eh_proj.weight"),
        ("minimax", "model.layers.0.self_attn.slope_rate"),
        ("qwen3_next", "mtp.fc.weight"),
    ]:
        config, _, tensors = _saved(model_type)
        load_params(family_of(model_type), config, Held(tensors | {name: one}))
    config, _, tensors = _saved("deepseek_v3")
    scale = "model.layers.0.self_attn.o_proj.weight_scale_inv"
    with pytest.raises(ValueError, match=f"tensor {scale} is not known in a checkpoint of DeepSeek V3"):
        load_params(family_of("deepseek_v3"), config, Held(tensors | {scale: one}))


def test_the_joined_layout_by_head():
    """The rows of each projection, one by one, and back."""
    sizes, D = (2, 3, 1), 4
    rows = [
        (name, head, j) for head in range(3) for name, n in zip("abc", sizes, strict=True) for j in range(n)
    ]
    whole_ED = np.arange(len(rows) * D, dtype=np.float32).reshape(-1, D)
    for entry, whole in zip(
        joined_by_head("abc", "x", lambda _: (3, sizes)), (whole_ED, whole_ED[:, 0]), strict=True
    ):
        parts = dict(zip("abc", entry.load([whole], None), strict=True))
        for row, (name, head, j) in zip(whole, rows, strict=True):
            size = sizes["abc".index(name)]
            assert_array_equal(parts[name].T[head * size + j], row)
        assert_array_equal(entry.save(list(parts.values()), None)[0], whole)
        with pytest.raises(ValueError, match="not 18 along axis 0"):
            entry.load([whole[1:]], None)


def test_layers_of_hybrids():
    """Which mixer, which feed-forward and which decay a layer has."""
    kimi = _config("kimi_linear").period
    assert [type(block.mixer) for block in kimi] == [KDAConfig, LatentAttentionConfig]
    assert [block.feed_forward.kind for block in kimi] == ["dense", "experts"]
    linear = _config("minimax", layer_types=["linear_attention"] * 2).period
    assert [block.mixer.slope_factor for block in linear] == pytest.approx([1.00001, 2e-5], rel=1e-4)
    step = _config("qwen3_next", num_hidden_layers=4, decoder_sparse_step=2, mlp_only_layers=[3]).period
    assert [block.feed_forward.kind for block in step] == ["dense", "experts", "dense", "dense"]
