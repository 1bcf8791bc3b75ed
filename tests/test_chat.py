"""`generate.py --chat`: the turns and what was shown of the answers are its text; its commands."""

import dataclasses
import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from attention_jax import AttentionConfig, ModelConfig, RoPE, Sampling, generate, init_params
from attention_jax.generation import NGram, loop
from attention_jax.tokenizers import ByteTokenizer, CharTokenizer
from train.commands import generate as script
from train.commands.chat import Settings, converse
from train.config.schema import RunConfig
from train.run.restore import TrainedRun

ROOT = Path(__file__).parents[1]
MODEL = ModelConfig(
    vocab_size=257,
    d_model=16,
    num_layers=1,
    mixers=(AttentionConfig(num_heads=2, rope=RoPE()),),
    init_std=0.5,
)
PARAMS = init_params(MODEL, jax.random.key(0))
TOKENS, CAPACITY = 12, 192
GREEDY = Settings(Sampling(temperature=0, logit_bias={256: -1e9}), TOKENS, capacity=CAPACITY)
# Text whose encoding is its tokens.
ASCII = dataclasses.replace(
    GREEDY,
    sampling=Sampling(temperature=0, logit_bias={i: -1e9 for i in range(257) if not 32 <= i < 127}),
)
START = [256]  # the end-of-document token in front of a text
BYTES = ByteTokenizer()


class Interrupting(ByteTokenizer):
    """A tokenizer that does something when it has decoded some answers' tokens for the n-th time."""

    def __init__(self, after, action):
        self.left, self.action = after, action

    def decode(self, ids):
        self.left -= 1
        if self.left == 0:
            self.action()
        return super().decode(ids)


@pytest.fixture
def chat(monkeypatch, capsys):
    """Runs a chat over some lines: the answers, and what was said on stderr."""

    def run(*lines, settings=GREEDY, tokenizer=BYTES, params=PARAMS):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        converse(TrainedRun(RunConfig(), MODEL, params, tokenizer, 1), settings)
        return capsys.readouterr()

    return run


def answer(ids, count=TOKENS, settings=GREEDY):
    options = {"max_new_tokens": count, "capacity": CAPACITY, "tokenizer": BYTES}
    [done] = generate(MODEL, PARAMS, [ids], sampling=settings.sampling, **options)
    return done


def shown(text):
    """An answer as it is printed: a line."""
    return text if text.endswith("\n") else f"{text}\n"


def two_turns(first, second):
    one = answer([*START, *BYTES.encode(f"{first}\n")])
    history = [*START, *BYTES.encode(f"{first}\n"), *one.tokens]
    return one, answer([*history, *BYTES.encode(f"{second}\n")])


def test_two_turns_are_the_text_of_one_prompt_and_read_nothing_again(chat, monkeypatch):
    one, two = two_turns("ab", "cde")
    counts, start = [], loop.start
    monkeypatch.setattr(loop, "start", lambda *a, **k: counts.append(len(a[2][0])) or start(*a, **k))
    found = chat("ab", "cde")
    assert found.out == shown(one.text) + shown(two.text)
    assert counts == [4, 4]  # the end-of-document token is in front of the first
    ends = re.findall(r"^\[12 tokens, [\d,]+ tokens/s.*; (\d+) of 192 positions\]$", found.err, re.M)
    assert ends == ["16", "32"]


@pytest.mark.slow
def test_drafts_are_counted_and_change_nothing(chat):
    one, two = two_turns("ab", "cde")
    speculative = dataclasses.replace(GREEDY, speculation=NGram(2))
    found = chat("ab", "cde", settings=speculative)
    assert found.out == shown(one.text) + shown(two.text)
    assert re.search(r"\[12 tokens, .*, \d+ of \d+ drafts kept; 32 of 192 positions\]", found.err)


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize("action", [interrupt, lambda: os.kill(os.getpid(), signal.SIGINT)])
def test_ctrl_c_keeps_what_was_shown(chat, action):
    settings = dataclasses.replace(ASCII, tokens=40)
    whole = answer([*START, *BYTES.encode("ab\n")], 40, ASCII).text
    found = chat("ab", "cd", "/undo", settings=settings, tokenizer=Interrupting(3, action))
    kept = found.out.partition("\n")[0]
    assert whole.startswith(kept) and len(kept) in (8, 16, 24)
    rest = answer([*START, *BYTES.encode(f"ab\n{kept}cd\n")], 40, ASCII)
    assert found.out == shown(kept) + shown(rest.text)
    assert ("interrupted" in found.err) == (action is interrupt)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interruption_at_the_prompt_ends_it(chat, monkeypatch, capsys):
    class Interrupted(io.StringIO):
        def readline(self):
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", Interrupted())
    converse(TrainedRun(RunConfig(), MODEL, PARAMS, BYTES, 1), GREEDY)
    assert capsys.readouterr() == ("", "")


def test_undo_save_and_load_give_the_same_text_and_mistakes_end_nothing(chat, tmp_path):
    one, two = two_turns("ab", "cd")
    foreign, file = tmp_path / "foreign", tmp_path / "text"
    chat("x", f"/save {foreign}", params=jax.tree.map(lambda x: x + 1, PARAMS))
    lines = [
        "ab", f"/save {file}", "cd", "/undo", "cd", f"/load {foreign}", "/undo", "/undo", "/undo",
        f"/load {tmp_path}/none", "/load", "/what", f"/load {file}", "cd", "/reset", "", "ab",
    ]  # fmt: skip
    found = chat(*lines)
    a, b = shown(one.text), shown(two.text)
    again = answer(START)
    after = answer([*START, *again.tokens, *BYTES.encode("ab\n")])
    assert found.out == a + b + b + b + shown(again.text) + shown(after.text)
    errors = [line for line in found.err.splitlines() if line.startswith("error: ")]
    for error, message in zip(
        errors,
        [
            f"{foreign}: state of model .*, not of .*: prefill again or load that model",
            "there is no turn to take back",
            f"{tmp_path}/none: No such file or directory",
            "/load needs the name of a file",
            "there is no command /what; there are /undo, /save, /load, /reset, /help",
        ],
        strict=True,
    ):
        assert re.fullmatch(f"error: {message}", error)


