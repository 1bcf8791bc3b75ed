"""Prints text that a model continues a prompt with, token by token.

    python scripts/generate.py runs/tiny --prompt "class " --top-k 40
    python scripts/generate.py runs/tiny --chat
    python scripts/generate.py path/to/model.gguf --ask "What is a quine?"

A model is the folder of a run, or a published one: a folder of Hugging Face,
a .gguf file, or hf: and a name on the hub: hf:HuggingFaceTB/SmolLM2-135M.

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

A model with a chat template answers each line as a message, in that template;
--system gives a message before them, --ask asks one question and ends.

In --template and --stop, \\n is a newline, \\t a tab, and \\\\ a backslash.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import jax

from attention_jax.caches import CacheOptions
from attention_jax.generation import Completion, DraftModel, Increment, NGram, Sampling, stream
from attention_jax.tokenizers import Tokenizer
from train import command_line
from train.commands.chat import Settings, check_template, converse
from train.commands.speed import clock, drafts_kept
from train.commands.types import (
    Count,
    EscapedTexts,
    Folder,
    Integer,
    Integers,
    MaybeCount,
    MaybeEscaped,
    MaybeInteger,
    MaybeNumber,
    MaybePath,
    MaybeText,
    Number,
    Positional,
)  # fmt: skip
from train.run.published import PublishedModel, load_source
from train.run.restore import Requests, TrainedRun
from train.streams import printable

Source = TrainedRun | PublishedModel
_LONG = 4096  # tokens that a small model takes seconds to read


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line gives."""

    model: Positional[Folder]  #: a run's folder, or a published model: folder, .gguf file or hf:OWNER/NAME
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
    ask: MaybeText = None  #: answer this one message, as --chat does, and end
    system: MaybeText = None  #: --chat: the system message of a model with a chat template
    #: --chat: the text of a turn, with {user} for the line; none: the model's chat template, or a line
    template: MaybeEscaped = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = (
        None  #: in which a published model is stored; none: as in its files
    )
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
    chats = options.chat or options.ask is not None
    _check_chat(options) if chats else _check_no_chat(options)
    source = load_source(options.model, step=step, dtype=options.dtype)
    print(source.title, file=sys.stderr, flush=True)
    if not chats:
        _print_text(source, options, sampling)
        return
    settings = Settings(
        sampling, options.tokens, options.template, options.seed, _cache(options),
        _speculation(source, options), options.capacity, options.system,
    )  # fmt: skip
    converse(source, settings, options.ask)


def _check_chat(options: Options) -> None:
    """ValueError for options that --chat does not have."""
    refused = {"--prompt": options.prompt, "--n": options.n > 1, "--draft": options.draft is not None}
    refused["--logprobs"] = options.logprobs is not None
    if given := [name for name, there in refused.items() if there]:
        raise ValueError(f"--chat continues one text line by line, without {given[0]}: leave it out")
    if options.chat and options.ask is not None:
        raise ValueError("--ask answers one message and ends: leave out --chat")
    if options.template is not None:
        check_template(options.template)


def _check_no_chat(options: Options) -> None:
    """ValueError for options that only --chat has."""
    if options.system is not None:
        raise ValueError("--system is a message of --chat or --ask: give one of them")


def _cache(options: Options) -> CacheOptions:
    return CacheOptions(quantize=None if options.cache == "float" else options.cache)


def _speculation(run: Source, options: Options) -> NGram | DraftModel | None:
    """What drafts tokens, if anything; ValueError for a run with another tokenizer."""
    if options.draft is None:
        return None if options.speculate is None else NGram(options.speculate)
    draft = load_source(options.draft)
    theirs, ours = (None if r.tokenizer is None else r.tokenizer.to_json() for r in (draft, run))
    if theirs != ours:
        raise ValueError(f"--draft {options.draft}: its tokenizer is another than that of {options.model}")
    count = {} if options.speculate is None else {"num_tokens": options.speculate}
    return DraftModel(draft.model, draft.params, **count)


def _print_text(run: Source, options: Options, sampling: Sampling) -> None:
    seed = secrets.randbits(32) if options.seed is None else options.seed
    requests = run.requests([options.prompt])
    for note in notes(run, requests):
        print(note, file=sys.stderr, flush=True)
    speculation = _speculation(run, options)
    shown = printable if sys.stdout.isatty() else str
    sampling = dataclasses.replace(sampling, stop_ids=(*sampling.stop_ids, *run.stop_ids))
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
        parts = _with_lead(run.tokenizer, timed.counted(parts)) if requests.echo[0] else timed.counted(parts)
        samples = _print_samples(parts, shown(requests.echo[0]), options.n, shown)
    drafts = None
    if speculation is not None:
        drafts = tuple(sum(counts) for counts in zip(*(sample.drafts for sample in samples), strict=True))
    if options.logprobs is not None:
        for index, sample in enumerate(samples):
            print(*_table(run, sample), sep="\n", end="\n" if index == len(samples) - 1 else "\n\n")
    print(timed.speed() + drafts_kept(drafts), file=sys.stderr, flush=True)


def _with_lead(tokenizer: Tokenizer, parts: Iterator[list[Increment]]) -> Iterator[list[Increment]]:
    """The parts, with the space that a tokenizer drops at the start of a text and that follows a prompt."""
    begun: set[int] = set()
    for row in parts:
        for index, part in enumerate(row):
            if index not in begun and part.text:
                begun.add(index)
                first = tokenizer.pieces.texts.get(int(part.tokens[0]), b"") if len(part.tokens) else b""
                if tokenizer.pieces.lead != "keep" and first.startswith(b" "):
                    row[index] = dataclasses.replace(part, text=" " + part.text)
        yield row


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


def _table(run: Source, sample: Completion) -> list[str]:
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


def notes(run: Source, requests: Requests) -> list[str]:
    """What to say before a text that is longer than in training, or takes long to read."""
    found = []
    kinds = [("prompt", requests.prompts[0])]
    if requests.sources is not None:
        kinds.append(("source", requests.sources[0]))
    for name, ids in kinds:
        trained = run.trained_lengths[name]
        if trained is not None and len(ids) > trained:
            found.append(
                f"note: the {name} has {len(ids):,} tokens, and the model was trained on at most {trained:,}:"
                " its text after a longer one may be worse"
            )
        if len(ids) > _LONG:
            found.append(f"note: reading the {len(ids):,} tokens of the {name} before the first new one")
    return found
