"""Our ops against fla's naive recurrences and attention, called from the installed package.

fla's arrays are [B, T, heads, width] where its function says so, else [B, heads, T, width].
"""

import dataclasses
import zlib
from collections.abc import Callable

import jax
import numpy as np
import pytest
import torch

from attention_jax.masks import Causal, SlidingWindow
from tests.parity import ours, peers

naive = peers.fla_naive

B, T, N, K, H, M = 2, 24, 4, 2, 6, 10


@dataclasses.dataclass(frozen=True)
class Case:
    """An op of ours and a function of fla that compute the same.

    inputs(rng) -> arrays by name. ours(inputs) -> the op's arguments. peer(tensors) -> outputs. options: the
    op's further options. impls: the implementations of the op to compare.
    """

    op: str
    inputs: Callable[[np.random.Generator], dict[str, np.ndarray]]
    ours: Callable[[dict], dict]
    peer: Callable[[dict], tuple]
    options: dict = dataclasses.field(default_factory=dict)
    impls: tuple = ("recurrent", "chunked", "quadratic")
    compared: tuple | None = None  # the arguments whose gradients are compared; None: all
    double: bool = False  # fla's function keeps float64
    bound: float = 1e-6
    gradient_bound: float = 3e-6


def _normal(rng, *shape):
    return rng.normal(size=shape)


def _unit(x):
    return x / np.sqrt((x * x).sum(-1, keepdims=True))


def _decays(rng, *shape):
    """Logs of decays, most of them near 0.8."""
    return -0.2 * np.exp(0.5 * rng.normal(size=shape))


def _qkv(rng, length=T, heads=N):
    return {"q": _normal(rng, B, length, heads, H), "k": _normal(rng, B, length, heads, H),
            "v": _normal(rng, B, length, heads, M)}  # fmt: skip


def _with(**more):
    """Draws q, k, v and what `more` says: functions of the generator by name."""
    return lambda rng: _qkv(rng) | {name: draw(rng) for name, draw in more.items()}


def _state(rng):
    return _normal(rng, B, N, H, M)


def _unit_keys(**more):
    """As `_with`, keys of length 1 and shares beta between 0 and 1."""

    def draw(rng):
        drawn = _with(**more)(rng)
        beta = 1 / (1 + np.exp(-_normal(rng, B, T, N)))
        return drawn | {"k": _unit(drawn["k"]), "q": _unit(drawn["q"]), "beta": beta}

    return draw


def _arguments(*names, **renamed):
    """Our arguments of a recurrence from the drawn arrays."""
    standard = {"q": "q_BTNH", "k": "k_BTKH", "v": "v_BTNM", "decay": "log_decay", "beta": "beta_BTN",
                "state": "initial_state_BNHM"} | renamed  # fmt: skip
    return lambda drawn: {standard[name]: x for name, x in drawn.items()}


SCAN = {"v": "v_BTKM"}
WITH_STATE = {"scale": H**-0.5, "return_state": True}

CASES: dict[str, Case] = {}


def _heads_first(x):
    return x.transpose(1, 2)


CASES["retention"] = Case(
    "decay_scan", _qkv, _arguments(**SCAN),
    lambda t: (_heads_first(naive("retention").naive_retention(*(_heads_first(t[n]) for n in "qkv"))),),
    {"scale": H**-0.5, "log_decay": np.log1p(-(2.0 ** -np.arange(5.0, 5 + N))).astype(np.float32)},
)  # fmt: skip
CASES["gla"] = Case(
    "decay_scan", _with(decay=lambda rng: _decays(rng, B, T, N, H), state=_state), _arguments(**SCAN),
    lambda t: naive("gla").naive_recurrent_gla(
        t["q"], t["k"], t["v"], t["decay"], initial_state=t["state"], output_final_state=True
    ),
    WITH_STATE,
)  # fmt: skip
CASES["simple-gla"] = Case(
    "decay_scan", _with(decay=lambda rng: _decays(rng, B, T, N), state=_state), _arguments(**SCAN),
    lambda t: naive("simple_gla").naive_chunk_simple_gla(
        t["q"], t["k"], t["v"], t["decay"], initial_state=t["state"], output_final_state=True, chunk_size=8
    ),
    WITH_STATE,
)  # fmt: skip
CASES["linear"] = Case(
    "decay_scan", _with(state=_state), _arguments(**SCAN),
    lambda t: naive("linear_attn").naive_recurrent_linear_attn(
        t["q"], t["k"], t["v"], initial_state=t["state"], output_final_state=True
    ),
    WITH_STATE,
)  # fmt: skip
CASES["linear-normalized"] = Case(
    "decay_scan", lambda rng: {n: np.abs(x) if n != "v" else x for n, x in _qkv(rng).items()},
    _arguments(**SCAN),
    lambda t: (naive("linear_attn").naive_recurrent_linear_attn(*(t[n] for n in "qkv"), normalize=True)[0],),
    {"normalize": True},
)  # fmt: skip
CASES["linear-float64"] = Case(
    "decay_scan", lambda rng: _qkv(rng, 64), _arguments(**SCAN),
    lambda t: (naive("linear_attn").naive_chunk_linear_attn(*(t[n] for n in "qkv")),),
    {"scale": H**-0.5}, double=True, bound=1e-14, gradient_bound=1e-14,
)  # fmt: skip


