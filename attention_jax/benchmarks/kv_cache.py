"""Greedy generation of one row with and without a cache, for MHA, GQA, MQA and MLA of equal width and depth.

Generation begins with one token. With a cache, a step is `decode_step` with prepared weights in a cache of
capacity n; without one it is the forward over all n tokens, with the output projection of the last one only.
Both stand in a compiled loop, and the time to compile does not count.

| figure | with a cache | without |
|---|---|---|
| a step at n tokens | the last steps of a run of n tokens | the step alone |
| n tokens | the whole run | the sum of the steps, a power of the length between those measured |

The forward without a cache reads exactly n tokens. That needs a program for every n; programs for buckets of
lengths, which read padding as well, take longer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from attention_jax.benchmarks.kv_cache_plot import plot
from attention_jax.benchmarks.timing import interleave, wall_clock

LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 2048)
_LAST_STEPS = 64  # of a run with a cache, timed as one: enough that copying the cache before them is little
_REPEATED = 128  # tokens without a cache in one timed call, at least
_RUNS = 3  # rounds of whole runs, at most


class Contestant(NamedTuple):
    """A model, its parameters, and the numbers per token and layer that its cache needs by the paper."""

    config: Any
    params: Any
    numbers: int


class Cached(NamedTuple):
    """A run: `whole()` generates all tokens [n], `last()` the last `steps` of them."""

    whole: Callable[[], Any]
    last: Callable[[], Any]
    steps: int
    nbytes: int


def kv_cache(args) -> Iterator[dict[str, Any]]:
    """Time per step and cumulative, cache bytes and parameters, by mechanism and number of tokens."""
    lengths = sorted(set(args.lengths or LENGTHS))
    if lengths[0] < 2:
        raise ValueError(f"--lengths must be at least 2 generated tokens, got {lengths[0]}")
    models, rows = contestants(args), []
    print(_heading(args))
    points: dict[str, list[tuple[int, float]]] = {name: [] for name in models}
    first = {name: uncached(model, 1, _REPEATED) for name, model in models.items()}
    for name, ms in interleave(first, args.rounds).items():
        points[name].append((1, float(np.median(ms)) / _REPEATED))
    for n in lengths:
        for row in compare(models, points, n, args.rounds):
            rows.append(row)
            print(_line(row), flush=True)
            yield row
    if args.plot:
        plot(rows, args.plot)


def contestants(args) -> dict[str, Contestant]:
    """The four models; MLA with DeepSeek's ratios of the latent and the rotary part to a head, 4 and 1/2."""
    import jax

    from attention_jax import ModelConfig, RoPE, init_params, make_config

    N, L, D = args.heads, args.layers, args.d_model
    if D % (4 * N):
        raise ValueError(f"--d-model must be a multiple of 4 x --heads {N}, for rotary halves, got {D}")
    H, K = D // N, args.kv_heads or max(1, N // 4)
    mixers = {
        name: (make_config("softmax", num_heads=N, num_kv_heads=k, rope=RoPE()), 2 * k * H)
        for name, k in (("MHA", N), ("GQA", K), ("MQA", 1))
    }
    latent = make_config("mla", num_heads=N, latent_dim=4 * H, head_dim=H, rotary_dim=H // 2)
    mixers["MLA"] = (latent, latent.latent_dim + latent.rotary_dim)
    found = {}
    for name, (mixer, numbers) in mixers.items():
        config = ModelConfig(vocab_size=args.vocabulary, d_model=D, num_layers=L, mixers=(mixer,))
        found[name] = Contestant(config, init_params(config, jax.random.key(0)), numbers)
    return found


def compare(
    models: dict[str, Contestant], points: dict[str, list], n: int, rounds: int
) -> list[dict[str, Any]]:
    """A row per mechanism at n tokens. `points` gets the step without a cache, for its cumulative time."""
    from attention_jax.model import count_params

    repeats = -(-_REPEATED // n)
    runs = {name: cached(model, n) for name, model in models.items()}
    calls: dict[tuple[str, bool], Callable] = {(name, True): run.last for name, run in runs.items()}
    calls |= {(name, False): uncached(model, n, repeats) for name, model in models.items()}
    steps = interleave(calls, rounds)
    # In turn, too. `cached` has compiled and run them, and a run is long.
    wholes = [{name: wall_clock(run.whole) for name, run in runs.items()} for _ in range(min(rounds, _RUNS))]
    rows = []
    for name, model in models.items():
        with_ms, without_ms = steps[name, True] / runs[name].steps, steps[name, False] / repeats
        points[name].append((n, float(np.median(without_ms))))
        total = float(np.median([whole[name] for whole in wholes]))
        without_total = cumulative(points[name])
        rows.append({
            "mechanism": name,
            "tokens": n,
            "parameters": count_params(model.params),
            "cache_bytes": runs[name].nbytes,
            "formula_bytes": 4 * model.numbers * model.config.num_layers * n,
            "cached": _figures(with_ms, total, n),
            "uncached": _figures(without_ms, without_total, n),
            "step_ratio": float(np.median(without_ms / with_ms)),
            "total_ratio": without_total / total,
        })  # fmt: skip
    return rows


def _figures(step_ms: np.ndarray, total_ms: float, n: int) -> dict[str, Any]:
    return {
        "step_ms": float(np.median(step_ms)),
        "step_quartiles_ms": [float(x) for x in np.percentile(step_ms, (25, 75))],
        "total_ms": total_ms,
        "tokens_per_s": 1e3 * n / total_ms,
    }


def cumulative(points: list[tuple[int, float]]) -> float:
    """The sum of the times of steps at 1, 2, ..., n tokens; `points` has some of them, 1 and n included."""
    at, ms = np.log(points).T
    return float(np.exp(np.interp(np.log(np.arange(1, points[-1][0] + 1)), at, ms)).sum())


def cached(model: Contestant, n: int) -> Cached:
    """Generation of n tokens after one, token 0, by decoding steps in a compiled loop."""
    import jax
    import jax.numpy as jnp

    from attention_jax.generation import DecodeState, decode_step
    from attention_jax.model import init_state, prepare_for_decoding

    prepared = prepare_for_decoding(model.config, model.params)

    @jax.jit
    def run(params, carry, first, end):
        def step(i, carry):
            state, token_B, tokens_T = carry
            state = decode_step(model.config, params, state, token_B)
            token_B = jnp.argmax(state.logits_BV, axis=-1).astype(jnp.int32)
            return state, token_B, tokens_T.at[i].set(token_B[0])

        return jax.lax.fori_loop(first, end, step, carry)

    zero_B, logits_BV = jnp.zeros(1, jnp.int32), jnp.zeros((1, model.config.vocab_size))
    empty = DecodeState(init_state(model.config, 1, n), zero_B, logits_BV)
    start, steps = (empty, zero_B, jnp.zeros(n, jnp.int32)), min(_LAST_STEPS, n)
    before = run(prepared, start, 0, n - steps)

    def whole():
        return jax.block_until_ready(run(prepared, start, 0, n))[2]

    def last():
        return jax.block_until_ready(run(prepared, before, n - steps, n))[2]

    return Cached(whole, last, steps, sum(cache.nbytes for cache in empty.caches))


def uncached(model: Contestant, n: int, repeats: int, tokens_1T: Any = None) -> Callable[[], Any]:
    """The token after n tokens by the forward over all of them, `repeats` times as its window moves on.

    tokens_1T: the first window, zeros by default.
    """
    import jax
    import jax.numpy as jnp

    from attention_jax.model import bind

    @jax.jit
    def run(params, tokens_1T):
        def step(_, tokens_1T):
            logits_11V = bind(model.config, params).run(tokens_1T, last_only=True).logits
            token_11 = jnp.argmax(logits_11V, axis=-1).astype(jnp.int32)
            return jnp.concatenate([tokens_1T[:, 1:], token_11], axis=1)

        return jax.lax.fori_loop(0, repeats, step, tokens_1T)[0, -1]

    window_1T = jnp.zeros((1, n), jnp.int32) if tokens_1T is None else jnp.asarray(tokens_1T)
    return lambda: jax.block_until_ready(run(model.params, window_1T))


def _heading(args) -> str:
    """What is measured, and the names of the columns of `_line`."""
    either = "step ms  tokens/s   total s"
    return (
        f"{args.layers} layers x {args.d_model}, {args.heads} heads, vocabulary {args.vocabulary}, float32, "
        "batch 1, greedy from one token\n"
        "step: one step at that many tokens. total, tokens/s: generating all of them; without a cache the\n"
        "sum of steps, each a forward of exactly its length, interpolated between the measured lengths.\n"
        "formula: 2 K H numbers per token and layer, MLA rank + rotary. ratio: without a cache / with it.\n\n"
        f"{'':11} {'with a cache':30}{'without':32}{'ratio':16}cache in MB\n"
        f"tokens      {either}   {either}    step  total    held  formula  parameters"
    )


def _line(row: dict[str, Any]) -> str:
    cells = [f"{row['tokens']:6} {row['mechanism']:3}"]
    for way in ("cached", "uncached"):
        times = row[way]
        cells.append(f"{times['step_ms']:8.2f} {times['tokens_per_s']:9.1f} {times['total_ms'] / 1e3:9.2f} ")
    cells.append(f"{row['step_ratio']:7.1f}{row['total_ratio']:7.1f}")
    cells.append(f"{row['cache_bytes'] / 1e6:7.2f} {row['formula_bytes'] / 1e6:8.2f} {row['parameters']:11,}")
    return " ".join(cells)
