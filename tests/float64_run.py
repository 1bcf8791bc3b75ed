"""Computation in float64 against NumPy: run as `JAX_ENABLE_X64=1 python -m tests.float64_run [row ...]`.

Prints a JSON object. errors: the largest error of each check, relative to the largest entry. narrowed: the
equations of a model's program that round float64 to a narrower dtype. Without rows: all of tests/mixers.py.
"""

from __future__ import annotations

import dataclasses
import json
import sys

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attention_jax.feed_forwards import ExpertsConfig
from attention_jax.generation import decode_step, prefill
from attention_jax.mixers import AttentionConfig, Context, GatedDeltaNetConfig, PerformerConfig, make_config
from attention_jax.model import BlockConfig, ModelConfig, apply, init_params, prepare_for_decoding
from attention_jax.positions import RoPE
from tests.harness import Harness
from tests.mixers import BIDIRECTIONAL, BIDIRECTIONAL_ONLY, D_MODEL, MIXERS, dense, mask_of

B, T = 2, 19
#: Rows whose gradient is compared with differences of the reference: one of each op.
GRADIENTS = ("gated", "forgetting", "nsa-rope", "mamba2", "gated-deltanet", "performer")


def error(found, expected) -> float:
    """The largest difference, relative to the largest entry; of unequal dtypes, infinite."""
    if found.dtype != jnp.float64:
        return float("inf")
    expected = np.asarray(expected, np.float64)
    return float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())


def mixer_errors(name: str, exhaustive: bool) -> dict[str, float]:
    """Those of a row's forward pass in both implementations, of its states and of its gradient."""
    row = (MIXERS | BIDIRECTIONAL | BIDIRECTIONAL_ONLY)[name]
    causal = name in MIXERS
    harness = Harness(row.config, dtype=jnp.float64, causal=causal)
    x = np.random.default_rng(1).standard_normal((B, T, D_MODEL))
    params = nnx.to_pure_dict(harness.params)

    def reference(params, x_TD):
        given = () if name in BIDIRECTIONAL_ONLY else (dense(mask_of(row.config), T),)
        return row.reference(params, x_TD, *given)

    expected = reference(params, x[0])
    found = {"": error(harness.parallel(x)[0], expected)}
    if exhaustive and causal:
        other = Harness(row.config, impl=row.impls[1], dtype=jnp.float64)
        found[" " + row.impls[1]] = error(other.parallel(x)[0], expected)
        found[" cached"] = error(harness.cached(x, (9, 10, 19))[0][0], expected)
    if exhaustive and name in GRADIENTS:
        h, along = 1e-4, np.random.default_rng(2).standard_normal((T, D_MODEL))
        # Five points: the error of the difference is of order h^4.
        ends = [(reference(params, x[0] + i * h * along) ** 2).sum() for i in (-2, -1, 1, 2)]
        slope = (ends[0] - 8 * ends[1] + 8 * ends[2] - ends[3]) / (12 * h)
        gradient = jax.jit(
            jax.grad(lambda x: (harness.run(harness.params, x, None, Context())[0][0] ** 2).sum())
        )
        found[" gradient"] = abs(float((gradient(x)[0] * along).sum()) / slope - 1)
    return {name + what: value for what, value in found.items()}


def hybrid() -> ModelConfig:
    """Four layers, each with another mechanism, and what only some models have."""
    return ModelConfig(
        vocab_size=37, d_model=D_MODEL, num_layers=4, embedding_scale=3.0, norm_order="sandwich",
        norm="layernorm", tie_embeddings=False, head_bias=True, logit_softcap=20.0, sinusoidal=True,
        dtype="float64",
        blocks=(
            BlockConfig(AttentionConfig(num_heads=4, num_kv_heads=2, rope=RoPE(), sink_logits=True)),
            BlockConfig(
                GatedDeltaNetConfig(num_heads=2, chunk_size=8),
                ExpertsConfig(num_experts=4, width=12, use_bias=True),
            ),
            BlockConfig(make_config("mla", num_heads=4, latent_dim=12, head_dim=8, rotary_dim=4)),
            BlockConfig(PerformerConfig(num_heads=2, num_features=24)),
        ),
    )  # fmt: skip


def abstract(config: ModelConfig):
    """The shapes of its parameters, float64."""
    params = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float64), params)


