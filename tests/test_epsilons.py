"""Every epsilon inside a layer is an option, has a documented default, and is the one that the layer adds."""

import ast
import dataclasses
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import attention_jax
from attention_jax.layers import GatedRMSNorm, HeadGroupNorm, head_norm
from attention_jax.mixers import Context, mixer_kinds
from attention_jax.model import ModelConfig, apply, init_params
from train.config.keys import meanings

# The defaults are those of every model that was trained before they were options.
DEFAULTS = {
    "softmax": {"qk_norm_eps": 1e-6},
    "cross": {"qk_norm_eps": 1e-6},
    "gated": {"qk_norm_eps": 1e-6},
    "forgetting": {"qk_norm_eps": 1e-6, "norm_eps": 1e-6},
    "differential": {"qk_norm_eps": 1e-6, "norm_eps": 1e-5},
    "mla": {"norm_eps": 1e-6},
    "retention": {"norm_eps": 1e-5},
    "gla": {"norm_eps": 1e-5},
    "lightning": {"norm_eps": 1e-5},
    "mamba2": {"norm_eps": 1e-5},
    "deltanet": {"qk_norm_eps": 1e-6, "norm_eps": 1e-5},
    "gated_deltanet": {"qk_norm_eps": 1e-6, "norm_eps": 1e-5},
    "kda": {"qk_norm_eps": 1e-6, "norm_eps": 1e-5},
    "linear": {"norm_eps": 1e-6, "normalizer_eps": 0.0},
    "cosformer": {"norm_eps": 1e-6, "normalizer_eps": 0.0},
    "based": {"norm_eps": 1e-6, "normalizer_eps": 0.0},
    "hedgehog": {"norm_eps": 1e-6, "normalizer_eps": 0.0},
    "performer": {"norm_eps": 1e-6},
}
# What makes a layer have the norms that are off by default, and small sizes.
OPTIONS = {
    "qk_norm": "rms", "output_norm": "rms", "query_latent_dim": 5, "horizon": 16, "num_features": 4,
    "convolution": 2, "head_dim": 4, "state_dim": 4, "latent_dim": 4, "rotary_dim": 2,
}  # fmt: skip
# Distinct and of no use elsewhere; a float32 is printed with all of its digits.
VALUES = (0.1015625, 0.3203125)
SMALL = 1e-3


def _epsilons(kind: str) -> dict[str, float]:
    fields = dataclasses.fields(mixer_kinds()[kind])
    return {field.name: field.default for field in fields if field.name.endswith("_eps")}


def _program(config) -> str:
    """The program of a mixer's parallel form, with its literals."""
    causal = config.direction != "bidirectional"
    mixer = nnx.eval_shape(lambda: config.build(8, nnx.Rngs(0), causal=causal))
    graphdef, weights = nnx.split(mixer)
    ctx = Context(memory_BSD=jnp.ones((1, 3, 8)) if config.reads_memory else None)

    def run(weights, x):
        return nnx.merge(graphdef, weights).mix(x, None, ctx=ctx).y

    return str(jax.make_jaxpr(run)(weights, jax.ShapeDtypeStruct((1, 3, 8), jnp.float32)))


def _literals(program: str) -> list[str]:
    return re.findall(r"(?<![\w.])\d+\.\d+(?:e-?\d+)?(?=:f)", program)