def _delta(t):
    o, state = naive("delta_rule").delta_rule_recurrence(
        *(_heads_first(t[name]) for name in ("q", "k", "v", "beta")), initial_state=t["state"]
    )
    return _heads_first(o), state


CASES["delta-rule"] = Case("delta_rule", _unit_keys(state=_state), _arguments(), _delta, WITH_STATE)


def _delta_chunkwise(t):
    o, state = naive("delta_rule").delta_rule_chunkwise(
        *(_heads_first(t[name]) for name in ("q", "k", "v", "beta")), chunk_size=8
    )
    return _heads_first(o), state


CASES["delta-rule-float64"] = Case(
    "delta_rule", _unit_keys(), _arguments(), _delta_chunkwise, WITH_STATE, double=True, bound=1e-14,
    gradient_bound=1e-14,
)  # fmt: skip


def _gated_delta(function: str, **options):
    def peer(t):
        return getattr(naive("gated_delta_rule"), function)(
            t["q"], t["k"], t["v"], g=t["decay"], beta=t["beta"], initial_state=t["state"],
            output_final_state=True, **options,
        )  # fmt: skip

    draw = _unit_keys(decay=lambda rng: _decays(rng, B, T, N), state=_state)
    return Case("delta_rule", draw, _arguments(), peer, WITH_STATE)


CASES["gated-delta-rule"] = _gated_delta("naive_recurrent_gated_delta_rule")
CASES["gated-delta-rule-chunk"] = _gated_delta("naive_chunk_gated_delta_rule", chunk_size=8)


def _kda(function: str, **options):
    """Twice as many heads of values as of queries and keys."""

    def draw(rng):
        drawn = _unit_keys(decay=lambda rng: _decays(rng, B, T, N, H), state=_state)(rng)
        return drawn | {name: drawn[name][:, :, :K] for name in "qk"}

    def peer(t):
        return getattr(naive("kda"), function)(
            t["q"], t["k"], t["v"], t["decay"], t["beta"], initial_state=t["state"], output_final_state=True,
            **options,
        )  # fmt: skip

    return Case("delta_rule", draw, _arguments(), peer, WITH_STATE)


CASES["kda"] = _kda("naive_recurrent_kda")
CASES["kda-chunk"] = _kda("naive_chunk_kda", chunk_size=8)


STEPS = 2


def _product_draw(rng):
    """One query and decay per token, STEPS keys, values and shares."""
    drawn = _unit_keys(decay=lambda rng: _decays(rng, B, T, N), state=_state)(rng)
    return drawn | {name: drawn[name][:, ::STEPS] for name in ("q", "decay")}


def _product_arguments(drawn):
    """STEPS tokens in place of one: the decay before the first of them, the query after the last."""
    q, decay = (np.zeros((B, T, *drawn[name].shape[2:]), drawn[name].dtype) for name in ("q", "decay"))
    q[:, STEPS - 1 :: STEPS], decay[:, ::STEPS] = drawn["q"], drawn["decay"]
    return _arguments()(drawn | {"q": q, "decay": decay})


def _product_peer(t):
    """Its outputs stand where our last step of a token is; the other steps are asked nothing and give 0."""
    o, state = naive("gated_delta_product").naive_recurrent_gated_delta_product(
        t["q"], t["k"], t["v"], t["decay"], t["beta"], H**-0.5, initial_state=t["state"],
        output_final_state=True, num_householder=STEPS,
    )  # fmt: skip
    return torch.stack([torch.zeros_like(o)] * (STEPS - 1) + [o], dim=2).flatten(1, 2), state


CASES["gated-delta-product"] = Case(
    "delta_rule", _product_draw, _product_arguments, _product_peer, WITH_STATE,
    compared=("k_BTKH", "v_BTNM", "beta_BTN", "initial_state_BNHM"),
)  # fmt: skip


def _grouped(rng):
    return {"q": _normal(rng, B, T, N, H), "k": _normal(rng, B, T, K, H), "v": _normal(rng, B, T, K, M)}


def _softmax_arguments(drawn):
    names = {"q": "q_BTNH", "k": "k_BSKH", "v": "v_BSKM", "sink": "sink_logits_N"}
    return {names[name]: x for name, x in drawn.items()}


SOFTMAX = ("reference", "chunked")
CASES["softmax-gqa-window-sink"] = Case(
    "dot_product_attention", lambda rng: _grouped(rng) | {"sink": _normal(rng, N)}, _softmax_arguments,
    lambda t: naive("attn").naive_parallel_attn(
        t["q"], t["k"], t["v"], window_size=7, sink_bias=t["sink"]
    )[:1],
    {"mask": SlidingWindow(7)}, impls=SOFTMAX,
)  # fmt: skip
CASES["softmax-not-causal"] = Case(
    "dot_product_attention", _grouped, _softmax_arguments,
    lambda t: naive("attn").naive_parallel_attn(t["q"], t["k"], t["v"], causal=False, scale=0.7)[:1],
    {"scale": 0.7}, impls=SOFTMAX,
)  # fmt: skip


