"""Decoding: time per token beside the bandwidth of matrix-vector products, and beside transformers.

A token reads every weight once. The bound is therefore the bandwidth of matrix-vector products with the
model's own kernels, measured in the same process in turn with the model. Weights are random: they do not
change the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from attention_jax.benchmarks.timing import interleave, wall_clock
from attention_jax.optional import need

_PROMPT, _TOKENS = 16, 64
_CHUNK = 64  # tokens of a timed call of the flat-time mode
_SIZES = {
    "5.5M": {"vocab_size": 4096, "d_model": 256, "num_layers": 6},
    "110M": {"vocab_size": 32000, "d_model": 768, "num_layers": 12},
}


def decode(options: Any) -> Iterator[dict[str, Any]]:
    """Rows per mechanism and size; with --lengths, of the time per token by the tokens generated before."""
    if options.peer:
        need("torch", "--peer transformers"), need("transformers", "--peer transformers")
    if options.lengths:
        yield from _by_length(options)
        return
    for size in _SIZES:
        for name in _mixers(size):
            yield _one(size, name, options)


def _mixers(size: str) -> dict[str, Any]:
    from attention_jax.masks import SlidingWindow
    from attention_jax.mixers import make_config
    from attention_jax.positions import RoPE

    N = _SIZES[size]["d_model"] // 64
    K = {4: 2, 12: 4}[N]
    softmax = {"num_heads": N, "rope": RoPE()}
    return {
        "MHA": make_config("softmax", **softmax),
        "GQA": make_config("softmax", num_kv_heads=K, **softmax),
        "MQA": make_config("softmax", num_kv_heads=1, **softmax),
        "MLA": make_config("mla", num_heads=N, latent_dim=128, head_dim=64, rotary_dim=32),
        "window": make_config("softmax", mask=SlidingWindow(256), **softmax),
        "linear": make_config("linear", num_heads=N),
    }


def _model(size: str, mixer: Any) -> tuple[Any, Any]:
    import jax

    from attention_jax.model import ModelConfig, init_params, prepare_for_decoding

    config = ModelConfig(mixers=(mixer,), **_SIZES[size])
    return config, jax.block_until_ready(prepare_for_decoding(config, init_params(config, jax.random.key(0))))


def _one(size: str, name: str, options: Any) -> dict[str, Any]:
    from attention_jax.generation import generate

    config, prepared = _model(size, _mixers(size)[name])
    prompt = np.arange(_PROMPT) % config.vocab_size
    sampling = _greedy()

    def ours(tokens: int) -> Callable[[], Any]:
        return lambda: generate(
            config, prepared, [prompt], max_new_tokens=tokens, capacity=_PROMPT + _TOKENS, sampling=sampling
        )

    contestants: dict[str, Callable[[], Any]] = {
        "ours": ours(_TOKENS),
        "first": ours(1),  # the prompt and the first token
        "products": _products(prepared),
    }
    if options.peer and (peer := _transformers(config, prompt)):
        contestants |= peer
    times = interleave(contestants, options.rounds)
    ms = (times["ours"] - times["first"]) / (_TOKENS - 1)
    read = prepared.nbytes - (0 if config.tie_embeddings else 4 * config.vocab_size * config.d_model)
    bandwidth = read / 1e6 / ms
    ratio = times["products"] / _TOKENS / ms
    row = {
        "name": "ours", "size": size, "mixer": name, "tokens": _TOKENS,
        "ms_per_token": float(np.median(ms)), "ms_quartiles": _quartiles(ms),
        "tokens_per_s": float(1e3 / np.median(ms)), "weights_MB": read / 1e6,
        "tokens_per_s_with_prompt": float(1e3 * _TOKENS / np.median(times["ours"])),
        "GB_per_s": float(np.median(bandwidth)),
        "products_GB_per_s": float(np.median(read * _TOKENS / 1e6 / times["products"])),
        "of_the_bandwidth": float(np.median(ratio)), "of_the_bandwidth_quartiles": _quartiles(ratio),
    }  # fmt: skip
    line = (
        f"{size:5} {name:7} {row['tokens_per_s']:8.1f} tokens/s  {row['ms_per_token']:7.2f} ms "
        f"{_span(ms)}  {row['GB_per_s']:5.1f} GB/s, {100 * row['of_the_bandwidth']:3.0f} % of the products'"
    )
    peers = [key for key in times if key.startswith("transformers")]
    if peers:
        best = min(peers, key=lambda key: float(np.median(times[key])))
        ratio = times[best] / times["ours"]
        row |= {
            "peer": best, "peer_tokens_per_s": float(1e3 * _TOKENS / np.median(times[best])),
            "times_the_peer": float(np.median(ratio)), "times_the_peer_quartiles": _quartiles(ratio),
        }  # fmt: skip
        line += f"  {row['times_the_peer']:.2f}x {best} {_span(ratio)}"
    print(line, flush=True)
    return row


def _greedy() -> Any:
    from attention_jax.generation import Sampling

    return Sampling(temperature=0.0)


def _quartiles(x: np.ndarray) -> list[float]:
    return [float(q) for q in np.percentile(x, (25, 75))]


def _span(x: np.ndarray) -> str:
    low, high = _quartiles(x)
    return f"({low:.2f}-{high:.2f})"


def _products(prepared: Any) -> Callable[[], Any]:
    """As many matrix-vector products with all kernels of a model as a call of `generate` makes."""
    import jax
    import jax.numpy as jnp

    kernels = [x for x in jax.tree.leaves(prepared.weights) if x.ndim == 2]
    start = {kernel.shape[1]: jnp.ones(kernel.shape[1]) for kernel in kernels}

    @jax.jit
    def run(kernels, start):
        def token(_, x_of):
            x_of = dict(x_of)
            for kernel in kernels:
                y = kernel @ x_of[kernel.shape[1]]
                # The next product waits for this one, as in a model.
                x_of = {D: x.at[0].add(1e-9 * y[0]) for D, x in x_of.items()}
            return x_of

        return jax.lax.fori_loop(0, _TOKENS, token, start)

    return lambda: jax.block_until_ready(run(kernels, start))


def _transformers(config: Any, prompt: np.ndarray) -> dict[str, Callable[[], Any]] | None:
    """`generate` of a Llama of the same shapes, with both kinds of cache; None for another mechanism."""
    torch, transformers = need("torch", "--peer transformers"), need("transformers", "--peer transformers")
    mixer = config.mixers[0]
    if mixer.kind != "softmax" or mixer.mask.cache_span()[0] is not None:
        return None
    torch.set_num_threads(2)
    llama = transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        intermediate_size=config.hidden_width,
        num_hidden_layers=config.num_layers,
        num_attention_heads=mixer.num_heads,
        num_key_value_heads=mixer.kv_heads,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = transformers.LlamaForCausalLM(llama).eval()
    ids = torch.from_numpy(np.asarray(prompt, np.int64))[None]
    options = {"max_new_tokens": _TOKENS, "min_new_tokens": _TOKENS, "do_sample": False}
    options["attention_mask"] = torch.ones_like(ids)

    def run(**cache: Any) -> Any:
        with torch.no_grad():
            out = model.generate(ids, **options, **cache)
        assert out.shape[1] == _PROMPT + _TOKENS
        return out

    static = {"cache_implementation": "static", "disable_compile": True}
    return {"transformers": run, "transformers, static cache": lambda: run(**static)}


def _by_length(options: Any) -> Iterator[dict[str, Any]]:
    """Time per token of the small model once a number of tokens has been generated."""
    lengths = sorted(options.lengths)
    chunks = -(-lengths[-1] // _CHUNK)
    runs = {name: _stepper(name, chunks * _CHUNK) for name in ("MHA", "GQA", "window", "linear")}
    ms: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(chunks):
        for name, run in runs.items():
            ms[name].append(wall_clock(run) / _CHUNK)
    for name in runs:
        first = None
        for length in lengths:
            last = -(-length // _CHUNK)
            part = np.array(ms[name][max(0, last - max(8, last // 8)) : last])
            median = float(np.median(part))
            first = first or median
            row = {"name": "ours", "size": "5.5M", "mixer": name, "length": length, "ms_per_token": median}
            row |= {"ms_quartiles": _quartiles(part), f"times_{lengths[0]}": median / first}
            print(f"{name:7} after {length:6} tokens {median:7.3f} ms {_span(part)}  x{median / first:.2f}")
            yield row


def _stepper(name: str, tokens: int) -> Callable[[], Any]:
    """A call that generates `_CHUNK` more tokens, with a cache that grows as that of `generate` does."""
    from attention_jax.generation import stream

    config, prepared = _model("5.5M", _mixers("5.5M")[name])
    parts = stream(
        config, prepared, [np.zeros(_PROMPT, np.int32)],
        max_new_tokens=tokens, sampling=_greedy(), chunk=_CHUNK,
    )  # fmt: skip
    return lambda: next(parts)
