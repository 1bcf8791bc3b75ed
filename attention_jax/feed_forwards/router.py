"""The router of a mixture of experts: which experts a token has, and with which weights.

    z = W x (float32);   s = softmax(z) or sigmoid(z);   chosen: the k largest of s + b
    w = scale s (/ the sum of s over the chosen)

Top-k routing: Shazeer et al. 2017 (arXiv 1701.06538). Load-balancing loss: Switch Transformer (arXiv
2101.03961). z-loss: ST-MoE (arXiv 2202.08906). Groups: DeepSeek-V2 (arXiv 2405.04434). Sigmoid scores and the
correction bias b: DeepSeek-V3 (arXiv 2412.19437).
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from attention_jax.choices import check_between, check_choices
from attention_jax.dtypes import accumulator, wider


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """How experts are scored and chosen, and what keeps their load even."""

    __pydantic_config__ = {"extra": "forbid", "strict": True, "arbitrary_types_allowed": True}

    scoring: Literal["softmax", "sigmoid"] = (
        "softmax"  #: of the router's logits; sigmoid in DeepSeek-V3, Llama 4
    )
    normalize: bool = True  #: the weights of the chosen experts sum to 1 before scale (norm_topk_prob)
    scale: float = 1.0  #: multiplies the weights (routed_scaling_factor)
    use_bias: bool = False  #: a bias of the logits, as in gpt-oss
    #: a bias that is added for the choice alone and has no gradient (e_score_correction_bias in DeepSeek-V3)
    correction_bias: bool = False
    num_groups: int = 1  #: groups of consecutive experts, of which the best are kept
    groups_per_token: int = 1  #: how many groups a token keeps
    group_score: Literal["max", "top2"] = "max"  #: its best expert (DeepSeek-V2), or two (V3)
    balance_loss: float = 0.0  #: coefficient of E sum_e f_e p_e, which is 1 where the load is even; 0: off
    z_loss: float = 0.0  #: coefficient of the mean of logsumexp(z)^2; 0: off
    #: by how much an expert's load moves its correction bias after a training step; 0: off
    bias_rate: float = 0.0

    def __post_init__(self):
        check_choices(self)
        check_between(self, "scale", 1e-6, 1e6, "weights vanish or overflow otherwise")
        for name in ("balance_loss", "z_loss"):
            check_between(self, name, 1e-8, 1e3, "it must neither vanish nor drown the loss", zero=True)
        check_between(self, "bias_rate", 1e-6, 1, "1e-3 is usual", zero=True)
        for name in ("num_groups", "groups_per_token"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.groups_per_token > self.num_groups:
            raise ValueError(
                f"groups_per_token {self.groups_per_token} exceeds num_groups {self.num_groups}: lower it"
            )
        if self.bias_rate and not self.correction_bias:
            raise ValueError(
                f"bias_rate {self.bias_rate} moves a correction bias: set correction_bias to true"
            )

    @property
    def has_losses(self) -> bool:
        """Whether a loss has a nonzero coefficient."""
        return bool(self.balance_loss or self.z_loss)

    def check(self, num_experts: int, experts_per_token: int) -> None:
        """Raise ValueError if the groups do not fit this number of experts."""
        if num_experts % self.num_groups:
            raise ValueError(f"num_groups {self.num_groups} does not divide num_experts {num_experts}")
        size = num_experts // self.num_groups
        if self.group_score == "top2" and self.num_groups > 1 and size < 2:
            raise ValueError(f"group_score top2 needs groups of 2 experts or more, got {size}: set it to max")
        if (allowed := self.groups_per_token * size) < experts_per_token:
            raise ValueError(
                f"experts_per_token {experts_per_token} exceeds the {allowed} experts of a token's "
                f"{self.groups_per_token} groups: raise groups_per_token"
            )


class Routing(NamedTuple):
    """The choice of each token.

    experts_NK: int32, the best first. weights_NK, scores_NE, logits_NE: float32 (or wider, as x is).
    """

    experts_NK: jax.Array
    weights_NK: jax.Array
    scores_NE: jax.Array
    logits_NE: jax.Array


def route(
    config: RouterConfig, logits_NE: jax.Array, experts_per_token: int, correction_E: jax.Array | None = None
) -> Routing:
    """The experts and weights of N tokens. correction_E: the bias of the choice, which gets no gradient.

    Equal scores go to the expert with the smaller index. Normalised weights are a softmax over the chosen
    log-scores, so that no sum of scores underflows.
    """
    if config.scoring == "softmax":
        log_scores_NE = jax.nn.log_softmax(logits_NE, axis=-1)
        scores_NE = jax.nn.softmax(logits_NE, axis=-1)
    else:
        log_scores_NE = jax.nn.log_sigmoid(logits_NE)
        scores_NE = jax.nn.sigmoid(logits_NE)
    if correction_E is not None:
        choice_NE = scores_NE + jnp.broadcast_to(correction_E.astype(scores_NE.dtype), scores_NE.shape)
    elif config.num_groups > 1:
        choice_NE = scores_NE
    else:
        choice_NE = logits_NE  # the same order, also where scores round to the same number
    choice_NE = _within_groups(config, jax.lax.stop_gradient(choice_NE))
    _, experts_NK = jax.lax.top_k(choice_NE, experts_per_token)
    if config.normalize:
        weights_NK = jax.nn.softmax(jnp.take_along_axis(log_scores_NE, experts_NK, axis=-1), axis=-1)
    else:
        weights_NK = jnp.take_along_axis(scores_NE, experts_NK, axis=-1)
    weights_NK = weights_NK if config.scale == 1 else weights_NK * config.scale
    return Routing(experts_NK.astype(jnp.int32), weights_NK, scores_NE, logits_NE)


def _within_groups(config: RouterConfig, choice_NE: jax.Array) -> jax.Array:
    """The scores, with -inf outside of the best groups."""
    if config.groups_per_token == config.num_groups:
        return choice_NE
    N, E = choice_NE.shape
    grouped_NGe = choice_NE.reshape(N, config.num_groups, E // config.num_groups)
    if config.group_score == "max":
        best_NG = grouped_NGe.max(axis=-1)
    else:
        best_NG = jax.lax.top_k(grouped_NGe, 2)[0].sum(axis=-1)
    _, kept = jax.lax.top_k(best_NG, config.groups_per_token)
    is_kept_NG = (kept[..., None] == jnp.arange(config.num_groups)).any(axis=1)
    return jnp.where(is_kept_NG[..., None], grouped_NGe, -jnp.inf).reshape(N, E)


def load(routing: Routing, valid_N: jax.Array) -> jax.Array:
    """The share of each expert in the choices of the valid tokens [E]; 0 if there is none."""
    E = routing.scores_NE.shape[-1]
    chosen_NE = (routing.experts_NK[..., None] == jnp.arange(E)).any(axis=1) & valid_N[:, None]
    counts_E = chosen_NE.sum(axis=0, dtype=accumulator(routing.scores_NE))
    return counts_E / jnp.maximum(counts_E.sum(), 1)


def losses(config: RouterConfig, routing: Routing, valid_N: jax.Array) -> jax.Array:
    """[2]: the load-balancing loss and the z-loss of the valid tokens, each times its coefficient.

    Balance: E sum_e f_e p_e, with f the `load`, which has no gradient, and p the mean of the scores; sigmoids
    are divided by their sum. It is 1 for an even load, whatever the number of experts of a token.
    """
    scores_NE = wider(routing.scores_NE)
    if config.scoring == "sigmoid":
        log_scores_NE = jax.nn.log_sigmoid(wider(routing.logits_NE))
        scores_NE = jax.nn.softmax(log_scores_NE, axis=-1)
    count = jnp.maximum(valid_N.sum(dtype=scores_NE.dtype), 1)
    mean_E = jnp.where(valid_N[:, None], scores_NE, 0).sum(axis=0) / count
    balance = scores_NE.shape[-1] * jnp.sum(load(routing, valid_N) * mean_E)
    squares_N = jnp.square(jax.nn.logsumexp(wider(routing.logits_NE), axis=-1))
    z = jnp.where(valid_N, squares_N, 0).sum() / count
    return jnp.stack([config.balance_loss * balance, config.z_loss * z])