def narrowed_by_model() -> list[str]:
    """What the program of the hybrid's loss and gradient rounds to a narrower dtype."""
    config, tokens_BT = hybrid(), np.ones((1, T), np.int32)
    loss = jax.value_and_grad(lambda params: apply(config, params, tokens_BT).logits.sum())
    return sorted(set(narrowed(jax.make_jaxpr(loss)(abstract(config)).jaxpr)))


def model_error() -> float:
    """The error of a whole model's logits: h += mixer(norm h), h += mlp(norm h), logits = norm(h) E^T."""
    row = MIXERS["gated"]
    config = ModelConfig(vocab_size=37, d_model=D_MODEL, num_layers=1, mixers=(row.config,), dtype="float64")
    rng, tokens_T = np.random.default_rng(3), np.arange(T, dtype=np.int32)
    params = jax.tree.map(lambda x: 0.3 * rng.standard_normal(x.shape), abstract(config))
    found = jax.jit(lambda params: apply(config, params, tokens_T[None]).logits[0])(params)
    layer = jax.tree.map(lambda x: x[0], params["stacks"]["0"])

    def norm(x, weights):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_eps) * weights["scale"]

    h = params["embed"]["embedding"][tokens_T]
    h = h + row.reference(layer["mixer"], norm(h, layer["norm1"]), dense(mask_of(row.config), T))
    n, mlp = norm(h, layer["norm2"]), {name: part["kernel"] for name, part in layer["mlp"].items()}
    gate = n @ mlp["gate"]
    h = h + (gate / (1 + np.exp(-gate)) * (n @ mlp["up"])) @ mlp["down"]
    return error(found, norm(h, params["final_norm"]) @ params["embed"]["embedding"].T)


def decoding_errors() -> dict[str, float]:
    """Those of the hybrid's prefill, decoding and scanned layers, against its forward pass."""
    config = hybrid()
    rng, tokens_BT = np.random.default_rng(3), np.arange(B * T, dtype=np.int32).reshape(B, T) % 37
    params = jax.tree.map(lambda x: 0.3 * rng.standard_normal(x.shape), abstract(config))
    run = jax.jit(lambda config, params: apply(config, params, tokens_BT).logits, static_argnums=0)
    logits_BTV, laid_out = run(config, params), prepare_for_decoding(config, params)
    state = jax.jit(lambda params: prefill(config, params, tokens_BT[:, :9], capacity=T))(laid_out)
    found = {"prefill": error(state.logits_BV, logits_BTV[:, 8])}
    step = jax.jit(lambda params, state, token: decode_step(config, params, state, token))
    for t in range(9, T):
        state = step(laid_out, state, tokens_BT[:, t])
    scanned = run(dataclasses.replace(config, scan_layers=True), params)
    return found | {
        "decode": error(state.logits_BV, logits_BTV[:, -1]),
        "scanned": error(scanned, logits_BTV),
    }


def narrowed(jaxpr) -> list[str]:
    """The equations of a program and of its parts that take float64 and give narrower floating numbers."""
    found = []
    for equation in jaxpr.eqns:
        inner = [x for x in jax.tree.leaves(equation.params, is_leaf=_is_jaxpr) if _is_jaxpr(x)]
        for part in inner:
            found += narrowed(getattr(part, "jaxpr", part))
        given, given_out = (
            {
                v.aval.dtype.name
                for v in some
                if hasattr(v.aval, "dtype") and jnp.issubdtype(v.aval.dtype, jnp.floating)
            }
            for some in (equation.invars, equation.outvars)
        )
        if not inner and "float64" in given and given_out - {"float64"}:
            found.append(str(equation)[:200])
    return found


def _is_jaxpr(x) -> bool:
    return isinstance(x, (jax.extend.core.Jaxpr, jax.extend.core.ClosedJaxpr))


def main(names: list[str]) -> None:
    """Print the errors of these rows and of a model; without names, of all rows and of decoding too."""
    found = {"model": model_error()}
    for name in names or [*MIXERS, *BIDIRECTIONAL, *BIDIRECTIONAL_ONLY]:
        found |= mixer_errors(name, exhaustive=not names)
    if not names:
        found |= decoding_errors()
    print(json.dumps({"errors": found, "narrowed": narrowed_by_model()}))


if __name__ == "__main__":
    main(sys.argv[1:])
