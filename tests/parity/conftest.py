"""Comparisons with code nobody here wrote; `make parity` installs what they need: torch, transformers, fla.

Where these are missing, nothing of this folder is collected. With PARITY_JSON=path in the environment the
measured errors are written there.
"""

import importlib.metadata
import importlib.util
import json
import os

import pytest

_NEEDED = ("torch", "transformers", "fla")
_MISSING = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
collect_ignore_glob = ["test_*.py"] if _MISSING else []

_ROWS = []


@pytest.fixture
def measured(record_property):
    """measured(name, **what): notes what a comparison found, for PARITY_JSON."""

    def note(name: str, **what) -> None:
        record_property("parity", {"name": name} | what)

    return note


def pytest_runtest_logreport(report):
    # Properties of reports reach this process from pytest-xdist's workers too.
    if report.when == "call":
        _ROWS.extend(value for name, value in report.user_properties if name == "parity")


def pytest_sessionfinish(session):
    path = os.environ.get("PARITY_JSON")
    if not path or hasattr(session.config, "workerinput"):
        return
    packages = ("torch", "transformers", "fla-core", "jax")
    content = {
        "command": "make parity PARITY_JSON=docs/results/parity.json",
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "rows": sorted(_ROWS, key=lambda row: (row["source"], row["name"])),
    }
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
