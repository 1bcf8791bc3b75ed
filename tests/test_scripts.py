"""Mistakes in the command lines of scripts: told in one line, exit status 2."""

import pytest

from scripts import benchmark, generate


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
    with pytest.raises(SystemExit) as left:
        benchmark.main(arguments)
    assert left.value.code == 2 and message in capsys.readouterr().err


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
