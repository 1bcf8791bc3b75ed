"""Prints text that a trained model continues a prompt with, token by token.

    python scripts/generate.py runs/tiny --prompt "class " --top-k 40

For a run of objective seq2seq the prompt is the source text, and the model
writes its target. On a terminal, control characters that the model writes are
shown as escapes such as \\x1b; a file or a pipe gets the text as it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import secrets
import sys
from collections.abc import Iterator, Sequence

import jax

from attention_jax.generation import Sampling, stream
from train import command_line
from train.commands.types import Folder, Integer, MaybeInteger, MaybeNumber, Number, Positional
from train.run.restore import Requests, TrainedRun, load_run
from train.streams import printable

_LONG = 4096  # tokens that a small model takes seconds to read


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line gives."""

    run_dir: Positional[Folder]  #: the folder of a run of `python -m train`
    prompt: str = ""  #: what the text starts with; for seq2seq: the source
    tokens: Integer = 300  #: how many tokens to sample at most
    temperature: Number = 0.8  #: 0 always takes the likeliest token
    top_k: MaybeInteger = None  #: keep the k likeliest tokens
    top_p: MaybeNumber = None  #: keep the fewest tokens that reach this probability together
    min_p: MaybeNumber = None  #: keep tokens of at least this share of the largest probability
    seed: MaybeInteger = None  #: the same seed gives the same text; none: a new one each time
    step: str = "latest"  #: the checkpoint: its step, latest or best


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, the process's own if None; the exit status."""
    return command_line.run(Options, _main, __doc__, argv)


def _main(options: Options) -> None:
    step = int(options.step) if options.step.isdecimal() and options.step.isascii() else options.step
    if step not in ("latest", "best") and not isinstance(step, int):
        raise ValueError(f"--step must be a number, latest or best, got {options.step}")
    if options.seed is not None and not 0 <= options.seed < 2**32:
        raise ValueError(f"--seed must be in [0, {2**32}), got {options.seed}")
    if options.tokens < 1:
        raise ValueError(f"--tokens must be >= 1, got {options.tokens}")
    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.min_p)
    run = load_run(options.run_dir, step=step)
    print(f"{options.run_dir}: checkpoint of step {run.step}, {run.chosen}", file=sys.stderr, flush=True)
    with _compilation_told():
        _print_text(run, options, sampling)


@contextlib.contextmanager
def _compilation_told() -> Iterator[None]:
    """Print on stderr how long each program took to compile, which the first call of a length waits for."""
    log, handler = logging.getLogger("attention_jax.generation"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("note: %(message)s"))
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


def _print_text(run: TrainedRun, options: Options, sampling: Sampling) -> None:
    seed = secrets.randbits(32) if options.seed is None else options.seed
    requests = run.requests([options.prompt])
    for note in notes(run, requests):
        print(note, file=sys.stderr, flush=True)
    parts = stream(
        run.model,
        run.params,
        requests.prompts,
        sources=requests.sources,
        max_new_tokens=options.tokens,
        sampling=sampling,
        key=jax.random.key(seed),
        eos_id=run.tokenizer.end_of_document,
        tokenizer=run.tokenizer,
    )
    shown = printable if sys.stdout.isatty() else str
    sys.stdout.write(shown(requests.echo[0]))
    for [part] in parts:
        sys.stdout.write(shown(part.text))
        sys.stdout.flush()
        if part.error is not None:
            raise ValueError(part.error)
    sys.stdout.write("\n")


def notes(run: TrainedRun, requests: Requests) -> list[str]:
    """What to say before a text that is longer than in training, or takes long to read."""
    data, found = run.config.data, []
    kinds = [("prompt", requests.prompts[0], data.sequence_length)]
    if requests.sources is not None:
        kinds.append(("source", requests.sources[0], data.source_width))
    for name, ids, trained in kinds:
        if len(ids) > trained:
            found.append(
                f"note: the {name} has {len(ids):,} tokens, and the model was trained on at most {trained:,}:"
                " its text after a longer one may be worse"
            )
        if len(ids) > _LONG:
            found.append(f"note: reading the {len(ids):,} tokens of the {name} before the first new one")
    return found
