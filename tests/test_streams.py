"""How a process prints and ends, whatever its streams are connected to and whichever signal it gets."""

import io
import os
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest

from attention_jax.generation import Increment, Sampling
from attention_jax.tokenizers import ByteTokenizer
from train import signals, streams
from train.commands import generate, trials
from train.run.restore import Requests

ROOT = Path(__file__).parents[1]

# What a command does, as its word says, within the guard of every command.
COMMAND = r"""
import os, sys, threading, time
from train.command_line import guard
from train.run.failure import RunError

def run():
    what = sys.argv[1]
    if what == "print":
        print("caf\xe9 \u2588")
    elif what == "late":
        time.sleep(0.2)
        print("too late")
    elif what == "much":
        for _ in range(100000):
            print("a line")
    elif what == "mistake":
        raise ValueError("a mistake\x1b[2J")
    elif what == "failure":
        raise RunError("a failure")
    elif what == "debug_nans":
        raise FloatingPointError("invalid value (nan) encountered in mul")
    elif what == "memory":
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore")
    elif what == "thread":
        thread = threading.Thread(target=lambda: 1 / 0, name="writer")
        thread.start()
        thread.join()
    elif what == "descriptor":  # of a file that is opened now
        os.write(2, b"a number above 2\n" if os.open(os.devnull, os.O_RDONLY) > 2 else b"taken\n")
    return 0

sys.exit(guard(run))
"""

# (a line of shell, the status of `run`, all that it printed)
ENDINGS = [
    ("run print", 0, "café █\n"),
    ("PYTHONIOENCODING=ascii run print", 0, "caf\\xe9 \\u2588\n"),
    ("LC_ALL=C PYTHONCOERCECLOCALE=0 PYTHONUTF8=0 run print", 0, "caf\\xe9 \\u2588\n"),
    ("run print >&- 2>&- <&-", 0, ""),
    ("run mistake 2>&-", 2, ""),
    ("run mistake 2>/dev/full", 2, ""),
    ("run descriptor >&- <&-", 0, "a number above 2\n"),
    ("run print >/dev/full", 1, "error: standard output: No space left on device\n"),
    ("PYTHONUNBUFFERED=1 run print >/dev/full", 1, "error: standard output: No space left on device\n"),
    ("run much | head -n 1", 141, "a line\n"),
    ("run late | true", 141, ""),
    ("run mistake", 2, "error: a mistake\\x1b[2J\n"),
    ("run failure", 1, "error: a failure\n"),
    ("run debug_nans", 1, "error: invalid value (nan) encountered in mul (<string>:21)\n"),
    (
        "run memory",
        1,
        "error: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.; less memory is needed with fewer rows,"
        " shorter ones or a smaller model\n",
    ),
    ("run thread", 0, "error: the thread writer ended by ZeroDivisionError: division by zero\n"),
]


def test_every_ending_of_a_command(tmp_path):
    script = f'run() {{ "{sys.executable}" -W error "{tmp_path}/command.py" "$1"; }}\n'
    (tmp_path / "command.py").write_text(COMMAND)
    for number, (line, _, _) in enumerate(ENDINGS):
        script += f"{{ {line}; echo ${{PIPESTATUS[0]}} >status{number}; }} >out{number} 2>&1\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
    subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, check=True, timeout=120)
    for number, (line, status, text) in enumerate(ENDINGS):
        printed = (tmp_path / f"out{number}").read_text("utf-8")
        found = (int((tmp_path / f"status{number}").read_text()), printed)
        assert found == (status, text.replace("<string>", str(tmp_path / "command.py"))), line


