"""Prints text that a trained model continues a prompt with, token by token.

    python scripts/generate.py runs/tiny --prompt "class " --top-k 40
    python scripts/generate.py runs/tiny --chat

For a run of objective seq2seq the prompt is the source text, and the model
writes its target. On a terminal, control characters that the model writes are
shown as escapes such as \\x1b; a file or a pipe gets the text as it is. What
it took is said on stderr: tokens per second, and compiling apart from them.

--chat reads lines and continues the text after each of them. The state of the
model is kept, so that no turn reads the text before it again. Ctrl-C stops a
turn and keeps what was shown. /undo, /save FILE, /load FILE, /reset and /help
are commands. A run of `make train` has seen no dialogues: each line is a part
of the text. For one that has, --template says how a line is put to it, and
--stop where an answer ends:

    --chat --template "\\nQ: {user}\\nA:" --stop "\\nQ:"

In --template and --stop, \\n is a newline, \\t a tab, and \\\\ a backslash.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
import sys
from collections.abc import Callable, Sequence
from typing import Literal

import jax

from attention_jax.caches import CacheOptions
from attention_jax.generation import Completion, DraftModel, Increment, NGram, Sampling, stream
from train import command_line
from train.commands.chat import TEMPLATE, Settings, check_template, converse
from train.commands.speed import clock, drafts_kept
from train.commands.types import (
    Count,
    Escaped,
    EscapedTexts,
    Folder,
    Integer,
    Integers,
    MaybeCount,
    MaybeInteger,
    MaybeNumber,
    MaybePath,
    Number,
    Positional,
)  # fmt: skip
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
    repetition_penalty: Number = 1.0  #: divide the logits of ids in the text by it; 1 is off
    presence_penalty: Number = 0.0  #: subtract it from the logits of ids that were generated
    frequency_penalty: Number = 0.0  #: subtract it as often as an id was generated
    min_tokens: Integer = 0  #: end no text before it has as many tokens
    stop: EscapedTexts = ()  #: texts that end the text, and are left out
    stop_ids: Integers = ()  #: token ids that end the text
    n: Count = 1  #: how many samples of the prompt
    logprobs: MaybeInteger = None  #: print a table of the tokens with the N likeliest of each
    seed: MaybeInteger = None  #: the same seed gives the same text; none: a new one each time
    step: str = "latest"  #: the checkpoint: its step, latest or best
    cache: Literal["float", "int8", "int4"] = "float"  #: how keys and values are stored
    speculate: MaybeCount = None  #: draft N tokens at a time, from repeated text or by --draft
    draft: MaybePath = None  #: the run of a smaller model that drafts, 4 tokens by default
    chat: bool = False  #: go on after each line of the standard input
    template: Escaped = TEMPLATE  #: --chat: the text of a turn, with {user} for the line
    capacity: MaybeCount = None  #: --chat: the most tokens; none: 4096, or the model's limit

    def sampling(self) -> Sampling:
        """The options of `generate` for one request."""
        return Sampling(
            self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty,
            self.presence_penalty, self.frequency_penalty, min_tokens=self.min_tokens, n=self.n,
            stop_ids=self.stop_ids, stop=self.stop, logprobs=self.logprobs,
        )  # fmt: skip


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
    sampling = options.sampling()
    if options.chat:
        _check_chat(options)
    run = load_run(options.run_dir, step=step)
    print(f"{options.run_dir}: checkpoint of step {run.step}, {run.chosen}", file=sys.stderr, flush=True)
    if options.chat:
        speculation = _speculation(run, options)
        settings = Settings(
            sampling,
            options.tokens,
            options.template,
            options.seed,
            _cache(options),
            speculation,
            options.capacity,
        )
        converse(run, settings)
    else:
        _print_text(run, options, sampling)


def _check_chat(options: Options) -> None:
    """ValueError for options that --chat does not have."""
    refused = {"--prompt": options.prompt, "--n": options.n > 1, "--draft": options.draft is not None}
    refused["--logprobs"] = options.logprobs is not None
    if given := [name for name, there in refused.items() if there]:
        raise ValueError(f"--chat continues one text line by line, without {given[0]}: leave it out")
    check_template(options.template)


def _cache(options: Options) -> CacheOptions:
    return CacheOptions(quantize=None if options.cache == "float" else options.cache)


def _speculation(run: TrainedRun, options: Options) -> NGram | DraftModel | None:
    """What drafts tokens, if anything; ValueError for a run with another tokenizer."""
    if options.draft is None:
        return None if options.speculate is None else NGram(options.speculate)
    draft = load_run(options.draft)
    theirs, ours = (None if r.tokenizer is None else r.tokenizer.to_json() for r in (draft, run))
    if theirs != ours:
        raise ValueError(f"--draft {options.draft}: its tokenizer is another than that of {options.run_dir}")
    count = {} if options.speculate is None else {"num_tokens": options.speculate}
    return DraftModel(draft.model, draft.params, **count)


def _print_text(run: TrainedRun, options: Options, sampling: Sampling) -> None:
    seed = secrets.randbits(32) if options.seed is None else options.seed
    requests = run.requests([options.prompt])
    for note in notes(run, requests):
        print(note, file=sys.stderr, flush=True)
    speculation = _speculation(run, options)
    shown = printable if sys.stdout.isatty() else str
    with clock() as timed:
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
            cache=_cache(options),
            speculation=speculation,
        )
        samples = _print_samples(timed.counted(parts), shown(requests.echo[0]), options.n, shown)
    drafts = None
    if speculation is not None:
        drafts = tuple(sum(counts) for counts in zip(*(sample.drafts for sample in samples), strict=True))
    if options.logprobs is not None:
        for index, sample in enumerate(samples):
            print(*_table(run, sample), sep="\n", end="\n" if index == len(samples) - 1 else "\n\n")
    print(timed.speed() + drafts_kept(drafts), file=sys.stderr, flush=True)


def _print_samples(parts, echo: str, n: int, shown: Callable[[str], str]) -> list[Completion]:
    """The samples of one prompt; the first is printed as it comes, the others behind it."""
    titles = [f"== sample {i + 1} of {n} ==\n" if n > 1 else "" for i in range(n)]
    sys.stdout.write(titles[0] + echo)
    found: list[list[Increment]] = [[] for _ in range(n)]
    for row in parts:
        for of_sample, part in zip(found, row, strict=True):
            of_sample.append(part)
        sys.stdout.write(shown(row[0].text))
        sys.stdout.flush()
        for part in row:
            if part.error is not None:
                raise ValueError(part.error)
    sys.stdout.write("\n")
    samples = [Completion.of(of_sample) for of_sample in found]
    for title, sample in zip(titles[1:], samples[1:], strict=True):
        sys.stdout.write(f"{title}{echo}{shown(sample.text)}\n")
    return samples


def _table(run: TrainedRun, sample: Completion) -> list[str]:
    """The tokens of a sample with their log-probabilities, and the likeliest ones of each place."""
    rows = [f"{'':>6}  {'logprob':>8}  {'token':12}  likeliest"]

    def quoted(token: int) -> str:
        text = run.tokenizer.decode([token])
        return (
            f"<{token}>" if not text or "\ufffd" in text else printable(json.dumps(text, ensure_ascii=False))
        )

    for index, token in enumerate(sample.tokens.tolist()):
        top = zip(sample.top_ids[index].tolist(), sample.top_logprobs[index], strict=True)
        likeliest = "  ".join(f"{quoted(other)} {logprob:.3f}" for other, logprob in top)
        rows.append(f"{index:6}  {sample.logprobs[index]:8.3f}  {quoted(token):12}  {likeliest}".rstrip())
    return rows


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
