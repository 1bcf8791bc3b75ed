"""Published models in folders that are written here: what is loaded, what is saved, and what is refused."""

import dataclasses
import json
import shutil
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest

from attention_jax.generation import Sampling, generate
from attention_jax.positions import RoPE
from attention_jax.positions.scalings import LinearScaling, Llama3, LongRoPE, YaRN
from attention_jax.pretrained import FAMILIES, family_of, load_pretrained, save_pretrained
from attention_jax.pretrained.__main__ import main
from attention_jax.pretrained.description import Description
from attention_jax.pretrained.files import write_safetensors
from attention_jax.pretrained.gguf_models import GGUFModel
from attention_jax.pretrained.load import load_params, saved_specs, saved_tensors
from attention_jax.pretrained.models import read_config
from attention_jax.pretrained.rope import read_rope
from tests.params import random_params
from tests.tensor_files import Held

LLAMA = {
    "model_type": "llama", "vocab_size": 23, "hidden_size": 8, "intermediate_size": 12,
    "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}  # fmt: skip
NAME = "model.layers.1.mlp.up_proj.weight"


def _tensors(description, dtype=np.float32):
    """(config, params, tensors by name) of a random model."""
    family = family_of(description["model_type"])
    config = read_config(family, Description(description))
    params = jax.tree.map(lambda x: x.astype(dtype), random_params(config))
    return config, params, dict(saved_tensors(family, config, params))


def _write(folder, description, tensors):
    specs = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in tensors.items()}
    write_safetensors(folder, specs, tensors.items())
    (folder / "config.json").write_text(json.dumps(description))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    _, _, tensors = _tensors(LLAMA)
    return _write(tmp_path_factory.mktemp("llama") / "model", LLAMA, tensors)


def _changed(folder, tmp_path, *, config=(), tensors=lambda x: x):
    """A copy of the folder with other keys in config.json, and other tensors."""
    _, _, there = _tensors(LLAMA)
    return _write(tmp_path / "model", LLAMA | dict(config), tensors(there))


def test_loading_and_saving_keep_every_bit(folder, tmp_path):
    expected = _tensors(LLAMA)
    config, params, tokenizer = load_pretrained(folder)
    assert (config, tokenizer) == (expected[0], None)
    jax.tree.map(np.testing.assert_array_equal, params, expected[1])
    shutil.copyfile(folder / "config.json", folder / "generation_config.json")
    save_pretrained(tmp_path / "saved", config, params, like=folder)
    saved = tmp_path / "saved"
    for name in ("generation_config.json", "model.safetensors"):
        assert (saved / name).read_bytes() == (folder / name).read_bytes()
    assert json.loads((saved / "config.json").read_text()) == LLAMA | {"torch_dtype": "float32"}


def test_stored_and_computed_dtype_are_two_things(folder, tmp_path):
    config, params, _ = load_pretrained(folder, dtype="bfloat16", compute_dtype="bfloat16")
    assert config.dtype == "bfloat16" and {x.dtype.name for x in jax.tree.leaves(params)} == {"bfloat16"}
    _, whole, _ = load_pretrained(folder)
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(x, np.asarray(y).astype(ml_dtypes.bfloat16)), params, whole
    )
    save_pretrained(tmp_path / "saved", config, params, like=folder)
    again = load_pretrained(tmp_path / "saved")
    assert again.config.dtype == "float32"
    jax.tree.map(np.testing.assert_array_equal, again.params, params)


