"""Mistakes in the command lines of scripts: told in one line, exit status 2."""

import pytest

from attention_jax import AttentionConfig, ModelConfig
from attention_jax.mixers import DeltaNetConfig
from scripts import benchmark, compare, generate, trials

MECHANISMS = trials.ROOT / "configs" / "mechanisms"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attention", "--masks", "foo"], "--masks: mask 'foo': no mask 'foo'"),
        (["attention", "--dtype", "foo"], "--dtype: invalid choice: 'foo'"),
        (["attention", "--heads", "0"], "--heads: must be an integer >= 1, got 0"),
        (["attention", "--lengths", "64", "-3"], "--lengths: must be an integer >= 1, got -3"),
    ],
)
def test_benchmark(capsys, arguments, message):
    with pytest.raises(SystemExit, match="^2$"):
        benchmark.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", str(10**23)], f"--seed must be in [0, 4294967296), got {10**23}"),
        (["--step", "\u00b2"], "--step must be a number, latest or best, got \u00b2"),
        ([], "is no run folder"),
    ],
)
def test_generate(capsys, tmp_path, arguments, message):
    assert generate.main([str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_what_the_comparison_takes_by_itself_is_on_equal_terms():
    paths = compare._next_token([])
    compare.check_equal_terms(paths, [])
    left_out = {path.stem for path in MECHANISMS.glob("*.yaml")} - {path.stem for path in paths}
    assert left_out == {"linformer", "nystromformer"}


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("linformer", ["seed=1"], "linformer.yaml trains masked_lm, whose loss is no bits per byte"),
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
