"""`scripts/generate.py MODEL --chat`: lines of the standard input, and what the model continues them with.

With a chat template a line is a message: the whole conversation is rendered in every turn, and what of it the
state has not read is read. Without one the text of the model is the turns, and of each answer what was shown:
`Session.tokens`. On a terminal lines are asked for; from a pipe each line is a turn. Answers go to stdout,
all else to stderr.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import secrets
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from attention_jax import caches
from attention_jax.caches import CacheOptions
from attention_jax.generation import Increment, NGram, Sampling, Session
from attention_jax.model import fingerprint
from attention_jax.tokenizers import PublishedTokenizer
from train.command_line import is_users
from train.commands.dialogue import Dialogue, Messages, common_length
from train.commands.speed import Clock, clock, drafts_kept
from train.run.published import PublishedModel
from train.run.restore import TrainedRun
from train.streams import printable, report

Source = TrainedRun | PublishedModel
TEMPLATE = "{user}\n"
_USER = "{user}"
_CAPACITY = 4096
_HELP = """\
a line          a turn: the model continues the text after it
an empty line   the model goes on without a turn
//...           a line that begins with one slash
/undo           take back the last turn
/save FILE      write the text and the state of the model
/load FILE      go on from such a file
/reset          forget the text
/help           this list
Ctrl-C          stop a turn and keep what was shown; at an empty line: end
Ctrl-D          end
"""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the turns are generated.

    template: None is the model's chat template, or `TEMPLATE` where it has none. capacity: None is 4096, or
    the model's limit if that is less. system: the first message, for a model with a chat template.
    """

    sampling: Sampling
    tokens: int
    template: str | None = None
    seed: int | None = None
    cache: CacheOptions = CacheOptions()
    speculation: NGram | None = None
    capacity: int | None = None
    system: str | None = None


def check_template(template: str) -> None:
    """ValueError unless the template has one place for the line."""
    if template.count(_USER) != 1:
        raise ValueError(f"--template must contain {_USER} once, for the line, got {template!r}")


def converse(run: Source, settings: Settings, question: str | None = None) -> None:
    """Read lines until the input ends, each a turn or a command; or answer one question."""
    with clock() as timed, _Interrupts() as interrupts:
        chat = Chat(run, settings, timed, interrupts)
        if question is not None:
            chat.say(question)
            return
        if sys.stdin.isatty():
            print(f"{chat.capacity:,} positions; /help lists the commands", file=sys.stderr, flush=True)
        while True:
            try:
                if (line := interrupts.line()) is None:
                    return
                chat.take(line)
            except KeyboardInterrupt:
                report("interrupted")
            except ValueError as error:
                if not is_users(error):
                    raise
                report(f"error: {error}")


