"""Descriptions and tensors of families with experts: layouts against the formats, and what is refused."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from attention_jax.feed_forwards import DenseConfig, ExpertsConfig
from attention_jax.pretrained import family_of, load_pretrained, save_pretrained
from attention_jax.pretrained.description import Description
from attention_jax.pretrained.families.experts import fused
from attention_jax.pretrained.files import write_safetensors
from attention_jax.pretrained.load import saved_tensors
from attention_jax.pretrained.models import read_config
from attention_jax.pretrained.mxfp4 import unpacked
from attention_jax.pretrained.table import Place
from tests.params import random_params

SIZES = {
    "vocab_size": 7, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "head_dim": 4,
    "intermediate_size": 32, "num_experts_per_tok": 2,
}  # fmt: skip
MIXTRAL = SIZES | {"num_local_experts": 3}
QWEN = SIZES | {"num_experts": 3, "moe_intermediate_size": 4}
YARN = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 0.5, "beta_slow": 0.05}
GPT_OSS = MIXTRAL | {
    "num_hidden_layers": 2,
    "rope_scaling": YARN | {"original_max_position_embeddings": 16, "truncate": False},
}


def _config(model_type, **keys):
    return read_config(family_of(model_type), Description({"model_type": model_type} | keys))


@pytest.mark.parametrize(
    ("model_type", "keys", "message"),
    [
        ("mixtral", MIXTRAL | {"router_jitter_noise": 0.1}, "router_jitter_noise 0.1 is not supported"),
        ("mixtral", MIXTRAL | {"num_experts": 4}, "num_local_experts and num_experts mean the same"),
        ("mixtral", SIZES | {"num_local_experts": 1}, "experts_per_token 2 exceeds num_experts 1"),
        ("mixtral", MIXTRAL | {"n_shared_experts": 1}, "n_shared_experts 1 is not supported for model_type"),
        ("qwen3_moe", QWEN | {"decoder_sparse_step": 0}, "decoder_sparse_step must be >= 1, got 0"),
        ("qwen3_moe", QWEN | {"mlp_only_layers": [4]}, "mlp_only_layers must hold layers from 0 to 3"),
        ("qwen3_moe", QWEN | {"shared_expert_intermediate_size": 4}, "shared_expert_intermediate_size 4 is"),
        ("olmoe", MIXTRAL | {"clip_qkv": 8.0}, "clip_qkv 8.0 is not supported$"),
        ("gpt_oss", MIXTRAL, "rope_scaling is missing"),
        ("gpt_oss", GPT_OSS | {"experts_per_token": 4}, "experts_per_token 4 is not supported, only 2"),
        ("gpt_oss", GPT_OSS | {"quantization_config": {"quant_method": "fp8"}}, "quant_method 'fp8' is not"),
        ("mixtral", MIXTRAL | {"quantization_config": {"quant_method": "mxfp4"}}, "quantization_config"),
        ("llama4_text", MIXTRAL | {"moe_layers": [7]}, "moe_layers must hold layers from 0 to 3"),
        ("llama4_text", MIXTRAL | {"attn_temperature_tuning": 3}, "attn_temperature_tuning must be one of"),
        ("ministral3", SIZES | {"rope_parameters": YARN}, "original_max_position_embeddings is missing"),
    ],
)
def test_options_that_are_not_implemented(model_type, keys, message):
    with pytest.raises(ValueError, match=message) as error:
        _config(model_type, **keys)
    assert str(error.value).startswith("config.json: ") and len(str(error.value)) < 250


def test_rotations_before_a_norm_must_not_change_lengths():
    scaling = YARN | {"original_max_position_embeddings": 16}
    with pytest.raises(ValueError, match="rope_type must be default, linear or llama3"):
        _config("llama4_text", **MIXTRAL, rope_scaling=scaling)


def test_which_layers_have_experts():
    def kinds(model_type, **keys):
        config = _config(model_type, **keys)
        layers = [config.period[i % len(config.period)] for i in range(config.num_layers)]
        assert {type(layer.feed_forward) for layer in layers} <= {DenseConfig, ExpertsConfig}
        return [int(isinstance(layer.feed_forward, ExpertsConfig)) for layer in layers]

    assert kinds("qwen3_moe", **QWEN) == [1, 1, 1, 1]
    assert kinds("qwen3_moe", **QWEN, decoder_sparse_step=2, mlp_only_layers=[3]) == [0, 1, 0, 0]
    assert kinds("llama4_text", **MIXTRAL, interleave_moe_layer_step=2) == [0, 1, 0, 1]
    assert kinds("llama4_text", **MIXTRAL, moe_layers=[0]) == [1, 0, 0, 0]


@pytest.mark.parametrize(("transpose", "interleaved"), [(False, False), (True, False), (False, True)])
def test_two_projections_in_one(transpose, interleaved):
    """Each feature of each expert, one by one, and back."""
    E, D, F = 2, 3, 4
    whole = np.arange(E * D * 2 * F).reshape((E, 2 * F, D) if transpose else (E, D, 2 * F))
    entry, place = fused(("a", "b"), "x", transpose=transpose, interleaved=interleaved), Place(None)
    parts = entry.load([whole], place)
    for e, f, part in np.ndindex(E, F, 2):
        at = 2 * f + part if interleaved else part * F + f
        assert_array_equal(parts[part][e, :, f], whole[e, at] if transpose else whole[e, :, at])
    assert_array_equal(entry.save(parts, place)[0], whole)
    with pytest.raises(ValueError, match="two projections are no halves"):
        entry.load([whole[:, :-1] if transpose else whole[..., :-1]], place)


class _Memory:
    metadata = {}

    def __init__(self, arrays):
        self.arrays = arrays

    def names(self):
        return list(self.arrays)

    def shape(self, name):
        return self.arrays[name].shape

    def dtype(self, name):
        return self.arrays[name].dtype

    def read(self, name):
        return self.arrays[name]


def _packed(rng, E, rows, width):
    return {
        "w_blocks": rng.integers(0, 256, (E, rows, width // 32, 16), dtype=np.uint8),
        "w_scales": rng.integers(0, 253, (E, rows, width // 32), dtype=np.uint8),
    }


def test_mxfp4_is_what_the_format_says():
    """Sign, exponent and mantissa of every number by themselves, in float64."""
    arrays = _packed(np.random.default_rng(0), 2, 5, 64)
    view = unpacked(_Memory(arrays | {"other": np.ones(3)}))
    assert view.names() == ["other", "w"] and view.shape("w") == (2, 64, 5)
    found = view.read("w")
    assert found.dtype == view.dtype("w") == ml_dtypes.bfloat16
    for e, row, column in np.ndindex(2, 5, 64):
        byte = int(arrays["w_blocks"][e, row, column // 32, column % 32 // 2])
        bits = byte >> 4 if column % 2 else byte & 15
        exponent, mantissa = bits >> 1 & 3, bits & 1
        number = (1 + mantissa / 2) * 2.0 ** (exponent - 1) if exponent else mantissa / 2
        scale = 2.0 ** (int(arrays["w_scales"][e, row, column // 32]) - 127)
        assert float(found[e, column, row]) == (-number if bits & 8 else number) * scale
    assert_array_equal(view.read_slice("w", (slice(1, 2), slice(3, 9))), found[1:2, 3:9])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w_scales": np.full((2, 5, 2), 253, np.uint8)}, "tensor w_scales: a scale must be <= 252, got 253"),
        ({"w_scales": np.ones((2, 5, 3), np.uint8)}, r"got \[2, 5, 2, 16\] and \[2, 5, 3\]"),
        ({"w_blocks": np.ones((2, 5, 2, 16), np.int8)}, "blocks of MXFP4 are uint8"),
        ({"w": np.ones(3)}, "tensor w is there twice"),
    ],
)
def test_mxfp4_that_does_not_fit(change, message):
    arrays = _packed(np.random.default_rng(0), 2, 5, 64) | change
    with pytest.raises(ValueError, match=message):
        unpacked(_Memory(arrays)).read("w")


def test_gpt_oss_in_mxfp4_is_loaded_exactly_and_saved_unpacked(tmp_path):
    description = {"model_type": "gpt_oss"} | GPT_OSS | {"torch_dtype": "bfloat16"}
    family = family_of("gpt_oss")
    config = read_config(family, Description(description))
    params = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), random_params(config))
    tensors, rng = dict(saved_tensors(family, config, params)), np.random.default_rng(0)
    for name in [name for name in tensors if name.endswith("_proj") and ".experts." in name]:
        E, width, rows = tensors.pop(name).shape
        for end, x in _packed(rng, E, rows, width).items():
            tensors[name + end.removeprefix("w")] = x
    folder = tmp_path / "packed"
    folder.mkdir()
    specs = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in tensors.items()}
    write_safetensors(folder, specs, tensors.items())
    quantised = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(description | {"quantization_config": quantised}))
    loaded = load_pretrained(folder)
    assert loaded.config == config
    layer = "model.layers.1.mlp.experts.gate_up_proj"
    pair = _Memory({f"w_{part}": tensors[f"{layer}_{part}"] for part in ("blocks", "scales")})
    assert_array_equal(loaded.params["stacks"]["1"]["mlp"]["up"][0], unpacked(pair).read("w")[..., 1::2])
    save_pretrained(tmp_path / "saved", config, loaded.params, like=folder)
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    jax.tree.map(assert_array_equal, load_pretrained(tmp_path / "saved").params, loaded.params)
