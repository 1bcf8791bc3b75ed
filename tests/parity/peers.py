"""The peers' side of the comparisons: parameters drawn away from their start, gradients, errors."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what importing torch and transformers warns about is not ours to mend
    import torch
    import transformers
    from torch import nn

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()

B, T, D = 2, 24, 48  # batch rows, tokens and model width of every comparison of a layer


@dataclasses.dataclass(frozen=True)
class Peer:
    """One row: a layer written elsewhere and the mixer of ours that is to compute the same function.

    config: ours. build() -> the peer's module. call(module, x) -> y, both [B, T, D].
    weights(p, one) -> our parameters from the peer's by name. It is linear but for `one`, which is 1.0 for
      parameters and 0.0 for gradients: a norm that multiplies by 1 + w is `one + w`.
    fixed: our parameters that the peer lacks, kept where they start.
    bound, gradient_bound: the largest relative errors allowed; the second is for gradients.
    """

    config: Any
    build: Callable[[], nn.Module]
    call: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    weights: Callable[[dict[str, np.ndarray], float], dict[str, np.ndarray]]
    fixed: tuple[str, ...] = ()
    bound: float = 1e-6
    gradient_bound: float = 3e-6
    causal: bool = True
    source: str = "transformers"

    @property
    def cached(self) -> bool:
        """Whether ours is decoded too: a layer that sees later tokens has no stream."""
        return self.causal


def draw(module: nn.Module, rng: np.random.Generator) -> nn.Module:
    """The module in evaluation mode with every parameter drawn anew, none near its neutral start."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            shape = tuple(parameter.shape)
            if name.endswith("A_log"):  # rates from 1 to 8
                value = np.log(rng.uniform(1.0, 8.0, size=shape))
            elif name.endswith("dt_bias"):  # steps about 0.05
                value = -3 + 0.5 * rng.normal(size=shape)
            elif len(shape) == 1 and "norm" in name.lower() and name.endswith("weight"):
                value = 1 + 0.3 * rng.normal(size=shape)
            elif len(shape) <= 1:
                value = 0.3 * rng.normal(size=shape)
            else:
                fan_in = np.prod(shape[1:])
                value = rng.normal(size=shape) / np.sqrt(fan_in)
            parameter.copy_(torch.from_numpy(np.asarray(value)))
    return module.eval()


def arrays(module: nn.Module, *, gradients: bool = False) -> dict[str, np.ndarray]:
    """The parameters by name, or their gradients."""
    named = module.named_parameters()
    return {name: (p.grad if gradients else p.detach()).numpy() for name, p in named}


def forward_and_gradients(peer: Peer, module: nn.Module, x: np.ndarray, cotangent: np.ndarray):
    """(y, the gradients of sum(y * cotangent) by parameter, that of x)."""
    module.zero_grad(set_to_none=True)
    x = torch.from_numpy(x).requires_grad_()
    y = peer.call(module, x)
    y.backward(torch.from_numpy(cotangent))
    return y.detach().numpy(), arrays(module, gradients=True), x.grad.numpy()


def in_float64(peer: Peer, module: nn.Module, x: np.ndarray) -> np.ndarray:
    """The peer's own output, computed in float64 as far as its code lets it."""
    with torch.no_grad():
        return peer.call(module.double(), torch.from_numpy(x.astype(np.float64))).numpy()


def error(ours: np.ndarray, peer: np.ndarray) -> float:
    """max |ours - peer| / max |peer|; NaN where either holds one."""
    assert ours.shape == peer.shape, (ours.shape, peer.shape)
    ours, peer = (np.asarray(a, np.float64) for a in (ours, peer))
    return float(np.abs(ours - peer).max() / np.abs(peer).max())


def weight_error(ours: dict[str, np.ndarray], peer: dict[str, np.ndarray]) -> float:
    """The largest relative error of any parameter's gradient.

    A gradient that is 0 but for rounding (a key bias: softmax ignores what all scores share) is measured
    against a tenth of the largest gradient instead of itself.
    """
    largest = max(np.abs(g).max() for g in peer.values())
    return max(
        float(np.abs(ours[path].astype(np.float64) - g).max() / max(np.abs(g).max(), 0.1 * largest))
        for path, g in peer.items()
    )


def causal_mask(length: int, keep: Callable | None = None) -> torch.Tensor:
    """transformers' additive mask [1, 1, T, T]: the lowest float32 where hidden; `keep(q, k)` narrows it."""
    q, k = torch.arange(length)[:, None], torch.arange(length)[None]
    kept = k <= q if keep is None else (k <= q) & keep(q, k)
    return torch.where(kept, 0.0, torch.finfo(torch.float32).min)[None, None]


def fla_naive(name: str) -> types.ModuleType:
    """The module fla/ops/<name>/naive.py of the installed package, from its file.

    Importing it by name would first import the package around it, whose kernels need triton and a GPU. Two
    helpers that nsa/naive.py imports from there are for functions that no test calls; they stand empty.
    """
    spec = importlib.util.find_spec("fla")
    path = Path(spec.submodule_search_locations[0], "ops", *name.split("."), "naive.py")
    empty = {}
    if name == "nsa":
        empty["fla.ops.utils"] = types.ModuleType("fla.ops.utils")
        empty["fla.ops.utils.pooling"] = types.ModuleType("fla.ops.utils.pooling")
        empty["fla.ops.utils"].prepare_chunk_offsets = empty["fla.ops.utils.pooling"].mean_pooling = None
        empty |= {parent: types.ModuleType(parent) for parent in ("fla", "fla.ops")}
    held = {key: sys.modules.get(key) for key in empty}
    spec = importlib.util.spec_from_file_location(f"fla_naive_{name.replace('.', '_')}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules.update(empty)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            spec.loader.exec_module(module)
    finally:
        for key, before in held.items():
            if before is None:
                del sys.modules[key]
            else:
                sys.modules[key] = before
    return module