def test_a_mesh_splits_every_parameter_that_it_divides(folder):
    mesh = jax.make_mesh((len(jax.devices()),), ("data",))
    _, params, _ = load_pretrained(folder, mesh=mesh)
    _, whole, _ = load_pretrained(folder)
    jax.tree.map(np.testing.assert_array_equal, params, whole)
    assert all(set(x.sharding.device_set) == set(mesh.devices.flat) for x in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llma"}, "model_type 'llma' is not supported; did you mean llama"),
        ({"model_type": "t5"}, "model_type 't5' is not supported; see `python -m attention_jax.pretrained`"),
        ({"model_type": None}, "config.json: model_type is missing"),
        ({"hidden_size": None}, "config.json: hidden_size is missing"),
        ({"hidden_size": -8}, "hidden_size must be a whole number from 0 to 2.31 - 1, got -8"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a finite number, got nan"),
        ({"hidden_act": "mish"}, "hidden_act must be one of silu, .*, got 'mish'"),
        ({"attention_bias": "yes"}, "attention_bias must be true or false, got 'yes'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config {'bits': 4} is not supported"),
        ({"sliding_window": 7}, "sliding_window 7 is not supported for model_type llama"),
        ({"num_key_value_heads": 3}, "num_key_value_heads? 3 does not divide num_heads 2|num_kv_heads 3"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "rope_type 'dynamic' is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "foo": 1}}, "rope_scaling: foo 1 is not supported"),
        ({"rope_scaling": [2]}, "rope_scaling: a description must be a mapping of keys, got list"),
        ({"hidden_size": 16, "head_dim": 4}, "gives .* the shape"),
        ({"num_hidden_layers": 4}, "tensor model.layers.3.* is missing"),
        ({"num_hidden_layers": 2}, "tensor model.layers.2.* is not known in a checkpoint of Llama"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be from 1 to 10000, got 1000000000"),
        ({"tie_word_embeddings": True}, "tensor lm_head.weight differs from model.embed_tokens.weight"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(folder, tmp_path, change, message):
    with pytest.raises(ValueError, match=message) as error:
        load_pretrained(_changed(folder, tmp_path, config=change))
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"model.layers.0.x.weight": t[NAME]}, "tensor model.layers.0.x.weight is not known"),
        (lambda t: {n: x for n, x in t.items() if n != NAME}, f"tensor {NAME} is missing"),
        (lambda t: t | {NAME: t[NAME].T.copy()}, f"tensor {NAME} gives stacks/0/mlp/up/kernel the shape"),
        (lambda t: t | {"model.rotary_emb.inv_freq": np.ones(2, np.float32)}, None),
    ],
)
def test_tensors_that_do_not_fit_are_refused(folder, tmp_path, change, message):
    path = _changed(folder, tmp_path, tensors=change)
    if message is None:  # a buffer that older files hold
        load_pretrained(path)
        return
    with pytest.raises(ValueError, match=message):
        load_pretrained(path)


def test_folders_and_names_that_are_none(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no such folder or file, and not a name on the hub"):
        load_pretrained(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"model.safetensors"):
        load_pretrained(tmp_path / "empty")
    shutil.copytree(folder, tmp_path / "text")
    (tmp_path / "text/config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: not JSON"):
        load_pretrained(tmp_path / "text")
    config, params, _ = load_pretrained(folder)
    with pytest.raises(ValueError, match="describes another model than config: norm_eps differs"):
        save_pretrained(tmp_path / "x", dataclasses.replace(config, norm_eps=1e-4), params, like=folder)
    assert not (tmp_path / "x").exists()


def test_memory_is_that_of_the_model(tmp_path):
    """Loading 120 MB grows the process by less than 1.2 times as much."""
    sizes = {"vocab_size": 4000, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}
    description = LLAMA | sizes | {"num_attention_heads": 8}
    config, params, tensors = _tensors(description)
    size = sum(x.nbytes for x in tensors.values())
    _write(tmp_path / "model", description, tensors)
    del params, tensors
    code = (
        "import resource, sys; from attention_jax.pretrained import load_pretrained, models\n"
        "import jax; jax.device_put(0); before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "kept = load_pretrained(sys.argv[1])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model")], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) * 1024 < 1.2 * size + 20e6, (int(done.stdout) / 1e3, size / 1e6)


def _rope(**keys):
    return read_rope(Description({"max_position_embeddings": 64} | keys), 8)


def test_rope_in_both_spellings():
    assert _rope() == RoPE()
    assert _rope(rope_theta=5e5, partial_rotary_factor=0.5) == RoPE(theta=5e5, width=4)
    new = {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.5}
    assert _rope(rope_parameters=new) == RoPE(theta=5e5, width=4)
    llama3 = {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32
    }  # fmt: skip
    expected = RoPE(theta=5e5, scaling=Llama3(original_length=32))
    assert _rope(rope_theta=5e5, rope_scaling={"type": "llama3"} | llama3) == expected
    assert _rope(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5} | llama3) == expected
    assert _rope(rope_scaling={"type": "linear", "factor": 2}).scaling == LinearScaling(factor=2.0)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    assert _rope(rope_scaling=yarn).scaling == YaRN(factor=4.0, original_length=16)
    both = _rope(rope_scaling=yarn | {"mscale": 0.7, "mscale_all_dim": 0.5}).scaling
    assert (both.mscale, both.mscale_all_dim) == (0.7, 0.5)
    assert _rope(rope_scaling=yarn | {"mscale": 0.7}).scaling == YaRN(factor=4.0, original_length=16)
    long = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    found = _rope(rope_scaling=long, original_max_position_embeddings=16).scaling
    assert found == LongRoPE(
        short_factor=(1.0,) * 4, long_factor=(2.0,) * 4, original_length=16, length=16,
        attention_factor=(1 + np.log(4) / np.log(16)) ** 0.5,
    )  # fmt: skip


def test_a_length_chooses_the_factors_of_longrope_and_limits_the_text(tmp_path):
    long = {"type": "longrope", "short_factor": [1.0] * 2, "long_factor": [2.0] * 2}
    description = LLAMA | {"rope_scaling": long, "max_position_embeddings": 64}
    description |= {"original_max_position_embeddings": 16}
    _, _, tensors = _tensors(description)
    _write(tmp_path / "model", description, tensors)
    limits = {}
    for length in (None, 40):
        config, params, _ = load_pretrained(tmp_path / "model", length=length)
        limits[length] = config.limit
        save_pretrained(tmp_path / f"saved {length}", config, params, like=tmp_path / "model")
    key = "blocks.0.mixer.rope.scaling.length"
    assert limits == {None: (16, key), 40: (40, key)}
    with pytest.raises(ValueError, match=f"{key} 40"):
        generate(config, params, [np.zeros(30, np.int32)], max_new_tokens=20, sampling=Sampling(0))


GGUF = {
    "general.architecture": "llama", "llama.block_count": 3, "llama.context_length": 64,
    "llama.embedding_length": 8, "llama.feed_forward_length": 12, "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1, "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.dimension_count": 4, "llama.rope.freq_base": 1e4,
}  # fmt: skip
_TO_GGUF = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def _as_gguf(tensors):
    """The names and the rows that llama.cpp's converter writes."""
    out = {}
    for name, x in tensors.items():
        for theirs, ours in _TO_GGUF.items():
            name = name.replace(theirs, ours)
        name = name.replace("model.layers", "blk").replace("model.embed_tokens", "token_embd")
        name = name.replace("model.norm", "output_norm").replace("lm_head", "output")
        if (heads := {"attn_q": 2, "attn_k": 1}.get(name.split(".")[-2])) is not None:
            x = x.reshape(heads, 2, -1, x.shape[1]).swapaxes(1, 2).reshape(x.shape)
        out[name] = x
    return out


def test_gguf_is_the_same_checkpoint():
    config, params, tensors = _tensors(LLAMA)
    model = GGUFModel(Held(_as_gguf(tensors), GGUF), "x.gguf")
    family = family_of(model.model_type)
    assert read_config(family, model.description) == config
    jax.tree.map(np.testing.assert_array_equal, load_params(family, config, model), params)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "rwkv6"}, "general.architecture 'rwkv6' is not supported; there are llama"),
        ({"llama.expert_count": 8}, "llama.expert_count 8 is not supported"),
        ({"llama.rope.scaling.type": "yarn"}, "rope.scaling.type 'yarn' is not supported"),
        ({"llama.rope.dimension_count": 2}, "llama.rope.dimension_count 2 is not the width 4 of a head"),
    ],
)
def test_gguf_that_is_not_understood(change, message):
    _, _, tensors = _tensors(LLAMA)
    with pytest.raises(ValueError, match=message):
        GGUFModel(Held(_as_gguf(tensors), GGUF | change), "x.gguf")


def test_the_list_of_families(capsys):
    main()
    shown = capsys.readouterr().out
    assert all(name in shown for family in FAMILIES for name in family.model_types)


def test_specs_tell_what_is_written():
    config, params, tensors = _tensors(LLAMA, ml_dtypes.bfloat16)
    specs = saved_specs(family_of("llama"), config, params)
    found = {name: (spec.shape, spec.dtype) for name, spec in specs.items()}
    assert found == {name: (x.shape, x.dtype) for name, x in tensors.items()}
    assert {dtype for _, dtype in found.values()} == {np.dtype(ml_dtypes.bfloat16)}
