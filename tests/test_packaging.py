"""What an installed package holds: all modules, the configurations, the commands; and nothing else."""

from __future__ import annotations

import configparser
import importlib
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import attention_jax
from attention_jax.__main__ import COMMANDS, main
from train import config
from train.config import shipped

ROOT = Path(__file__).parent.parent


@pytest.fixture
def setup_cfg():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def test_every_folder_with_modules_is_a_package():
    folders = {path.parent for name in ("attention_jax", "train") for path in (ROOT / name).rglob("*.py")}
    assert {folder for folder in folders if not (folder / "__init__.py").exists()} == set()


def test_every_configuration_is_package_data(setup_cfg):
    patterns = setup_cfg["options.package_data"]["train"].split()
    found = {path for pattern in patterns for path in (ROOT / "train").glob(pattern)}
    assert {path.relative_to(shipped.FOLDER) for path in found} == {
        path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.yaml")
    }


def test_commands_exist_and_are_listed(setup_cfg, capsys):
    lines = setup_cfg["options.entry_points"]["console_scripts"].strip().splitlines()
    scripts = dict(re.split(r"\s*=\s*", line) for line in lines)
    assert set(scripts) == {"attention-jax", *(f"attention-jax-{name}" for name in COMMANDS)}
    for target in scripts.values():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function))
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in scripts) and max(map(len, out.splitlines())) <= 100
    assert main(["--masks"]) == 2
    assert capsys.readouterr().err == "error: unknown option --masks; there is --help\n"


def test_the_version_is_written_once(setup_cfg):
    assert setup_cfg["metadata"]["version"] == "attr: attention_jax.__version__"
    assert re.fullmatch(r"\d+\.\d+\.\d+", attention_jax.__version__)
    assert "## Unreleased" in (ROOT / "CHANGELOG.md").read_text()


def test_configurations_go_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert {"tiny", "mechanisms/gla", "mqar/linear"} <= set(shipped.names())
    assert config.load("tiny") == config.load(ROOT / "configs" / "tiny.yaml")
    assert config.load("mechanisms/gla").run_dir == "runs/gla"
    Path("tiny").write_text("steps: 300")  # a file that exists is preferred
    assert config.load("tiny").steps == 300
    for name, near in (
        ("configs/tiny.yaml", "tiny"),
        ("tinny", "tiny"),
        ("mechanism/gla.yml", "mechanisms/gla"),
    ):
        message = f"No such file or directory; the configuration {near} comes with the package$"
        with pytest.raises(config.ConfigError, match=message):
            config.load(name)
    with pytest.raises(
        config.ConfigError,
        match="; the package brings experts, finetune, gemma_shaped, .*, mechanisms/NAME and mqar",
    ):
        config.load("xyzzy")
    with pytest.raises(config.ConfigError, match="cannot read"):
        config.load("../configs/tiny")


@pytest.mark.slow
def test_a_wheel(tmp_path):
    """Built by pip in an environment of its own, hence the package index is needed."""
    tree = tmp_path / "tree"
    for name in ("attention_jax", "train", "configs", "scripts", "tests", "docs"):
        skipped = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=skipped)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", str(tmp_path), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if "No matching distribution found for setuptools" in done.stderr:
        pytest.skip("pip finds no setuptools to build with: there is no package index")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = [archive.read(x).decode() for x in archive.namelist() if x.endswith("/METADATA")]
        assert any(name.endswith("/licenses/LICENSE") for name in archive.namelist())
    modules = {path for name in ("attention_jax", "train") for path in (ROOT / name).rglob("*.py")}
    expected = {path.relative_to(ROOT).as_posix() for path in modules}
    expected |= {f"train/configs/{path.relative_to(ROOT / 'configs').as_posix()}"
                 for path in (ROOT / "configs").rglob("*.yaml")}  # fmt: skip
    assert names == expected
    assert f"\nVersion: {attention_jax.__version__}\n" in metadata and "\nProvides-Extra: train\n" in metadata
