"""Descriptions and tensors of GPT-2 and its successors: layouts against the formats, and what is refused."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from attention_jax.mixers import AttentionConfig
from attention_jax.model import BlockConfig, ModelConfig
from attention_jax.pretrained import family_of
from attention_jax.pretrained.description import Description
from attention_jax.pretrained.load import flatten, load_params, saved_tensors
from attention_jax.pretrained.models import read_config
from attention_jax.pretrained.table import Place, joined_by_group
from tests.params import random_params
from tests.tensor_files import Held

SIZES = {"vocab_size": 7, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = SIZES | {"intermediate_size": 6}
GPT = {"vocab_size": 7, "n_embd": 8, "n_layer": 2, "n_head": 2}
MPT = {"vocab_size": 7, "d_model": 8, "n_layers": 2, "n_heads": 2}


def _config(model_type: str, **keys) -> ModelConfig:
    return read_config(family_of(model_type), Description({"model_type": model_type} | keys))


@pytest.mark.parametrize(
    ("model_type", "keys", "message"),
    [
        ("gpt2", GPT | {"activation_function": "tanh"}, "activation_function must be one of silu"),
        ("gpt2", GPT | {"add_cross_attention": True}, "add_cross_attention True is not supported"),
        (
            "gpt2",
            GPT | {"embd_layer_norm": True},
            "embd_layer_norm True is not supported for model_type gpt2",
        ),
        ("gptj", GPT | {"rotary_dim": 4, "rotary": False}, "rotary False is not supported, only True"),
        ("gptj", GPT | {"rotary_dim": 4, "tie_word_embeddings": True}, "head_bias is true: a tied output"),
        (
            "gpt_neox",
            LLAMA | {"rotary_emb_base": 500, "rope_theta": 1e4},
            "rope_theta 10000.0 is not supported",
        ),
        (
            "gpt_neox",
            LLAMA | {"rotary_pct": 0.5, "hidden_dropout_prob": 0.1},
            "hidden_dropout_prob 0.1 is not",
        ),
        (
            "bloom",
            GPT | {"hidden_size": 16, "n_embed": 8},
            "hidden_size and n_embed mean the same, got {.*16",
        ),
        (
            "falcon",
            SIZES | {"num_ln_in_parallel_attn": 2},
            "num_ln_in_parallel_attn 2 is not supported, only 1",
        ),
        (
            "falcon",
            SIZES | {"multi_query": False, "num_kv_heads": 1},
            "num_kv_heads 1 is not supported, only 2",
        ),
        (
            "falcon",
            SIZES | {"new_decoder_architecture": True, "parallel_attn": False},
            "parallel_attn False is not",
        ),
        ("falcon", SIZES | {"ff_factor": 3}, "ff_factor 3 is not supported, only 4.0"),
        ("mpt", MPT | {"attn_config": {"alibi": False}}, "attn_config: alibi False is not supported"),
        (
            "mpt",
            MPT | {"attn_config": {"qk_ln": True}},
            "attn_config: qk_ln True is not supported",
        ),
        ("mpt", MPT | {"attn_config": {"attn_type": "grouped_query_attention"}}, "only multihead_attention"),
        ("mpt", MPT | {"attn_config": {"rope": True}}, "rope True is not supported"),
        (
            "mpt",
            MPT | {"logit_scale": "inv_sqrt_d_model"},
            "logit_scale 'inv_sqrt_d_model' is not supported$",
        ),
        ("mpt", MPT | {"no_bias": False}, "no_bias False is not supported, only True"),
        ("phi3", LLAMA | {"mlp_bias": True}, "mlp_bias True is not supported"),
        ("cohere2", LLAMA | {"layer_switch": 3}, "layer_switch 3 is not supported, only 4"),
        ("cohere2", LLAMA | {"sliding_window_pattern": 0}, "sliding_window_pattern must be >= 1, got 0"),
        ("granite", LLAMA | {"logits_scaling": 0}, "logits_scaling divides the logits, got 0"),
    ],
)
def test_options_that_are_not_implemented(model_type, keys, message):
    with pytest.raises(ValueError, match=message) as error:
        _config(model_type, **keys)
    assert str(error.value).startswith("config.json: ") and len(str(error.value)) < 200


@pytest.mark.parametrize("kv_heads", [6, 2, 1])
def test_the_joined_layout_by_groups(kv_heads):
    """The rows of each projection, one by one, and back."""
    N, H, D = 6, 2, 12
    block = BlockConfig(AttentionConfig(num_heads=N, num_kv_heads=kv_heads, use_bias=True))
    place = Place(ModelConfig(vocab_size=3, d_model=D, blocks=(block,)), block, 0)
    group = N // kv_heads
    rows = [
        (kind, k, j)
        for k in range(kv_heads)
        for kind, j in [("q", j) for j in range(group)] + [("k", 0), ("v", 0)]
    ]
    whole_ED = np.arange(len(rows) * H * D, dtype=np.float32).reshape(-1, D)
    kernel, bias = joined_by_group("qkv")
    for entry, whole in ((kernel, whole_ED), (bias, whole_ED[:, 0])):
        parts = dict(zip("qkv", entry.load([whole], place), strict=True))
        for index, (kind, k, j) in enumerate(rows):
            head = k * group + j if kind == "q" else k
            assert_array_equal(parts[kind].T[head * H : (head + 1) * H], whole[index * H : (index + 1) * H])
        (back,) = entry.save([parts[name] for name in "qkv"], place)
        assert_array_equal(back, whole)
        with pytest.raises(ValueError, match="not .* along axis 0"):
            entry.load([whole[1:]], place)


def test_names_of_older_files():
    """GPT-2 as on the hub: without a prefix, with the masks, and with the tied head."""
    config, family = _config("gpt2", **GPT, n_positions=4), family_of("gpt2")
    params = random_params(config)
    saved = dict(saved_tensors(family, config, params))
    assert "transformer.h.1.attn.c_attn.weight" in saved
    old = {name.removeprefix("transformer."): x for name, x in saved.items()}
    old |= {"h.0.attn.bias": np.ones((1, 1, 4, 4)), "lm_head.weight": saved["transformer.wte.weight"]}
    found = flatten(load_params(family, config, Held(old)))
    wanted = flatten(params)
    assert found.keys() == wanted.keys()
    jax.tree.map(assert_array_equal, found, wanted)
    with pytest.raises(ValueError, match=r"tensor transformer.wte.weight is there twice, also as wte.weight"):
        load_params(family, config, Held(saved | {"wte.weight": saved["transformer.wte.weight"]}))
    with pytest.raises(ValueError, match=r"lm_head.weight differs from transformer.wte.weight"):
        load_params(family, config, Held(saved | {"lm_head.weight": 2 * saved["transformer.wte.weight"]}))


def test_steeper_alibi():
    """MPT-7B-StoryWriter: transformers reads alibi_bias_max and ignores it."""
    config = _config("mpt", **MPT, attn_config={"alibi_bias_max": 16, "clip_qkv": 6})
    mixer = config.period[0].mixer
    assert (mixer.bias.max_exponent, mixer.clip_qkv) == (16.0, 6.0)


def test_dropout_rates():
    """Those of the branches, of the embedding and of the attention each by itself."""
    config = _config("gpt2", **GPT, resid_pdrop=0.1, embd_pdrop=0.2, attn_pdrop=0.3)
    assert (config.dropout, config.embedding_dropout, config.period[0].mixer.dropout) == (0.1, 0.2, 0.3)
    config = _config("falcon", **SIZES, hidden_dropout=0.1)
    assert (config.dropout, config.embedding_dropout) == (0.1, 0.0)