def _selection(rng):
    blocks = np.sort(np.stack([
        np.stack([rng.permutation(np.arange(T // 4)) for _ in range(T * K)]) for _ in range(B)
    ])[..., :3].reshape(B, T, K, 3), axis=-1)  # fmt: skip
    blocks[..., 0] = 0  # every query sees a key; distinct blocks, since fla counts one named twice twice
    blocks[..., 1:] = np.where(blocks[..., 1:] == 0, -1, blocks[..., 1:])
    return _grouped(rng) | {"blocks": blocks.astype(np.int32)}


def _distinct(drawn):
    blocks = drawn["blocks"]
    return {"q_BTNH": drawn["q"], "k_BSKH": drawn["k"], "v_BSKM": drawn["v"], "block_indices_BTKn": blocks}


def _nsa_selection(t):
    return (naive("nsa").naive_nsa_selection(t["q"], t["k"], t["v"], t["blocks"].long(), block_size=4),)


CASES["nsa-selection"] = Case(
    "selected_attention", _selection, _distinct, _nsa_selection, {"block_size": 4},
    impls=("reference", "gathered"),
)  # fmt: skip


def _compression(rng):
    blocks = T // 4
    return {"q": _normal(rng, B, T, N, H), "k": _normal(rng, B, blocks, K, H),
            "v": _normal(rng, B, blocks, K, M)}  # fmt: skip


CASES["nsa-compression"] = Case(
    "dot_product_attention", _compression, _softmax_arguments,
    lambda t: naive("nsa").naive_nsa_compression(t["q"], t["k"], t["v"], 4, H**-0.5)[:1],
    {"mask": Causal(), "k_positions": np.arange(3, T, 4)}, impls=SOFTMAX,
)  # fmt: skip


def _differentiable(x) -> bool:
    return np.issubdtype(np.asarray(x).dtype, np.floating)


@pytest.mark.parametrize("name, impl", [(name, impl) for name, case in CASES.items() for impl in case.impls])
def test_an_op_computes_what_flas_naive_function_computes(name, impl, measured):
    case = CASES[name]
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    dtype = np.float64 if case.double else np.float32
    drawn = {key: x.astype(dtype) if _differentiable(x) else x for key, x in case.inputs(rng).items()}
    tensors = {key: torch.from_numpy(x.copy()) for key, x in drawn.items()}
    for tensor in tensors.values():
        tensor.requires_grad_(tensor.is_floating_point())
    y_peer = case.peer(tensors)
    cotangents = [rng.normal(size=y.shape).astype(dtype) for y in y_peer]
    sum((y * torch.from_numpy(c)).sum() for y, c in zip(y_peer, cotangents, strict=True)).backward()
    grads_peer = case.ours({key: t.grad.numpy() for key, t in tensors.items() if t.requires_grad} | {
        key: x for key, x in drawn.items() if not _differentiable(x)
    })  # fmt: skip

    with jax.enable_x64(case.double):
        y, grads = ours.op(case.op, case.ours(drawn), cotangents, impl=impl, **case.options)
    found = {"forward": max(
        peers.error(a, b.detach().numpy()) for a, b in zip(y, y_peer, strict=True)
    )}  # fmt: skip
    found["input gradients"] = max(
        peers.error(grads[key], g)
        for key, g in grads_peer.items()
        if _differentiable(g) and (case.compared is None or key in case.compared)
    )
    measured(
        f"{name} ({impl})", source="fla", errors=found, bounds=[case.bound, case.gradient_bound], op=case.op
    )
    for what, value in found.items():
        bound = case.gradient_bound if "gradient" in what else case.bound
        assert value <= bound, f"{name}, {impl}, {what}: relative error {value:.2e} > {bound:.0e}"


def test_nsa_chooses_the_blocks_that_fla_chooses(measured):
    """As sets: the order of the chosen is nobody's concern. No two scores here are nearer than rounding."""
    rng = np.random.default_rng(0)
    block, count, length = 4, 6, 64
    q = rng.normal(size=(B, length, N, H)).astype(np.float32)
    k = rng.normal(size=(B, length // block, K, H)).astype(np.float32)
    mine = np.sort(ours.chosen_blocks(q, k, block=block, count=count), axis=-1)
    theirs = naive("nsa").naive_nsa_topk(torch.from_numpy(q), torch.from_numpy(k), count, block, H**-0.5)
    theirs = np.sort(theirs.numpy(), axis=-1)
    different = float((mine != theirs).any(-1).mean())
    measured("nsa-choice", source="fla", errors={"rows chosen differently": different}, bounds=[0.0, 0.0])
    assert different == 0
    assert (mine >= 0).all(-1).any() and (mine < 0).any()  # both full rows and rows with fewer blocks
