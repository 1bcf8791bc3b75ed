"""Command lines: a mistake gives one line and exit status 2, and what the tables of comparisons hold."""

import dataclasses
import importlib
import re
import shlex
import subprocess
import sys
import types

import numpy as np
import pytest

from attention_jax import AttentionConfig, ModelConfig
from attention_jax.mixers import DeltaNetConfig
from scripts import kernel_report, tune
from train import command_line
from train.commands import benchmark, compare, convert, generate, recall, visualize
from train.config import shipped
from train.run.restore import Requests

MECHANISMS = shipped.FOLDER / "mechanisms"


COMMANDS = {
    module.__name__.rpartition(".")[2]: module
    for module in (benchmark, compare, convert, generate, kernel_report, recall, tune, visualize)
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("columns", [80, 200])
def test_help_explains_every_option_within_80_columns(capsys, monkeypatch, name, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert COMMANDS[name].main(["--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: ") and max(map(len, text.splitlines())) <= 80
    assert COMMANDS[name].__doc__.strip() in text
    for field in dataclasses.fields(COMMANDS[name].Options):
        if "Suppress" not in str(field.type) and "Positional" not in str(field.type):
            assert f"--{field.name.replace('_', '-')} " in text
    rows = [line.strip("│ ") for line in text.splitlines() if line.startswith("│")]
    assert not [row for row in rows if re.fullmatch(r"(--\S+ .*|)\(default: .*\)", row) and "  (" in row]


def test_an_unknown_option_is_answered_with_the_nearest(capsys):
    assert compare.main(["--seed", "0"]) == 2
    assert capsys.readouterr().err == "error: Unrecognized options: --seed, 0; did you mean --seeds?\n"


def test_a_package_that_is_missing_is_named_with_what_installs_it(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert visualize.main(["mask", "Causal()"]) == 2
    error = capsys.readouterr().err
    assert (
        error
        == 'error: the package matplotlib is not installed: pip install "attention_jax[train]" brings it\n'
    )


def test_defects_keep_their_traceback():
    def broken():
        np.zeros(3).reshape(2)

    def missing():
        importlib.import_module("train.no_such_module")

    with pytest.raises(ValueError, match="cannot reshape"):
        command_line.guard(broken)
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        command_line.guard(missing)


@pytest.mark.parametrize("name", ["benchmark", "compare", "generate", "recall", "visualize"])
def test_a_script_runs_from_another_folder(tmp_path, name):
    """As the documentation has it, without an installation."""
    script = shipped.FOLDER.resolve().parent / "scripts" / f"{name}.py"
    command = f'"{sys.executable}" -W error "{script}" --help | head -n 1'
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith(f"usage: {name}.py")


def _documented():
    """(program, words) of every command line `python scripts/NAME.py ...` in the documentation."""
    root = shipped.FOLDER.resolve().parent
    for page in [root / "README.md", *sorted((root / "docs").rglob("*.md"))]:
        text = page.read_text("utf-8").replace("\\\n", " ")
        for name, rest in re.findall(r"python scripts/(\w+)\.py\b([^`\n]*)", text):
            if "$(" not in rest:  # a loop of the shell
                yield name, shlex.split(rest, comments=True)


def test_documented_command_lines_are_understood():
    seen = set()
    for name, words in _documented():
        seen.add(name)
        command_line.parse(COMMANDS[name].Options, words)  # raises for what it does not understand
    assert seen >= {"benchmark", "compare", "generate", "recall", "visualize"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attention", "--masks", "foo"], "--masks: mask 'foo': unknown mask 'foo'"),
        (["attention", "--dtype", "foo"], "--dtype: must be one of float32, bfloat16, float16, got foo"),
        (["attention", "--heads", "0"], "--heads: must be an integer >= 1, got 0"),
        (["attention", "--lengths", "64", "-3"], "--lengths: must be an integer >= 1, got -3"),
    ],
)
def test_benchmark(capsys, arguments, message):
    assert benchmark.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "--tokens must be >= 1, got 0"),
        (["--seed", str(10**23)], "--seed: must be at most 4294967295, got a number of 24 digits"),
        (["--step", "\u00b2"], "--step must be a number, latest or best, got \u00b2"),
        ([], "is not a run folder"),
    ],
)
def test_generate(capsys, tmp_path, arguments, message):
    assert generate.main([str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_prompt_longer_than_in_training_is_said():
    def said(prompt, source=None):
        run = types.SimpleNamespace(trained_lengths={"prompt": 256, "source": 100})
        sources = None if source is None else [np.zeros(source, int)]
        return generate.notes(run, Requests([np.zeros(prompt, int)], sources, [""]))

    assert said(256) == [] and said(1, 100) == []
    [note] = said(257)
    assert note.startswith("note: the prompt has 257 tokens, and the model was trained on at most 256:")
    [note] = said(1, 101)
    assert note.startswith("note: the source has 101 tokens, and the model was trained on at most 100:")
    assert said(120_001)[1] == "note: reading the 120,001 tokens of the prompt before the first new one"


def test_what_the_comparison_takes_by_itself_is_on_equal_terms():
    paths = compare._next_token([])
    compare.check_equal_terms(paths, [])
    left_out = {path.stem for path in MECHANISMS.glob("*.yaml")} - {path.stem for path in paths}
    assert left_out == {"linformer", "nystromformer"}


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("linformer", ["seed=1"], "linformer.yaml trains masked_lm, which is not scored in bits per byte"),
        ("../mqar/linear", ["seed=1"], "linear.yaml trains data.task mqar"),
        ("../tiny", ["seed=1"], "is not on equal terms with"),
        ("mqa", ["evaluation.final_full=false", "data.tokenizer=chars"], "final_full must be true"),
        ("mqa", ["steps=0"], "steps"),
    ],
)
def test_a_comparison_on_other_terms_is_refused_before_it_runs(capsys, tmp_path, name, overrides, message):
    paths = [str(MECHANISMS / "full.yaml"), str(MECHANISMS / f"{name}.yaml")]
    assert compare.main([*paths, "--runs", str(tmp_path / "runs"), "--set", *overrides]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "runs").exists()


