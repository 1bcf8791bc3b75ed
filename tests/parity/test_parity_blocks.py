"""Whole blocks: norms, feed-forward and attention of published models, and Gemma's scaled embeddings."""

import zlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import pytest
import torch
from flax import nnx

from attention_jax.mixers import AttentionConfig, Context
from attention_jax.model import ModelConfig, apply
from attention_jax.model.block import Block
from attention_jax.positions import RoPE
from tests.parity import peers, softmax_rows
from tests.parity.softmax_rows import EAGER, POSITIONS, SIZES, H, K, N, config_of, linears, model_file

F = 56  # the hidden width of the feed-forward
B, T, D = peers.B, peers.T, peers.D


class Row(NamedTuple):
    """A decoder layer written elsewhere and our block; weights: our parameters from the peer's by name."""

    model: dict
    mixer: AttentionConfig
    build: Callable
    call: Callable
    weights: Callable


def _decoder(
    family: str, prefix: str, options: dict, model: dict, mixer: AttentionConfig, norms: dict
) -> Row:
    """A layer of transformers of (x, position_embeddings, attention_mask); norms: its names of our norms."""
    options = SIZES | EAGER | {"num_hidden_layers": 4, "intermediate_size": F} | options
    file, config = model_file(family), config_of(family, f"{prefix}Config", **options)
    shift = 1.0 if family == "gemma2" else 0.0

    def call(module, x):
        angles = getattr(file, f"{prefix}RotaryEmbedding")(config)(x, POSITIONS)
        return module(x, position_embeddings=angles, attention_mask=peers.causal_mask(T).to(x.dtype))

    def weights(p):
        attention = {name.removeprefix("self_attn."): x for name, x in p.items() if "self_attn." in name}
        out = softmax_rows.llama_weights(attention, 1.0)
        if "q_norm.weight" in attention:
            out |= {f"{n}_norm/scale": attention[f"{n}_norm.weight"].reshape(-1, H) for n in "qk"}
        out = {f"mixer/{path}": x for path, x in out.items()}
        mlp = linears(p, gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj")
        out |= {f"mlp/{path}": x for path, x in mlp.items()}
        return out | {f"{ours}/scale": shift + p[f"{theirs}.weight"] for ours, theirs in norms.items()}

    return Row(
        model, mixer, lambda: getattr(file, f"{prefix}DecoderLayer")(config, layer_idx=1), call, weights
    )


def _gemma2() -> Row:
    return _decoder(
        "gemma2", "Gemma2",
        {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 24, "rms_norm_eps": 1e-6,
         "hidden_activation": "gelu_pytorch_tanh", "rope_parameters": softmax_rows.rope_parameters(1e4)},
        {"mlp": "geglu_tanh", "norm_order": "sandwich", "norm_eps": 1e-6},
        AttentionConfig(num_heads=N, num_kv_heads=K, head_dim=H, rope=RoPE(), softcap=2.0, scale=24**-0.5),
        {"norm1": "input_layernorm", "post_norm1": "post_attention_layernorm",
         "norm2": "pre_feedforward_layernorm", "post_norm2": "post_feedforward_layernorm"},
    )  # fmt: skip


def _olmo2() -> Row:
    return _decoder(
        "olmo2", "Olmo2", {"rms_norm_eps": 1e-5, "rope_parameters": softmax_rows.rope_parameters(1e4)},
        {"mlp": "swiglu", "norm_order": "post", "norm_eps": 1e-5},
        AttentionConfig(
            num_heads=N, num_kv_heads=K, head_dim=H, rope=RoPE(), qk_norm="rms_all_heads", qk_norm_eps=1e-5
        ),
        {"post_norm1": "post_attention_layernorm", "post_norm2": "post_feedforward_layernorm"},
    )  # fmt: skip


def _gpt2() -> Row:
    config = config_of(
        "gpt2", "GPT2Config", n_embd=D, n_head=N, n_inner=F, attn_implementation="eager", resid_pdrop=0.0,
        attn_pdrop=0.0, activation_function="gelu_new",
    )  # fmt: skip

    def weights(p):
        out = {}
        for name, kernel, bias in zip(
            "qkv",
            np.split(p["attn.c_attn.weight"], 3, axis=1),
            np.split(p["attn.c_attn.bias"], 3),
            strict=True,
        ):
            out |= {f"mixer/{name}/kernel": kernel, f"mixer/{name}/bias": bias}
        for ours, theirs in {
            "mixer/out": "attn.c_proj",
            "mlp/up": "mlp.c_fc",
            "mlp/down": "mlp.c_proj",
        }.items():
            out |= {f"{ours}/kernel": p[f"{theirs}.weight"], f"{ours}/bias": p[f"{theirs}.bias"]}
        for ours, theirs in {"norm1": "ln_1", "norm2": "ln_2"}.items():
            out |= {f"{ours}/scale": p[f"{theirs}.weight"], f"{ours}/bias": p[f"{theirs}.bias"]}
        return out

    return Row(
        {"mlp": "gelu_tanh", "norm": "layernorm", "use_bias": True, "norm_eps": 1e-5},
        AttentionConfig(num_heads=N, use_bias=True),
        lambda: model_file("gpt2").GPT2Block(config, layer_idx=0),
        lambda module, x: module(x, attention_mask=peers.causal_mask(T).to(x.dtype)),
        weights,
    )


@pytest.mark.parametrize("row", [_gemma2, _olmo2, _gpt2], ids=lambda row: row.__name__[1:])
def test_a_block_computes_what_its_peer_computes(row):
    rng, row = np.random.default_rng(zlib.crc32(row.__name__.encode())), row()
    module = peers.draw(row.build(), rng)
    x = rng.normal(size=(B, T, D)).astype(np.float32)
    config = ModelConfig(d_model=D, num_layers=1, mixers=(row.mixer,), mlp_width=F, **row.model)
    graphdef, state = nnx.split(Block(config, config.period[0], causal=True, rngs=nnx.Rngs(0)))
    given = row.weights(peers.arrays(module))
    pure = nnx.to_pure_dict(state)
    names = {
        "/".join(str(key.key) for key in path): x.shape
        for path, x in jax.tree_util.tree_leaves_with_path(pure)
    }
    assert names == {path: np.shape(x) for path, x in given.items()}
    nnx.replace_by_pure_dict(
        state,
        jax.tree_util.tree_map_with_path(
            lambda path, _: np.array(given["/".join(str(key.key) for key in path)], np.float32), pure
        ),
    )
    with torch.no_grad():
        expected = row.call(module, torch.from_numpy(x)).numpy()
    y = jax.jit(lambda state, x: nnx.merge(graphdef, state).mix(x, None, ctx=Context()).y)(state, x)
    assert peers.error(np.asarray(y), expected) <= 1e-6
    # The other form of GELU is another function, and the comparison tells them apart.
    if row.model["mlp"].endswith("_tanh"):
        other = ModelConfig(
            d_model=D, num_layers=1, mixers=(row.mixer,), mlp_width=F,
            **(row.model | {"mlp": row.model["mlp"].removesuffix("_tanh")}),
        )  # fmt: skip
        graphdef, _ = nnx.split(
            nnx.eval_shape(lambda: Block(other, other.period[0], causal=True, rngs=nnx.Rngs(0)))
        )
        y = nnx.merge(graphdef, state).mix(x, None, ctx=Context()).y
        assert peers.error(np.asarray(y), expected) > 1e-5


def test_gemma_2_as_a_whole_gives_the_peer_logits():
    """Two layers, one of them with a window, as in configs/gemma_shaped.yaml; scaled embeddings."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    vocabulary, window = 31, 5
    config = Gemma2Config(
        vocab_size=vocabulary, num_hidden_layers=2, intermediate_size=F, attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0, query_pre_attn_scalar=H, sliding_window=window, rms_norm_eps=1e-6,
        layer_types=["sliding_attention", "full_attention"], pad_token_id=None,
        hidden_activation="gelu_pytorch_tanh", rope_parameters=softmax_rows.rope_parameters(1e4),
        **SIZES, **EAGER,
    )  # fmt: skip
    rng = np.random.default_rng(5)
    module = peers.draw(Gemma2ForCausalLM(config), rng)
    tokens = rng.integers(0, vocabulary, (B, T))
    with torch.no_grad():
        expected = module(torch.from_numpy(tokens)).logits.numpy()
    mixer = {"num_heads": N, "num_kv_heads": K, "head_dim": H, "rope": RoPE(), "softcap": 50.0}
    ours = ModelConfig(
        vocab_size=vocabulary, d_model=D, num_layers=2, mlp="geglu_tanh", mlp_width=F, norm_order="sandwich",
        norm_eps=1e-6, embedding_scale=D**0.5, logit_softcap=30.0,
        mixers=(AttentionConfig(mask=f"SlidingWindow({window})", **mixer), AttentionConfig(**mixer)),
    )  # fmt: skip
    weights, p = _gemma2().weights, peers.arrays(module)
    params = {
        "embed": {"embedding": p["model.embed_tokens.weight"]},
        "final_norm": {"scale": 1 + p["model.norm.weight"]},
        "stacks": {},
    }
    for layer in range(2):
        prefix, tree = f"model.layers.{layer}.", {}
        for path, x in weights(
            {k.removeprefix(prefix): x for k, x in p.items() if k.startswith(prefix)}
        ).items():
            *folders, leaf = path.split("/")
            place = tree
            for folder in folders:
                place = place.setdefault(folder, {})
            place[leaf] = np.float32(x)[None]
        params["stacks"][str(layer)] = tree
    logits = np.asarray(apply(ours, params, tokens).logits)
    assert peers.error(logits, expected) <= 2e-6