class Chat:
    """A conversation with a model."""

    def __init__(self, run: Source, settings: Settings, timed: Clock, interrupts: _Interrupts):
        """ValueError for a run that has no text, or that continues none."""
        if run.model.encoder is not None:
            raise ValueError("--chat continues one text, and a run of objective seq2seq answers one source")
        if run.tokenizer is None:
            run.requests([""])  # refuses a run of a task
        self._dialogue = _dialogue(run, settings)
        self._run, self._settings, self._timed, self._interrupts = run, settings, timed, interrupts
        limit = run.model.limit[0] if run.model.limit else None
        self.capacity = settings.capacity or min(limit or _CAPACITY, _CAPACITY)
        spare = 0 if settings.speculation is None else settings.speculation.num_tokens
        self._cache = dataclasses.replace(settings.cache, spare=spare)
        self._terminal = sys.stdout.isatty()
        self._long = False  # whether it was said that the text is longer than in training
        self._reset()

    def take(self, line: str) -> None:
        """Do what a line says; ValueError if it cannot be done, and nothing is changed then."""
        if not line.startswith("/"):
            self.say(line)
        elif line.startswith("//"):
            self.say(line[1:])
        else:
            name, _, words = line[1:].partition(" ")
            commands = {
                "undo": self._undo, "save": self._save, "load": self._load, "reset": self._reset,
                "help": lambda: print(_HELP, end="", file=sys.stderr, flush=True),
            }  # fmt: skip
            if name not in commands:
                raise ValueError(f"there is no command /{name}; there are /{', /'.join(commands)}")
            file = [words.strip()] if name in ("save", "load") else []
            if file == [""]:
                raise ValueError(f"/{name} needs the name of a file")
            if not file and words.strip():
                raise ValueError(f"/{name} takes no words, got {words.strip()}")
            commands[name](*file)

    @functools.cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self._run.model, self._run.params)

    def _session(self, capacity: int, **begun: Any) -> Session:
        tokenizer = self._run.tokenizer
        return Session(
            self._run.model, self._run.params, capacity=capacity, eos_id=tokenizer.end_of_document,
            tokenizer=tokenizer, cache=self._cache, **begun,
        )  # fmt: skip

    def say(self, line: str) -> None:
        """A turn: the text and the state go on, and what the model writes is shown."""
        before, messages = self.session.fork(), self._messages
        try:
            ids = self._unread(line) if self._dialogue is None else self._rendered(line)
            parts = self._begin(ids)
        except ValueError:
            self.session = before
            self._messages = messages
            raise
        self._before, began = before, len(self.session.tokens)
        self._turns.append((len(before.tokens), messages))
        error, drafts = self._show(parts, began)
        self._tell(drafts)
        if error is not None:
            raise ValueError(error)

    def _unread(self, line: str) -> np.ndarray:
        """The tokens of a turn that continues the text."""
        template = TEMPLATE if self._settings.template is None else self._settings.template
        text = template.replace(_USER, line) if line else ""
        if len(self.session.tokens):
            return self._run.tokenizer.encode(text)
        return self._run.requests([text]).prompts[0]

    def _rendered(self, line: str) -> np.ndarray:
        """The tokens of a message that the session lacks; it takes back those that are not the template's."""
        if not line:
            self._dialogue.go_on()
            return np.zeros(0, np.int32)
        whole, had = self._dialogue.ask(line), self.session.tokens
        kept = common_length(had, whole)
        if kept < len(had):
            report(
                f"note: the chat template writes the conversation in other tokens from token {kept:,} on: "
                f"{len(whole) - kept:,} are read again"
            )
            try:
                self.session.rewind(len(had) - kept)
            except ValueError:  # a state that does not go back so far
                self.session, kept = self._session(self.capacity), 0
        return whole[kept:]

    def _begin(self, ids: np.ndarray) -> Iterator[Increment]:
        """The increments of an answer after these tokens."""
        settings, session = self._settings, self.session
        left = session.capacity - len(session.tokens) - len(ids)
        if left < 1:
            used = f"{len(session.tokens):,} of {session.capacity:,} positions are used"
            raise ValueError(
                f"the context is full: {used}, and the turn has {len(ids):,} tokens; /undo or /reset, or "
                "start with a larger --capacity"
            )
        sampling = settings.sampling
        stop_ids = (*sampling.stop_ids, *self._run.stop_ids)
        sampling = dataclasses.replace(sampling, stop_ids=stop_ids, min_tokens=min(sampling.min_tokens, left))
        seed = secrets.randbits(32) if settings.seed is None else settings.seed
        self._timed.restart()
        return session.say(
            ids, max_new_tokens=min(settings.tokens, left), sampling=sampling, key=jax.random.key(seed),
            speculation=settings.speculation,
        )  # fmt: skip

    @property
    def _messages(self) -> Messages:
        return () if self._dialogue is None else self._dialogue.messages

    @_messages.setter
    def _messages(self, messages: Messages) -> None:
        if self._dialogue is not None:
            self._dialogue.messages = messages

    def _show(self, parts: Iterator[Any], began: int) -> tuple[str | None, tuple[int, int] | None]:
        """Print an answer as it comes, until it ends or Ctrl-C; the text then has what was printed."""
        shown, error, drafts = "", None, None
        try:
            with self._interrupts.deferred():
                for part in parts:
                    sys.stdout.write(printable(part.text) if self._terminal else part.text)
                    sys.stdout.flush()
                    self._timed.count(len(part.tokens))
                    shown, error, drafts = shown + part.text, part.error, part.drafts
                    if self._interrupts.arrived:
                        break
        finally:
            self._keep(began, shown)
            if self._dialogue is not None:
                self._dialogue.answer(shown)
            if not shown.endswith("\n"):
                print(flush=True)
        return error, drafts

    def _keep(self, began: int, shown: str) -> None:
        """Let the text end where the text that was shown does: within a token, by tokens of its beginning."""
        new, decode = self.session.tokens[began:].tolist(), self._run.tokenizer.decode
        kept = len(new)
        while not shown.startswith(text := decode(new[:kept])):
            kept -= 1
        self.session.rewind(len(new) - kept)
        if rest := shown[len(text) :]:
            self.session.add(self._run.tokenizer.encode(rest))

    def _tell(self, drafts: tuple[int, int] | None) -> None:
        """Print what the turn took, and how much of the context is used."""
        used, most = len(self.session.tokens), self._run.trained_lengths["prompt"]
        if most is not None and used > most and not self._long:
            self._long = True
            report(
                f"note: the text has {used:,} tokens, and the model was trained on at most {most:,}: it "
                "may be worse from here on"
            )
        speed = self._timed.speed() + drafts_kept(drafts)
        report(f"[{speed}; {used:,} of {self.session.capacity:,} positions]")

    def _reset(self) -> None:
        self.session: Session = self._session(self.capacity)
        self._turns: list[tuple[int, Messages]] = []  # the tokens and the messages before each turn
        self._before: Session | None = None  # the session before the last turn
        if self._dialogue is not None:
            self._dialogue.reset()

    def _undo(self) -> None:
        if not self._turns:
            raise ValueError("there is no turn to take back")
        if self._before is not None:
            self.session, self._before = self._before, None
        else:  # only states that hold all tokens go back further
            self.session.rewind(max(0, len(self.session.tokens) - self._turns[-1][0]))
        _, self._messages = self._turns.pop()
        report(f"[{len(self.session.tokens):,} of {self.session.capacity:,} positions]")

    def _save(self, name: str) -> None:
        path = Path(name).expanduser()
        stored = {"state": self.session.state, "tokens": self.session.tokens}
        if self._dialogue is not None:
            stored["messages"] = self._dialogue.dumps()
        try:
            caches.save(path, stored, model=self._fingerprint)
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror or error}") from None
        report(f"saved {len(self.session.tokens):,} tokens in {path}")

    def _load(self, name: str) -> None:
        path = Path(name).expanduser()
        try:
            stored = caches.load(path, model=self._fingerprint)
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror or error}") from None
        names = {"state", "tokens"} | ({"messages"} if self._dialogue is not None else set())
        if not isinstance(stored, dict) or stored.keys() != names:
            raise ValueError(
                f"{path}: is not a {'text' if len(names) == 2 else 'conversation'} that /save wrote"
            )
        state, tokens = stored["state"], np.asarray(stored["tokens"])
        capacity = getattr(state, "capacity", None) or max(self.capacity, len(tokens))
        self.session = self._session(capacity, state=state, tokens=tokens)
        if self._dialogue is not None:
            self._dialogue.load(stored["messages"])
        self._turns, self._before = [], None
        report(f"[{len(tokens):,} of {capacity:,} positions]")