# A process whose main thread is in a long call of compiled code, as in a compilation, when signals arrive.
STUCK = """
import hashlib, os, signal, sys, threading, time
from train import signals
deferred, *numbers = map(int, sys.argv[1:])
short = len(numbers) > 1 and numbers[0] < 0
signals._PATIENCE, signals._REPEATED = 30 if short else 0.3, 0.2
def send():
    time.sleep(0.1)
    for number in numbers:
        os.kill(os.getpid(), abs(number))
        time.sleep(0.4 if number > 0 else 0.01)
with signals.Signals() as handled:
    handled.defer(bool(deferred))
    threading.Thread(target=send, daemon=True).start()
    end = time.monotonic() + 0.5
    while time.monotonic() < end:  # Python runs a signal's handler between two calls
        hashlib.pbkdf2_hmac("sha256", b"", b"", 20_000 if short else 10**8)
    print("not stuck any more", handled.number)
    handled.check()
"""


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (("0", "15"), 143, "stopped by SIGTERM: there was no new step to save; the same command goes on\n"),
        (("1", "15", "2"), 130, "stopped by SIGINT: a second signal, so nothing was saved now\n"),
        (("1", "-15", "-15"), 1, "train.signals.Stopped: stopped by SIGTERM\n"),
    ],
)
def test_signals_in_a_compilation(words, status, text):
    """Nothing to save: at once. A second signal: at once. The same one again within a moment: no second."""
    command = [sys.executable, "-W", "error", "-c", STUCK, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr[-len(text) :]) == (status, text)
    assert done.stdout == ("not stuck any more 15\n" if status == 1 else "")


def test_what_a_terminal_obeys_is_escaped():
    obeyed = "\x1b[2J \x9b31m \x07 \r \x00 \x7f \x85 \u202e \u2028 \u200d \u2066 \ufeff \ue000"
    assert streams.printable(obeyed) == (
        "\\x1b[2J \\x9b31m \\x07 \\r \\x00 \\x7f \\x85 \\u202e \\u2028 \\u200d \\u2066 \\ufeff \\ue000"
    )
    kept = "def f(x):\n\treturn 'é ü 中文 \u00a0\u3000 █ 🙂 \ufffd \\x1b'"
    assert streams.printable(kept) == kept


def test_a_lasting_stream_writes_what_it_can(capsys):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="latin-1")
    output = streams.Lasting(stream, "the log")
    print("é █", file=output, flush=True)
    assert raw.getvalue() == b"\xe9 \\u2588\n" and not output.isatty()
    stream.close()
    print("lost", file=output, flush=True)
    print("lost", file=output, flush=True)
    assert capsys.readouterr().err == (
        "note: standard output failed (I/O operation on closed file.): the run goes on, its progress is in "
        "the log\n"
    )


class Terminal(io.StringIO):
    """Stands for a terminal."""

    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("kind", "shown"), [(Terminal, "\\x1b>\\x1b[31m é\n"), (io.StringIO, "\x1b>\x1b[31m é\n")]
)
def test_generate_escapes_on_a_terminal_alone(monkeypatch, kind, shown):
    tokenizer = ByteTokenizer()
    run = types.SimpleNamespace(
        model=None,
        params=None,
        tokenizer=tokenizer,
        requests=lambda texts: Requests([[1]], None, texts),
        trained_lengths={"prompt": 256},
        stop_ids=(),
    )
    text = "\x1b[31m é"

    def part(character):
        return Increment(0, 0, tokenizer.encode(character), character)

    monkeypatch.setattr(generate, "stream", lambda *_, **__: ([part(character)] for character in text))
    monkeypatch.setattr(sys, "stdout", kind())
    generate._print_text(run, generate.Options("run", prompt="\x1b>"), Sampling())
    assert sys.stdout.getvalue() == shown


@pytest.mark.parametrize("number", signals.NUMBERS)
def test_runs_of_a_comparison_get_its_signals(monkeypatch, tmp_path, number):
    """The training process gets a SIGTERM that only we got, has time to save, and its status is ours."""
    child = "import signal, sys, time; signal.signal({0}, lambda *_: (time.sleep(0.4), sys.exit(128 + {0})));"
    child += "open(sys.argv[1], 'w').close(); time.sleep(60)"
    real, ready = subprocess.Popen, tmp_path / "ready"

    def started(command):
        process = real([sys.executable, "-c", child.format(int(number)), str(ready)])
        while not ready.exists():
            time.sleep(0.01)
        threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
        return process

    monkeypatch.setattr(subprocess, "Popen", started)
    with pytest.raises(signals.Stopped, match="run goes on with the same command") as caught:
        trials.train(Path("config.yaml"), [], Path("run"))
    assert caught.value.number == number
