"""Who can compute softmax attention.

A contestant is a name and a maker: maker(case, backward) gives a call, or a reason (str) why it cannot take
part. A call returns when its result is there; `.device_time()` is milliseconds on a GPU, `.temporaries` the
bytes that its compiler plans, `.note` a remark on how its time is to be read.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np

from attention_jax.benchmarks import torch_peers
from attention_jax.benchmarks.calls import jitted, ours
from attention_jax.benchmarks.case import Case

Maker = Callable[[Case, bool], Any]

# On a GPU the dense and the plain XLA forms only take time that others need; asked for by name they run.
ON_GPU = ("torch", "ours mosaic_gpu", "ours mosaic_gpu fused", "jax.nn cudnn", "tokamax", "flex")
# Its compiler tries kernels for half a minute a case: after all others, whose times are then safe. On a CPU
# only by name.
SLOW = ("flex",)


def contestants() -> dict[str, Maker]:
    """Every contestant by name; the first that takes part is what the others are compared with."""
    from attention_jax.ops.softmax import MosaicGPUConfig
    from attention_jax.ops.softmax.api import implementations

    names = {f"ours {name}": functools.partial(_ours, name) for name in implementations()}
    names["ours mosaic_gpu fused"] = functools.partial(_ours, MosaicGPUConfig(deterministic=False))
    return {"torch": torch_peers.sdpa, "flex": torch_peers.flex, **names,
            "jax.nn": functools.partial(_jax_nn, "xla"), "jax.nn cudnn": functools.partial(_jax_nn, "cudnn"),
            "tokamax": _tokamax, "splash": _splash}  # fmt: skip


def _ours(impl: Any, case: Case, backward: bool) -> Any:
    from attention_jax import explain

    try:
        explain(*case.inputs, mask=case.mask, impl=impl)
    except NotImplementedError as error:
        return str(error).split(": ", 1)[-1]
    if impl == "reference" and case.dense_too_large:
        return case.dense_too_large
    return ours(impl, case.mask, *case.inputs, backward)


def masking(case: Case) -> dict[str, Any] | None:
    """The mask as arguments of jax.nn and tokamax without an array, or None."""
    if case.causal or case.full:
        return {"is_causal": case.causal}
    if case.window:  # they count the keys before a query's own
        return {"is_causal": True, "local_window_size": (case.window - 1, 0)}
    return None


def _jax_nn(implementation: str, case: Case, backward: bool) -> Any:
    import jax

    arguments = masking(case)
    if implementation == "cudnn":
        if jax.default_backend() != "gpu":
            return "needs an NVIDIA GPU"
        if arguments is None:
            return "takes no such mask without a dense array"
    elif case.dense_too_large:
        return case.dense_too_large
    elif not (case.causal or case.full):
        arguments = {"mask": case.dense()[None, None]}
    attend = functools.partial(jax.nn.dot_product_attention, implementation=implementation, **arguments)
    return jitted(attend, *case.inputs, backward=backward)


def _tokamax(case: Case, backward: bool) -> Any:
    import jax

    if importlib.util.find_spec("tokamax") is None:
        return "tokamax is not installed"
    if jax.default_backend() != "gpu":
        return "its Mosaic kernel needs an NVIDIA GPU"
    if (arguments := masking(case)) is None:
        return "takes no such mask without a dense array"
    import tokamax

    attend = functools.partial(tokamax.dot_product_attention, implementation="mosaic", **arguments)
    return jitted(attend, *case.inputs, backward=backward)


def _splash(case: Case, backward: bool) -> Any:
    import jax

    if jax.default_backend() != "tpu":
        return "needs a TPU"
    if case.K != case.N:
        return "is made for equal numbers of heads here"
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    mask = masks.MultiHeadMask([masks.NumpyMask(np.array(case.dense())) for _ in range(case.N)])
    run = jax.vmap(kernel.make_splash_mha(mask, head_shards=1, q_seq_shards=1))

    def forward(q, k, v):
        q, k, v = (x.swapaxes(1, 2) for x in (q * case.H**-0.5, k, v))
        return run(q, k, v).swapaxes(1, 2)

    return jitted(forward, *case.inputs, backward=backward)