def _dialogue(run: Source, settings: Settings) -> Dialogue | None:
    """The conversation of a model with a chat template; None where lines continue a text."""
    tokenizer = run.tokenizer
    has = isinstance(tokenizer, PublishedTokenizer) and tokenizer.special.chat_template is not None
    if has and settings.template is None:
        return Dialogue(tokenizer, settings.system)
    if settings.system is not None:
        why = "--template takes its place" if has else "this model has none"
        raise ValueError(f"--system is a message of a chat template, and {why}: leave it out")
    return None


class _Interrupts:
    """Ctrl-C while a line is asked for, and during a turn.

    `with self.deferred():` only records the first one, in `arrived`, to end the turn between two increments.
    """

    def __init__(self):
        self.arrived = self._deferring = False
        self._typed = ""

    def __enter__(self) -> _Interrupts:
        self._former = None
        usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if usual and threading.current_thread() is threading.main_thread():
            self._former = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._former is not None:
            signal.signal(signal.SIGINT, self._former)

    def _handle(self, *_: Any) -> None:
        if self._deferring and not self.arrived:
            self.arrived = True
            return
        self._typed = sys.modules["readline"].get_line_buffer() if "readline" in sys.modules else ""
        raise KeyboardInterrupt

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Within, the first interruption does not raise."""
        self.arrived, self._deferring = False, True
        try:
            yield
        finally:
            self._deferring = False

    def line(self) -> str | None:
        """The next line of the standard input without its newline; None at its end, or if it is ended."""
        asked = sys.stdin.isatty()
        if asked:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 (input() then edits lines)
        while True:
            self._typed = ""
            try:
                if asked:
                    return input("> ")
                text = sys.stdin.readline()
                return text.removesuffix("\n") if text else None
            except (EOFError, KeyboardInterrupt) as error:
                if asked:
                    print(file=sys.stderr)
                if isinstance(error, EOFError) or not self._typed:
                    return None
