"""Timings of attention, beside other systems where they are installed.

    attention   ours beside every peer; on a GPU by its own clock
    memory      forward and backward of `chunked` at --length
    window      a window of --window against causal at --length
    crossover   dense against chunked, by length
    blocks      the block map of each kind of mask at --length
    linear      time and memory of the linear engines, by --lengths
    overtake    the linear engines against softmax attention, by --lengths
    decode      tokens per second beside the bandwidth of products, and beside
                transformers (--peer); --lengths: the time after so many tokens
    eager       mixers called outside of jax.jit beside Flax's layer: CPU time
    kv_cache    generation with and without a cache at --lengths tokens
    prefill_memory
                the memory planned for reading a prompt of --length
    speculation n-gram drafts beside plain decoding, of a trained --run
    quantized   perplexity with int8 and int4 caches, of a trained --run
    step        a training step beside nanoGPT's, from a checkout in --nanogpt

    python scripts/benchmark.py attention --lengths 2048 4096 --masks "Causal()"

Contestants take turns in one process, because machines are shared and their
speed varies: every figure is a ratio of neighbours in time, the median over
rounds. The exit status is 1 where one of our implementations failed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal

from attention_jax import masks
from attention_jax.benchmarks import linear, softmax
from attention_jax.benchmarks.attention import attention
from attention_jax.benchmarks.contestants import contestants
from attention_jax.benchmarks.decode import decode
from attention_jax.benchmarks.eager import eager
from attention_jax.benchmarks.kv_cache import kv_cache
from attention_jax.benchmarks.prefill_memory import prefill_memory
from attention_jax.benchmarks.timing import save
from train import command_line
from train.commands import step_time, trained_decoding
from train.commands.types import Count, Counts, MaybeCount, MaybePath, Positional, many, one, words

_BENCHMARKS = {
    "attention": attention,
    "memory": softmax.memory,
    "window": softmax.window,
    "crossover": softmax.crossover,
    "blocks": softmax.blocks,
    "linear": linear.linear,
    "overtake": linear.overtake,
    "decode": decode,
    "eager": eager,
    "kv_cache": kv_cache,
    "prefill_memory": prefill_memory,
    "speculation": trained_decoding.speculation,
    "quantized": trained_decoding.quantized,
    "step": step_time.step,
}


def _mask(text: str) -> str:
    masks.parse(text)
    return text


def _peer(text: str) -> str:
    if text != "transformers":
        raise ValueError(f"must be transformers, got {text}")
    return text


_DTYPES = ("float32", "bfloat16", "float16")


def _dtype(text: str) -> str:
    if text not in _DTYPES:
        raise ValueError(f"must be one of {', '.join(_DTYPES)}, got {text}")
    return text


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line gives."""

    what: Positional[Literal[tuple(_BENCHMARKS)]]  #: the benchmark
    lengths: Counts = ()  #: numbers of tokens; none: the benchmark's own
    widths: Counts = (64,)  #: attention: head widths
    #: attention: mask expressions, as in YAML
    masks: Annotated[tuple[str, ...], many("MASK", _mask)] = ("Causal()",)
    batch: Count = 1  #: attention, eager with --lengths: rows
    tokens: MaybeCount = None  #: attention: rows times length, in place of --batch
    heads: Count = 8  #: attention, eager, kv_cache: query heads
    #: attention, kv_cache: key-value heads; none: as many as --heads, for GQA in kv_cache a quarter of them
    kv_heads: MaybeCount = None
    d_model: Count = 256  #: kv_cache: width of the models
    layers: Count = 6  #: kv_cache: their layers
    vocabulary: Count = 4096  #: kv_cache: their token ids
    #: attention: systems to time; none: all that are installed, on a CPU without the slow ones
    contestants: words("NAME", contestants) = ()
    #: float32, bfloat16 or float16; none: float32 on a CPU, bfloat16 elsewhere
    dtype: Annotated[str | None, one("DTYPE", _dtype)] = None
    length: MaybeCount = None  #: tokens; none: the benchmark's own
    window: Count = 512  #: window: its tokens
    nanogpt: MaybePath = None  #: step: a checkout of nanoGPT
    config: str = "shakespeare_char"  #: step: the configuration, a file or a name
    peer: Annotated[str | None, one("NAME", _peer)] = None  #: decode: transformers, for its `generate`
    rounds: Count = 11  #: how often contestants take turns
    seconds: MaybeCount = None  #: attention: begin nothing after so many seconds
    run: MaybePath = None  #: speculation, quantized: the folder of a run of `python -m train`
    json: MaybePath = None  #: also write the rows to this file
    plot: MaybePath = None  #: attention: draw TFLOP/s over the length to this file; kv_cache: draw the times


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, the process's own if None; the exit status: 1 where one of ours failed."""
    return command_line.run(Options, _main, __doc__, argv)


def _main(options: Options) -> int:
    options, rows = checked(options), []
    for row in _BENCHMARKS[options.what](options):
        rows.append(row)
        if options.json:  # after every row: a card's time may end at any of them
            save(options.json, rows)
    return int(any("error" in row and row["name"].startswith("ours") for row in rows))


def checked(options: Options) -> Options:
    """The options with the defaults that depend on others. ValueError for what does not fit together."""
    if options.heads % (options.kv_heads or 1):
        raise ValueError(f"--kv-heads {options.kv_heads} does not divide --heads {options.heads}")
    if options.what == "attention" and not options.lengths:
        options = dataclasses.replace(options, lengths=(2048, 4096))
    return options
