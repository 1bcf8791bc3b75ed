"""Adds to JAX's interpreter of Mosaic GPU kernels the operations that our kernels use and it lacks.

`wgmma` with its first operand in registers, and `pl.run_state` over accumulators that start from a value:
both become what the interpreter knows, a buffer in register memory. And copies that add to their destination.
For tests alone; it patches private classes.
"""

from __future__ import annotations

import functools
import threading

import jax
import jax.numpy as jnp
from jax._src import callback
from jax._src import core as jax_core
from jax._src.pallas import primitives as pallas_primitives
from jax._src.pallas.mosaic_gpu import core as gpu_core
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret
from jax._src.pallas.mosaic_gpu.interpret import shared_memory as memory
from jax._src.state import discharge
from jax._src.state import types as state_types

Interpreter = jaxpr_interpret.JaxprInterpreter


def _allocate(self, token, value, source_info):
    token, request = gpu_callbacks.call_make_allocation_request_array(
        token=token,
        compute_unit=self.thread,
        memory_space_id=memory.get_memory_space_idx(gpu_core.MemorySpace.REGS),
        initial_ref_count=1,
    )
    return gpu_callbacks.call_allocate_buffer(
        token=token, mesh_location=self.mesh_location, thread=self.thread,
        allocation_request_as_array=request, value=value, source_info=source_info,
    )  # fmt: skip


def _free(self, token, key, source_info):
    return gpu_callbacks.call_deallocate_buffer(
        token=token, mesh_location=self.mesh_location, thread=self.thread,
        allocation_key_as_array=key, source_info=source_info,
    )  # fmt: skip


def _read(self, token, key, aval, source_info):
    return callback.io_callback(
        functools.partial(gpu_callbacks.wgmma_accumulator_deref, source_info=source_info),
        (gpu_callbacks.TOKEN_SHAPE_DTYPE, jax.ShapeDtypeStruct(aval.shape, aval.dtype)),
        token=token, mesh_location=self.mesh_location, thread=self.thread,
        acc_allocation_key_as_array=key, wait_n=0,
    )  # fmt: skip


def _run_state(self, eqn, token, values):
    refs = [isinstance(var.aval, state_types.AbstractRef) for var in eqn.invars]  # of the surroundings
    keys, outs = [], []
    for value, is_ref in zip(values, refs, strict=True):
        key = value
        if not is_ref:
            token, key = _allocate(self, token, value, eqn.source_info)
        keys.append(key)
    token, _ = self.interpret(eqn.params["jaxpr"], token, *keys)
    for key, var, is_ref in zip(keys, eqn.outvars, refs, strict=True):
        out = key
        if not is_ref:
            token, out = _read(self, token, key, var.aval, eqn.source_info)
            token = _free(self, token, key, eqn.source_info)
        outs.append(out)
    return token, outs


class _AddingCopy(gpu_callbacks.AsyncCopySmemToGmemTask):
    """The interpreter's copy from shared to global memory, which adds where `_adding` is set by its maker."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.adds = getattr(_adding, "on", False)

    def __call__(self, tma_thread_id):
        if not self.adds:
            return super().__call__(tma_thread_id)
        shared = gpu_callbacks._get_shared_memory()

        def read(key, access):
            return shared.get_buffer_content(key, access, self.thread, logging_info=self.logging_info)[0]

        self.pre_read(tma_thread_id, shared)
        added = read(self.src_allocation_key, self.src_access)
        if shared.detect_races:
            # Not the parent's `post_read`: additions of several thread blocks to one place are no race.
            self.clock.inc(tma_thread_id)
            self.write_clock = self.clock.copy()
        key = self.dst_allocation_key
        store = gpu_callbacks._clip_store_to_shape(
            self.dst_access, added, tuple(shared.buffer_shape_and_dtype(key).shape)
        )
        if store is not None:
            access, added = store
            total = read(key, access) + added
            shared.store_buffer_content(key, access, total, self.thread, logging_info=self.logging_info)
        self.post_write(tma_thread_id, shared)


_adding = threading.local()


def install() -> None:
    interpret, run_scoped, wgmma = (
        Interpreter.interpret, Interpreter._interpret_run_scoped_p, Interpreter._interpret_wgmma_ref_p
    )  # fmt: skip

    def patched_interpret(self, jaxpr, token, *args):
        # The interpreter has no case for run_state: it goes by the name of run_scoped, patched below.
        eqns = [
            eqn.replace(primitive=pallas_primitives.run_scoped_p)
            if eqn.primitive is discharge.run_state_p else eqn
            for eqn in jaxpr.eqns
        ]  # fmt: skip
        return interpret(self, jaxpr.replace(eqns=eqns), token, *args)

    def patched_run_scoped(self, eqn, token, get_invals):
        if "is_initialized" in eqn.params:
            return _run_state(self, eqn, token, get_invals())
        return run_scoped(self, eqn, token, get_invals)

    def patched_wgmma(self, eqn, token, get_invals):
        if not isinstance(eqn.invars[1].aval, jax_core.ShapedArray):
            return wgmma(self, eqn, token, get_invals)
        acc, a, *rest = get_invals()
        token, key = _allocate(self, token, jnp.asarray(a), eqn.source_info)
        token, out = wgmma(self, eqn, token, lambda: [acc, key, *rest])
        return _free(self, token, key, eqn.source_info), out

    copy = gpu_callbacks.copy_smem_to_gmem

    def patched_copy(*, reduction_op, **kwargs):
        assert reduction_op in (None, "add"), reduction_op
        _adding.on = reduction_op == "add"
        try:
            return copy(reduction_op=None, **kwargs)
        finally:
            _adding.on = False

    def unless_in_registers(check):
        # A thread's own, but for their number, which the next thread block is given again.
        def checked(self, thread, clock, buffer_key, *args, **kwargs):
            if buffer_key.memory_space_id != memory.get_memory_space_idx(gpu_core.MemorySpace.REGS):
                check(self, thread, clock, buffer_key, *args, **kwargs)

        return checked

    races = gpu_callbacks.GPURaceDetectionState
    races.check_read, races.check_write = map(unless_in_registers, (races.check_read, races.check_write))
    gpu_callbacks.copy_smem_to_gmem = patched_copy
    gpu_callbacks.AsyncCopySmemToGmemTask = _AddingCopy
    Interpreter.interpret = patched_interpret
    Interpreter._interpret_run_scoped_p = patched_run_scoped
    Interpreter._interpret_wgmma_ref_p = patched_wgmma
