"""Mixture of experts: each token passes through a few of many feed-forwards.

    y = sum_{e in chosen(x)} w_e(x) expert_e(x)  (+ shared(x))

Shazeer et al. 2017 (arXiv 1701.06538); shared experts: DeepSeekMoE (arXiv 2401.06066). `router.py` chooses
the experts and weights, `grouped.py` computes only what was chosen.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax.choices import check_between
from attention_jax.dtypes import wider
from attention_jax.feed_forwards.base import FeedForward, FeedForwardOutput
from attention_jax.feed_forwards.dense import DenseConfig, UnitConfig
from attention_jax.feed_forwards.grouped import Groups, make_groups
from attention_jax.feed_forwards.router import RouterConfig, Routing, load, losses, route
from attention_jax.layers import matmul
from attention_jax.mixers import Context, Parts
from attention_jax.ops.tokens import select_valid, valid_tokens

_MOST_EXPERTS = 2**14


@dataclasses.dataclass(frozen=True)
class ExpertsConfig(UnitConfig):
    """A mixture of experts, each a feed-forward of `UnitConfig`'s units; see docs/experts.md."""

    kind: Literal["experts"] = "experts"  #: the feed-forward
    num_experts: int = 8  #: E
    experts_per_token: int = 2  #: K, the experts that each token has
    width: int | None = None  #: F of one expert; null: 4 d_model (without a gate) or 8/3 d_model rounded to 8
    shared_width: int | None = None  #: F of an expert that every token has in addition; null: none
    shared_gate: bool = False  #: the shared expert's output is multiplied by sigmoid(x w), as in Qwen2-MoE
    use_bias: bool | None = None  #: biases of the experts' projections; null: model.use_bias
    router: RouterConfig = RouterConfig()  #: how experts are chosen and weighted
    weigh_input: bool = False  #: weights multiply the experts' input instead of their output, as in Llama 4
    #: f: an expert computes at most ceil(f K T / E) tokens of a row of T; null: it drops none
    capacity_factor: float | None = None
    #: ragged: jax.lax.ragged_dot; blocked: blocks of rows of one expert; null: blocked on a CPU, else ragged
    impl: Literal["ragged", "blocked"] | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in ("num_experts", "experts_per_token", "width", "shared_width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if self.num_experts > _MOST_EXPERTS:
            raise ValueError(f"num_experts must be <= {_MOST_EXPERTS}, got {self.num_experts}: lower it")
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token {self.experts_per_token} exceeds num_experts {self.num_experts}: lower it"
            )
        if not isinstance(self.router, RouterConfig):
            raise ValueError(f"router must be a RouterConfig, got {type(self.router).__name__}")
        self.router.check(self.num_experts, self.experts_per_token)
        if self.shared_gate and self.shared_width is None:
            raise ValueError("shared_gate is true without a shared expert: set shared_width")
        check_between(self, "capacity_factor", 1e-3, 1e4, "1 holds an even load, and null drops no token")
        if self.capacity_factor is not None and self.impl is not None:
            raise ValueError(f"impl {self.impl} is for capacity_factor null, got {self.capacity_factor}")

    def capacity(self, length: int) -> int | None:
        """C, the most tokens that an expert computes of a row of `length` slots; None without a limit."""
        if self.capacity_factor is None:
            return None
        share = self.experts_per_token * length / self.num_experts
        return min(math.ceil(share * self.capacity_factor), length)

    def hidden_width(self, d_model: int) -> int:
        """Those of the chosen experts and of the shared one."""
        return self.experts_per_token * self.width_of(d_model, self.width) + (self.shared_width or 0)

    @property
    def shared(self) -> DenseConfig | None:
        """The shared expert; None without one."""
        if self.shared_width is None:
            return None
        unit = {field.name: getattr(self, field.name) for field in dataclasses.fields(UnitConfig)}
        return DenseConfig(**unit | {"kind": "dense"}, width=self.shared_width, use_bias=self.use_bias)