def test_numbers_of_state():
    sizes = {"vocab_size": 8, "d_model": 16, "num_layers": 3, "max_positions": 40}
    softmax, delta = AttentionConfig(num_heads=4, num_kv_heads=2), DeltaNetConfig(num_heads=2)
    model = ModelConfig(mixers=(softmax, delta, delta), **sizes)
    recurrent = 2 * (2 * 8 * 8 + 3 * (16 + 16 + 16))  # the state, and what convolutions over 4 tokens keep
    assert compare.state_numbers(model, 40) == 2 * 40 * 2 * 4 + recurrent
    assert compare.state_numbers(model, 30) == 2 * 30 * 2 * 4 + recurrent
    assert compare.state_numbers(model, 41) is None


def test_the_comparison_draws_its_table():
    rows = [
        compare.Row("a", 1234, [2.0, 2.5], {8: 32, 64: None}, 12.4, {8: 0.126}),
        compare.Row("b", 99, [1.5, 1.5], {8: 7, 64: 7}, 3.0, {8: 0.1, 64: 0.2}),
    ]
    assert list(compare.table(rows, [8, 64])) == [
        "| mechanism | parameters | bits | state 8 | state 64 | step, ms | decode 8, ms | decode 64, ms |",
        "|---|---|---|---|---|---|---|---|",
        "| b | 99 | 1.500 [1.500, 1.500] | 7 | 7 | 3 | 0.10 | 0.20 |",
        "| a | 1,234 | 2.250 [2.000, 2.500] | 32 | - | 12 | 0.13 | - |",
    ]


@pytest.mark.slow
def test_a_comparison_from_end_to_end(capfd, tmp_path):
    (tmp_path / "text.txt").write_text("all work and no play makes a dull boy. " * 200)
    changes = (
        "steps=3 model.d_model=16 model.num_layers=1 data.batch_size=2 data.sequence_length=16 "
        "evaluation.every=3 evaluation.batches=1 evaluation.final_full=false evaluation.sample_tokens=0 "
        "checkpoint.every=3 optimizer.warmup_steps=1 data.validation_split=tail"
    ).split()
    command = [str(MECHANISMS / f"{name}.yaml") for name in ("full", "linear")]
    command += ["--runs", str(tmp_path / "runs"), "--rounds", "1", "--capacities", "128", "--set", *changes]
    command.append(f"data.files={tmp_path}/text.txt")
    assert compare.main(command) == 0
    table = [line.split(" | ") for line in capfd.readouterr().out.splitlines() if line.startswith("| ")]
    states = {row[0]: row[3] for row in table[1:]}
    assert states == {"| full": f"{2 * 128 * 16:,}", "| linear": f"{4 * (4 * 4 + 4)}"}
    assert all(0 < float(row[2]) < 12 and float(row[5].rstrip(" |")) > 0 for row in table[1:])
    again = compare.main([*command, "--rounds", "0"])
    assert again == 0 and "is finished" in capfd.readouterr().out
