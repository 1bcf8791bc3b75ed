"""A command's second run compiles nothing, and no state of the cache's folder ends a run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from train import cli, command_line, compilation_cache
from train.compilation_cache import VARIABLE

ROOT = Path(__file__).parent.parent

# What a command does at its start, then a program: prints the cache's events and the bits of the result.
PROGRAM = """
import collections, json, os, sys
import jax, jax.numpy as jnp
from train import compilation_cache
events = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event.rpartition("/")[2]]))
jnp.zeros(3) + 1  # compiled before the folder is known
compilation_cache.enable()
events.clear()
x = jax.jit(lambda x: jnp.cumsum(jnp.sin(x) @ x.T, axis=1))(jnp.linspace(0, 1, 4096).reshape(64, 64))
found = {"hits": events["cache_hits"], "misses": events["cache_misses"], "bits": x.tobytes().hex()[:4096]}
found["folder"] = jax.config.jax_compilation_cache_dir
print(json.dumps(found))
"""


def run(folder, **environment):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env=os.environ | {VARIABLE: str(folder), "JAX_PLATFORMS": "cpu"} | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def files(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


@pytest.fixture(autouse=True)
def without_the_users_own(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("JAX_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE", "JAX_ENABLE_COMPILATION")):
            monkeypatch.delenv(name)


def test_a_second_process_compiles_nothing_and_gives_the_same_bits(tmp_path):
    first, said = run(tmp_path)
    entries = files(tmp_path)
    assert first["misses"] > 0 and first["hits"] == 0 and said == "" and entries
    assert first["folder"] == str(tmp_path / compilation_cache.machine())
    second, said = run(tmp_path)
    assert (second["hits"], second["misses"], said) == (first["misses"], 0, "")
    assert second["bits"] == first["bits"] and files(tmp_path) == entries


def test_a_folder_that_cannot_be_written_costs_one_line(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    found, said = run(file)
    assert found["folder"] is None and found["hits"] == found["misses"] == 0
    assert said.count("\n") == 1 and said.startswith("compiled programs are not kept: ") and VARIABLE in said


@pytest.mark.slow
def test_off_is_off_and_a_cache_of_jax_s_own_stays(tmp_path):
    assert run("off")[0]["folder"] is None
    assert run(tmp_path / "ours", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own"))[0]["folder"] == str(
        tmp_path / "own"
    )
    assert not (tmp_path / "ours").exists()


def test_the_folder_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value, base in (("", ".cache"), ("relative", ".cache"), (str(tmp_path / "xdg"), "xdg")):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert compilation_cache.default_folder() == tmp_path / base / "attention_jax" / "compiled"


def test_the_folder_is_bounded_by_deleting_what_was_not_used_the_longest(tmp_path):
    for age, name in enumerate(("jax-1/new", "jax-1/older", "jax-0/oldest")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(100))
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    (tmp_path / "other").write_bytes(bytes(1000))  # not ours to delete
    compilation_cache.prune(tmp_path, 300)
    assert len(files(tmp_path)) == 4
    compilation_cache.prune(tmp_path, 199)
    assert files(tmp_path) == [Path("jax-1/new"), Path("other")]


def test_programs_have_the_cache_and_calls_from_python_do_not(monkeypatch, tmp_path):
    enabled = []
    monkeypatch.setattr(compilation_cache, "enable", lambda: enabled.append(True))
    monkeypatch.setattr(cli, "prepare_process", lambda: None)
    monkeypatch.setattr("train.loop.train", lambda run, **_: 0)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["tiny"]) == 0 and enabled == []
    monkeypatch.setattr(sys, "argv", ["train", "tiny"])
    assert cli.main() == 0 and enabled == [True]

    from train.commands import recall

    options, body = recall.Options, lambda options: 0
    assert command_line.run(options, body, "", []) == 0 and enabled == [True]
    monkeypatch.setattr(sys, "argv", ["recall"])
    assert command_line.run(options, body, "", None) == 0 and enabled == [True, True]