class RouterProjection(nnx.Module):
    """float32 logits [N, E] of the experts, whatever the model's dtype is, at the highest precision."""

    def __init__(self, features: int, num_experts: int, *, use_bias: bool, kernel_init: Any, rngs: nnx.Rngs):
        self.kernel = nnx.Param(kernel_init(rngs.params(), (features, num_experts), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(num_experts, jnp.float32)) if use_bias else None

    def __call__(self, x_ND: jax.Array) -> jax.Array:
        """The logits, in float32 or the wider dtype of x."""
        dtype = jnp.promote_types(x_ND.dtype, jnp.float32)
        kernel_DE = self.kernel[...].astype(dtype)
        logits_NE = matmul(x_ND.astype(dtype), kernel_DE, precision=jax.lax.Precision.HIGHEST)
        if self.bias is None:
            return logits_NE
        return logits_NE + jnp.broadcast_to(self.bias[...].astype(dtype), logits_NE.shape)


class Experts(FeedForward):
    """sum_e w_e(x) expert_e(x) + shared(x): see `ExpertsConfig`.

    gate, up: [E, D, F]; down: [E, F, D]; router.kernel: [D, E]; router_bias: [E], the correction bias.
    """

    config_type = ExpertsConfig

    def setup(self, parts: Parts) -> None:
        """Create the router, the stacks of the experts and the shared expert."""
        config, D = self.config, self.d_model
        E, F = config.num_experts, config.width_of(D, config.width)
        use_bias = self.use_bias if config.use_bias is None else config.use_bias
        self.prepared = False
        self.router = RouterProjection(
            D, E, use_bias=config.router.use_bias, kernel_init=parts.kernel_init, rngs=parts.rngs
        )
        self.router_bias = nnx.Param(jnp.zeros(E, jnp.float32)) if config.router.correction_bias else None
        shapes = {"gate": (D, F), "up": (D, F), "down": (F, D)}
        for name, shape in shapes.items():
            has = name != "gate" or config.gated
            init = parts.out_init if name == "down" else parts.kernel_init
            setattr(self, name, _stack(init, E, shape, parts.rngs) if has else None)
            setattr(
                self,
                f"{name}_bias",
                nnx.Param(jnp.zeros((E, shape[1]), jnp.float32)) if has and use_bias else None,
            )
        given = {"kernel_init": parts.kernel_init, "out_init": parts.out_init, "dtype": self.dtype}
        self.shared = config.shared and config.shared.build(D, parts.rngs, use_bias=self.use_bias, **given)
        self.shared_gate = parts.linear(D, 1) if config.shared_gate else None

    def run(self, x_BTD: jax.Array, *, ctx: Context, cached: bool = False) -> FeedForwardOutput:
        """y [B, T, D]; 0 in invalid slots, which use no capacity. A call with a cache drops no token."""
        config, (B, T, D) = self.config, x_BTD.shape
        valid_BT = valid_tokens(ctx.positions_BT, ctx.segment_ids_BT)
        x_BTD = select_valid(x_BTD, valid_BT)
        x_ND = x_BTD.reshape(B * T, D)
        valid_N = jnp.broadcast_to(True if valid_BT is None else valid_BT, (B, T)).reshape(-1)
        correction_E = None if self.router_bias is None else self.router_bias[...]
        routing = route(config.router, self.router(x_ND), config.experts_per_token, correction_E)
        experts_NK = jnp.where(valid_N[:, None], routing.experts_NK, config.num_experts)
        capacity = None if cached else config.capacity(T)
        groups = make_groups(experts_NK, config.num_experts, config.impl, batch=B, capacity=capacity)
        y_BTD = self._experts(x_ND, routing, groups).reshape(B, T, D)
        if self.shared is not None:
            y_BTD = y_BTD + self._shared(x_BTD, ctx)
        aux = ctx.captured(
            router=lambda: wider(routing.scores_NE).reshape(B, T, -1),
            router_load=lambda: load(routing, valid_N),
            router_losses=lambda: losses(config.router, routing, valid_N),
        )
        return FeedForwardOutput(select_valid(y_BTD, valid_BT), aux)

    def prepare(self, storage_dtype: Any) -> None:
        """Round the stacks to the dtype of the computation once, in the dtype in which they are stored."""
        for name in ("gate", "up", "down"):
            if (stack := getattr(self, name)) is not None:
                setattr(self, name, nnx.Param(stack[...].astype(self.dtype).astype(storage_dtype)))
        self.prepared = True

    def _experts(self, x_ND: jax.Array, routing: Routing, groups: Groups) -> jax.Array:
        """The weighted sum of the chosen experts' outputs [N, D]."""
        weights_NK, weigh_input = routing.weights_NK, self.config.weigh_input
        x_RD = groups.gathered(x_ND, weights_NK if weigh_input else None)
        gate_RF = None if self.gate is None else self._project("gate", x_RD, groups)
        h_RF = self.config.unit(gate_RF, self._project("up", x_RD, groups))
        y_RD = self._project("down", h_RF, groups)
        return groups.combined(y_RD, None if weigh_input else weights_NK).astype(x_ND.dtype)

    def _project(self, name: str, x_RI: jax.Array, groups: Groups) -> jax.Array:
        kernel, bias = getattr(self, name)[...], getattr(self, f"{name}_bias")
        x_RI = x_RI.astype(self.dtype)
        y_RO = groups.product(x_RI, kernel, kernel.dtype if self.prepared else self.dtype).astype(self.dtype)
        return y_RO if bias is None else y_RO + groups.biases(bias[...].astype(self.dtype))

    def _shared(self, x_BTD: jax.Array, ctx: Context) -> jax.Array:
        """The output of the shared expert, gated if the config has a gate."""
        y_BTD = self.shared.run(x_BTD, ctx=dataclasses.replace(ctx, capture=frozenset())).y
        return y_BTD if self.shared_gate is None else jax.nn.sigmoid(self.shared_gate(x_BTD)) * y_BTD


def _stack(init: Any, E: int, shape: tuple[int, int], rngs: nnx.Rngs) -> nnx.Param:
    """E kernels, each initialised by itself: an initialiser takes the leading axis for inputs."""
    return nnx.Param(jax.vmap(lambda key: init(key, shape, jnp.float32))(jax.random.split(rngs.params(), E)))
