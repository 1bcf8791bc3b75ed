"""Decoding with a trained model: what drafts save, and what quantised caches cost, on held-out text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.benchmarks.timing import interleave
from attention_jax.caches import CacheOptions
from attention_jax.generation import NGram, Sampling, generate
from attention_jax.mixers import Context
from attention_jax.model import ModelConfig, bind, cache_bytes, init_state, prepare_for_decoding
from train.data import snapshot
from train.run.restore import TrainedRun, load_run

_PROMPTS, _TOKENS = 4, 192
_TEXTS = {"held-out text, greedy": (True, 0.0), "held-out text, temperature 1": (True, 1.0),
          "random prompt, temperature 1": (False, 1.0)}  # fmt: skip


def speculation(options: Any) -> list[dict[str, Any]]:
    """Speculative decoding by n-gram lookup beside plain decoding, one request at a time."""
    run, held_out = _load(options.run)
    prepared, length = prepare_for_decoding(run.model, run.params), run.config.data.sequence_length // 2
    rows = []
    for text, (held, temperature) in _TEXTS.items():
        prompts = _windows(held_out, _PROMPTS, length)
        if not held:
            prompts = np.random.default_rng(0).integers(0, held_out.max() + 1, prompts.shape)
        counts = {}

        def decode(speculation, name, prompts=prompts, temperature=temperature, counts=counts) -> Callable:
            def call():
                counts[name] = (0, 0)
                for i, prompt in enumerate(prompts):
                    [found] = generate(
                        run.model, prepared, [prompt], max_new_tokens=_TOKENS, sampling=Sampling(temperature),
                        key=jax.random.key(i), speculation=speculation,
                    )  # fmt: skip
                    counts[name] = tuple(np.add(counts[name], found.drafts or (0, 0)))

            return call

        proposers = {"plain": None} | {f"{K} drafts": NGram(K) for K in (4, 8, 16)}
        times = interleave(
            {name: decode(proposer, name) for name, proposer in proposers.items()}, options.rounds
        )
        for name in list(proposers)[1:]:
            ratio = times["plain"] / times[name]
            drafted, kept = (int(n) for n in counts[name])
            row = {
                "name": f"ours {name}", "text": text, "tokens": _PROMPTS * _TOKENS, "drafted": drafted,
                "kept": kept, "speedup": float(np.median(ratio)),
                "speedup_quartiles": [float(q) for q in np.percentile(ratio, (25, 75))],
                "plain_tokens_per_s": float(1e3 * _PROMPTS * _TOKENS / np.median(times["plain"])),
            }  # fmt: skip
            rows.append(row)
            low, high = row["speedup_quartiles"]
            print(
                f"{text:30} {name:9} {row['speedup']:5.2f}x plain ({low:.2f}-{high:.2f}), "
                f"{row['plain_tokens_per_s']:.0f} tokens/s; {kept} of {drafted} drafts kept",
                flush=True,
            )
    return rows


def quantized(options: Any) -> list[dict[str, Any]]:
    """Held-out perplexity and cache size with int8 and int4 caches, 16 tokens appended at a time."""
    run, held_out = _load(options.run)
    length = run.config.data.sequence_length
    tokens_BT = _windows(held_out, 64, length + 1)
    caches = {"full": CacheOptions(), "bfloat16": CacheOptions(jnp.bfloat16)}
    for bits in ("int8", "int4"):
        caches[bits] = CacheOptions(quantize=bits)
        caches[f"{bits}, newest 32 in full"] = CacheOptions(quantize=bits, residual=32)
    rows = []
    for name, cache in caches.items():
        loss = float(_loss(run.model, run.params, tokens_BT, cache, 16))
        size = sum(cache_bytes(run.model, 1, length, cache=cache))
        first = rows[0] if rows else {"perplexity": np.exp(loss)}
        row = {
            "name": f"ours {name}", "loss": loss, "perplexity": float(np.exp(loss)), "cache_bytes": size,
            "worse": float(np.exp(loss) / first["perplexity"] - 1),
        }  # fmt: skip
        rows.append(row)
        print(
            f"{name:25} perplexity {row['perplexity']:.5f} ({100 * row['worse']:+.3f} %), "
            f"{size:,} bytes a row",
            flush=True,
        )
    return rows


def _load(folder: Any) -> tuple[TrainedRun, np.ndarray]:
    """The run, and the tokens of its held-out text."""
    if folder is None:
        raise ValueError("--run is missing: give the folder of a run of `python -m train`")
    run = load_run(folder)
    if run.tokenizer is None or not run.model.causal or run.model.encoder is not None:
        raise ValueError(f"{folder} is not a run of a causal language model of text: give another --run")
    return run, np.asarray(snapshot.read(Path(folder) / "data").validation.tokens)


def _windows(tokens: np.ndarray, count: int, length: int) -> np.ndarray:
    """`count` windows at equal distances."""
    starts = np.linspace(0, len(tokens) - length, count).astype(int)
    return np.stack([tokens[start : start + length] for start in starts]).astype(np.int32)


def _loss(config: ModelConfig, params: Any, tokens_BT: np.ndarray, cache: CacheOptions, block: int) -> Any:
    """The mean cross-entropy of the next token, read through the caches `block` tokens at a time."""

    @jax.jit
    def run(params, tokens_BT):
        model, B, T = bind(config, params), tokens_BT.shape[0], tokens_BT.shape[1] - 1

        def read(states, start):
            inputs, targets = (
                jax.lax.dynamic_slice_in_dim(tokens_BT, start + i, block, axis=1) for i in (0, 1)
            )
            positions_BT = jnp.broadcast_to(start + jnp.arange(block), inputs.shape)
            logits_BTV, states, _ = model.run(inputs, states, ctx=Context(positions_BT))
            chosen = jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), targets[..., None], axis=-1)
            return states, -chosen.mean()

        starts = jnp.arange(0, T - block + 1, block)
        return jax.lax.scan(read, init_state(config, B, T, cache=cache), starts)[1].mean()

    return run(prepare_for_decoding(config, params), tokens_BT)