@pytest.mark.parametrize("kind", mixer_kinds())
def test_a_mixer_adds_the_epsilons_that_its_config_names(kind):
    """Each value is a literal of the program, and no other small number is.

    The contract of tests/test_mixers.py has large epsilons, too, with and without a cache.
    """
    cls = mixer_kinds()[kind]
    assert _epsilons(kind) == DEFAULTS.get(kind, {})
    assert all(meanings(cls)[name] for name in _epsilons(kind))
    known = {field.name for field in dataclasses.fields(cls)}
    options = {name: value for name, value in OPTIONS.items() if name in known}
    chosen = dict(zip(_epsilons(kind), VALUES, strict=False))
    literals = {float(text) for text in _literals(_program(cls(**options, **chosen)))}
    assert set(chosen.values()) <= literals
    # A power of two is a unit of rounding.
    assert not {x for x in literals if 0 < x <= SMALL and math.frexp(x)[0] != 0.5}


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_norm_eps_of_a_model_is_that_of_its_norms_and_of_no_mixer(norm):
    config = ModelConfig(
        vocab_size=5, d_model=8, num_layers=1, norm=norm, norm_order="sandwich", norm_eps=VALUES[0],
        mixers=(mixer_kinds()["softmax"](qk_norm="rms", qk_norm_eps=VALUES[1]),),
    )  # fmt: skip
    params = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((1, 3), jnp.int32)
    program = jax.make_jaxpr(lambda params, tokens: apply(config, params, tokens).logits)(params, tokens)
    found = _literals(str(program))
    # Four norms of the layer and the last one; queries and keys.
    assert [found.count(str(value)) for value in VALUES] == [5, 2]


# Small numbers that are no epsilon, by the name of the option or of the argument that they are given to.
NOT_EPSILONS = {"dt_min"}
NORMS = {"RMSNorm", "LayerNorm", "GroupNorm", "BatchNorm", "InstanceNorm"}
FILES = sorted(
    path
    for folder in ("layers", "mixers", "model")
    for path in (Path(attention_jax.__file__).parent / folder).glob("*.py")
) + [Path(attention_jax.__file__).parent / "feature_maps.py"]


def _called(node: ast.Call) -> str:
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def hidden_epsilons(source: str) -> list[str]:
    """Small numbers that stand elsewhere than as an option's default, and norms that are given no epsilon."""
    tree, found = ast.parse(source), []
    allowed = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and (node.target.id.endswith("_eps") or node.target.id in NOT_EPSILONS)
    }
    # The limits of options.
    limits = [
        part
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare) or (isinstance(node, ast.Call) and _called(node) == "check_between")
        for part in ast.walk(node)
    ]
    allowed |= set(map(id, limits))
    for node in ast.walk(tree):
        value = getattr(node, "value", None)
        if isinstance(node, ast.Constant) and isinstance(value, float) and 0 < value <= SMALL:
            if id(node) not in allowed:
                found.append(f"line {node.lineno}: {value}")
        elif isinstance(node, ast.Call) and (name := _called(node)) in NORMS:
            names = {keyword.arg for keyword in node.keywords}
            if not names & {"epsilon", None}:  # None: ** of options, which the programs above show
                found.append(f"line {node.lineno}: {name} without an epsilon")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_no_epsilon_is_out_of_reach(path):
    assert hidden_epsilons(path.read_text("utf-8")) == []


def test_a_hidden_epsilon_is_found():
    assert hidden_epsilons("def f(x):\n    return x / (x.sum() + 1e-6)") == ["line 2: 1e-06"]
    assert hidden_epsilons("n = nnx.RMSNorm(4, rngs=r)") == ["line 1: RMSNorm without an epsilon"]
    assert hidden_epsilons("class C:\n    norm_eps: float = 1e-5\n    dt_min: float = 1e-3") == []


@pytest.mark.parametrize(
    "make",
    [
        lambda rngs: GatedRMSNorm(4, rngs=rngs),
        lambda rngs: HeadGroupNorm(2, 4, rngs=rngs),
        lambda rngs: head_norm("rms", 2, 4, dtype=jnp.float32, rngs=rngs),
    ],
)
def test_a_norm_has_no_default_epsilon(make):
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'epsilon'"):
        make(nnx.Rngs(0))


@pytest.mark.parametrize("value", [-1e-6, float("nan"), float("inf")])
@pytest.mark.parametrize("kind", DEFAULTS)
def test_an_epsilon_is_a_number_of_at_least_0(kind, value):
    for name in _epsilons(kind):
        with pytest.raises(ValueError, match=f"{name} must be (finite|0, or from 1e-12 to 1), got {value}"):
            mixer_kinds()[kind](**{name: value})
    with pytest.raises(ValueError, match="norm_eps must be (finite|0, or from 1e-12 to 1), got"):
        ModelConfig(norm_eps=value)
