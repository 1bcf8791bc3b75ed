"""A training step beside another system's."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from attention_jax.benchmarks.timing import interleave, table


def step(args) -> list:
    """One optimiser step of configs/shakespeare_char.yaml and of nanoGPT's model in torch eager mode."""
    if args.nanogpt is None:
        raise ValueError("--nanogpt is missing: give the folder of a checkout of nanoGPT")
    contestants = {"nanoGPT": _nanogpt_step(args.nanogpt), "ours": _our_step(args.config)}
    calls = {name: (lambda one=one: [one() for _ in range(8)]) for name, one in contestants.items()}
    times = {name: ms / 8 for name, ms in interleave(calls, args.rounds).items()}
    return table("training step", times, "nanoGPT")


def _nanogpt_step(folder: Path) -> Callable[[], float]:
    import torch

    sys.path.insert(0, str(folder))
    from model import GPT, GPTConfig

    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        sizes = {"block_size": 64, "vocab_size": 65, "n_layer": 4, "n_head": 4, "n_embd": 128}
        model = GPT(GPTConfig(**sizes, dropout=0.0, bias=False))
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
    tokens = torch.randint(0, 65, (12, 65))

    def one() -> float:
        _, loss = model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return one


def _our_step(path: Path) -> Callable[[], float]:
    import jax

    from train import config as config_lib
    from train.run.restore import fresh_state, with_vocabulary
    from train.step import make_train_step

    config = config_lib.load(path, [])
    model = with_vocabulary(config.model, 65)
    state = fresh_state(config, model, jax.random.key(0))
    train_step = make_train_step(model, config.optimizer, config.steps)
    shape = (config.data.batch_size, config.data.sequence_length + 1)
    tokens = np.random.default_rng(0).integers(0, 65, shape).astype(np.int32)
    batch = {"tokens": tokens[:, :-1].copy(), "targets": tokens[:, 1:].copy()}
    key, held = jax.random.key(0), [state["params"], state["opt_state"], 0]

    def one() -> float:
        params, opt_state, metrics = train_step(held[0], held[1], batch, np.int32(held[2]), key)
        held[:] = [params, opt_state, held[2] + 1]
        return float(metrics["train/loss"])

    return one