def test_a_full_context_is_told_and_nothing_is_lost(chat):
    settings = dataclasses.replace(ASCII, tokens=180)
    found = chat("abc", "defg", "h" * 20, "/undo", "defg", settings=settings)
    first = [*START, *BYTES.encode("abc\n")]
    one = answer(first, 180, ASCII)
    two = answer([*first, *one.tokens, *BYTES.encode("defg\n")], 2, ASCII)
    assert found.out == shown(one.text) + shown(two.text) + shown(two.text)
    assert (
        "error: the context is full: 192 of 192 positions are used, and the turn has 21 tokens; /undo"
        in found.err
    )


def test_a_template_and_a_stop_string_that_is_no_part_of_the_text(chat):
    first = answer([*START, *BYTES.encode("Q: ab\nA:")], settings=ASCII)
    stop = first.text[4:6]
    cut = first.text.index(stop)
    sampling = dataclasses.replace(ASCII.sampling, stop=(stop,))
    settings = dataclasses.replace(GREEDY, sampling=sampling, template="Q: {user}\nA:")
    found = chat("ab", "cd", settings=settings)
    history = [*START, *BYTES.encode(f"Q: ab\nA:{first.text[:cut]}Q: cd\nA:")]
    second = answer(history, settings=ASCII).text.partition(stop)[0]
    assert found.out == shown(first.text[:cut]) + shown(second)
    assert f"; {9 + cut} of 192 positions]" in found.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a"], "--chat continues one text line by line, without --prompt: leave it out"),
        (["--n", "2"], "--chat continues one text line by line, without --n: leave it out"),
        (["--template", "user"], "--template must contain {user} once, for the line, got 'user'"),
    ],
)
def test_options_that_chat_does_not_have(capsys, tmp_path, arguments, message):
    assert script.main([str(tmp_path), "--chat", *arguments]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def generated(monkeypatch, capsys, *arguments, runs=None):
    """What `generate.py run --tokens 4 ...` prints, with runs in the place of folders."""
    runs = {"run": TrainedRun(RunConfig(), MODEL, PARAMS, BYTES, 1)} | (runs or {})
    monkeypatch.setattr(script, "load_source", lambda folder, **_: runs[str(folder)])
    status = script.main(["run", "--prompt", "ab", "--tokens", "4", *arguments])
    return status, capsys.readouterr()


def test_samples_and_their_log_probabilities(monkeypatch, capsys):
    arguments = ["--n", "2", "--logprobs", "2", "--seed", "3", "--cache", "int8"]
    status, found = generated(monkeypatch, capsys, *arguments)
    assert status == 0 and re.search(r"^8 tokens, [\d,]+ tokens/s(, compiled in .* s)?$", found.err, re.M)
    first, _, rest = found.out.partition("== sample 2 of 2 ==\n")
    assert first.startswith("== sample 1 of 2 ==\nab") and rest.startswith("ab")
    tables = re.findall(r"^ +logprob  token +likeliest\n((?: +\d.*\n){4})", rest, re.M)
    assert len(tables) == 2 and max(map(len, rest.splitlines())) <= 80
    for row in "".join(tables).splitlines():
        logprob, likeliest = (float(word) for word in (row.split()[1], row.rsplit(None, 3)[-3]))
        assert logprob <= likeliest <= 0
    again = generated(monkeypatch, capsys, "--seed", "3", "--cache", "int8", "--n", "2")[1].out
    assert again.startswith(first.rstrip("\n"))


def test_a_draft_model_of_another_tokenizer_is_refused(monkeypatch, capsys):
    other = TrainedRun(RunConfig(), MODEL, PARAMS, CharTokenizer("ab"), 1)
    status, found = generated(monkeypatch, capsys, "--draft", "other", runs={"other": other})
    assert status == 2 and found.out == ""
    assert found.err.endswith("error: --draft other: its tokenizer is another than that of run\n")


@pytest.mark.slow
def test_drafts_are_reported(monkeypatch, capsys):
    for arguments in (["--speculate", "2"], ["--draft", "run"]):
        status, found = generated(monkeypatch, capsys, *arguments, "--temperature", "0")
        assert status == 0
        kept, read = re.search(r"(\d+) of (\d+) drafts kept\n$", found.err).groups()
        assert int(kept) == int(read)


@pytest.mark.slow
def test_a_chat_from_end_to_end():
    run = ROOT / "tests" / "fixtures" / "saved_runs" / "scan"
    command = [sys.executable, "-W", "error", "scripts/generate.py", str(run), "--chat", "--tokens", "5000"]
    command += ["--capacity", "6000", "--temperature", "0"]
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, bufsize=0, **streams) as process:
        process.stdin.write("a sat\n")
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        while "positions]" not in (line := process.stderr.readline()):
            assert line
        assert 8 <= int(line[1:].split()[0].replace(",", "")) < 5000
        process.stdin.close()
        assert process.wait(timeout=60) == 0
