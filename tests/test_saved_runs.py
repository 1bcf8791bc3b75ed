"""Run folders of format 1 go on; and what a saved configuration or checkpoint of another run is answered.

tests/fixtures/saved_runs/NAME is a folder that was interrupted after step 4 of 8, NAME.json what the same
run without interruption measured in its 8 steps and then sampled. Rows are compared to a relative 1e-5: the
tests' quick compilation gives other last bits, and so does nnx.RMSNorm as the unscaled norm of queries and
keys. With a scaled norm, and compiled as for a user, no bit has changed since: see `_LOSSES`.
"""

import dataclasses
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from attention_jax.generation import Sampling, generate
from train import config as config_lib
from train import loop
from train.config import yaml_text
from train.run import migration
from train.run.checkpoint import CheckpointError, Checkpoints
from train.run.folder import RunFolder, differences, saved_config, saved_keys
from train.run.metrics import TIMING, read_rows
from train.run.restore import load_run

ROOT = Path(__file__).parents[1]
SAVED = ROOT / "tests" / "fixtures" / "saved_runs"
# Of the run "scan" with qk_norm rms, by the code of format 1 under this jax on a processor with these flags.
_RECORDED = ("0.10.2", "25fc08b1fed3d885")
_LOSSES = [
    5.535693168640137, 5.428290843963623, 5.151301383972168, 4.945963382720947, 4.793597221374512,
    4.720895767211914, 4.610594749450684, 4.614923477172852,
]  # fmt: skip
_HELD_OUT = [4.811399221420288, 4.624708652496338]


def processor():
    """A hash of the instruction sets, on which the order of XLA's sums depends."""
    try:
        flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)[1]
    except (OSError, TypeError):
        return None
    return hashlib.sha256(" ".join(sorted(flags.split())).encode()).hexdigest()[:16]


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A copy of the folders, in the current directory: data.files and run_dir are relative."""
    shutil.copytree(SAVED, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder):
    return {
        path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "run.lock"
    }


def measured(folder):
    rows = read_rows(folder / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in TIMING} for row in rows]


def check_sample(folder, expected):
    run = load_run(folder)
    prompts = run.requests(["a sat on"]).prompts
    sampling = Sampling(temperature=1.0)
    [completion] = generate(
        run.model, run.params, prompts, max_new_tokens=24, sampling=sampling, key=jax.random.key(7)
    )
    assert completion.tokens.tolist() == expected


@pytest.mark.parametrize("name", ["scan", pytest.param("unrolled", marks=pytest.mark.slow)])
def test_a_run_of_format_1_goes_on(runs, name, monkeypatch, capsys):
    """As if never interrupted; a whole run of its configuration gives the same rows, too."""
    recorded = json.loads((SAVED / f"{name}.json").read_text())
    expected = [pytest.approx(row, rel=1e-5) for row in recorded["rows"]]
    versions = runs / name / "versions.json"
    versions.write_text(json.dumps({**json.loads(versions.read_text()), "orbax-checkpoint": "0.0.1"}))
    config, before = saved_config(runs / name), contents(runs / name)
    assert load_run(runs / name).step == 4 and contents(runs / name) == before

    for function in ("make_train_step", "make_eval_step"):
        monkeypatch.setattr(loop, function, functools.cache(getattr(loop, function)))
    assert loop.train(config) == 0
    assert "orbax-checkpoint was 0.0.1 and is" in capsys.readouterr().out
    after = contents(runs / name)
    kept = {path for path in before if path.name in ("config.yaml", "run.json") or "data" in path.parts}
    assert len(kept) == 8 and all(after[path] == before[path] for path in kept)
    assert measured(runs / name) == expected
    check_sample(runs / name, recorded["sampled"])
    assert loop.train(dataclasses.replace(config, run_dir="anew")) == 0
    assert measured(runs / "anew") == expected


@pytest.mark.slow
def test_no_bit_has_changed_since_format_1(runs):
    keys = config_lib.to_dict(saved_config(runs / "scan")) | {"run_dir": "anew"}
    keys["model"]["mixers"][0]["qk_norm"] = "rms"
    (runs / "config.yaml").write_text(config_lib.dump_yaml(config_lib.from_dict(keys)))
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    command = [sys.executable, "-m", "train", "config.yaml"]
    environment |= {"PYTHONPATH": str(ROOT)}
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    rows = measured(runs / "anew")
    losses = [row["train/loss"] for row in rows]
    held_out = [row["val/loss"] for row in rows if "val/loss" in row]
    if (jax.__version__, processor()) == _RECORDED:
        assert (losses, held_out) == (_LOSSES, _HELD_OUT)
    assert (losses, held_out) == (pytest.approx(_LOSSES, rel=1e-5), pytest.approx(_HELD_OUT, rel=1e-5))


def test_a_flipped_bit_of_format_1_is_found_before_it_is_migrated(runs):
    store = Checkpoints(runs / "scan" / "checkpoints", keep=2)
    info = store.path(4) / "info.json"
    info.write_bytes(info.read_bytes().replace(b"opt_state/0/count", b"opt_state/0/cound"))
    with pytest.raises(CheckpointError, match=r"info\.json differs from its checksum"):
        load_run(runs / "scan")


def test_a_saved_configuration_is_compared_as_it_would_be_read_today(runs):
    """Keys that it lacks have their defaults; what differs is named."""
    config = saved_config(runs / "scan")
    keys = yaml_text.parse((runs / "scan" / "config.yaml").read_text(), "")
    assert differences(keys, config, runs) == []
    del keys["data"]["task"], keys["optimizer"]["clip_norm"], keys["model"]["mixers"][1]["gate"]
    assert differences(keys, config, runs) == []
    other = dataclasses.replace(config, steps=9, log_every=3)
    assert differences(keys, other, runs) == ["steps 8 -> 9"]
    keys["optimizer"]["clip_norm"] = 2.0
    assert differences(keys, config, runs) == ["optimizer.clip_norm 2.0 -> 1.0"]
    with pytest.raises(ValueError, match=r"^run_dir .*scan was made by another config: steps 8 -> 9; choose"):
        with RunFolder(runs / "scan", other):
            pass


@pytest.mark.parametrize(
    "text, message",
    [
        ("- 1\n", r"config\.yaml is not a mapping of keys: restore it"),
        ("format: 2\nstepps: 3\n", r"config\.yaml cannot be read: unknown key stepps; did you mean steps\?$"),
        ("format: 3\n", r"config\.yaml cannot be read: format is 3, this version reads 1 to 2: use"),
        ("format: true\n", r"config\.yaml cannot be read: format is True, this"),
        ("format: '2'\n", r"config\.yaml cannot be read: format is '2', this"),
        (
            "model: {layers: foo}\n",
            r"config\.yaml cannot be read: model\.layers must be unrolled or scan, got 'foo'",
        ),
        (
            "model: {layers: scan, scan_layers: false}\n",
            r"cannot be read: layers and scan_layers are the old and the",
        ),
        (
            "model: {mixers: [{kind: cross, sinks: true, sink_logits: false}]}\n",
            r"cannot be read: sinks and sink_logits are the old and the new name of one key: remove one$",
        ),
    ],
)
def test_a_saved_configuration_that_cannot_be_read_is_named(runs, text, message):
    config = saved_config(runs / "scan")
    (runs / "scan" / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        RunFolder(runs / "scan", config).__enter__()
    with pytest.raises(ValueError, match=message):
        load_run(runs / "scan")


def test_a_checkpoint_of_another_config_is_refused(runs):
    config = saved_config(runs / "scan")
    folder, place = RunFolder(runs / "scan", config), runs / "scan" / "checkpoints" / "step_00000004"
    info = json.loads((place / "info.json").read_text())
    corpus = info["corpus_sha256"]
    folder.check_checkpoint(info, place, corpus)
    with pytest.raises(
        ValueError, match=r"^checkpoint .*4 was made by another config \(its hash differs\): res"
    ):
        folder.check_checkpoint({**info, "config_sha256": "0" * 64}, place, corpus)
    with pytest.raises(ValueError, match=r"^checkpoint .* corpus: its sha256 is 1eade6917977522f, that of"):
        folder.check_checkpoint(info, place, "0" * 64)
    now = {"config": saved_keys(config), "corpus_sha256": corpus}
    folder.check_checkpoint(now | {"config": {**now["config"], "run_dir": "elsewhere"}}, place, corpus)
    with pytest.raises(ValueError, match=r"^checkpoint .* config \(seed 1 -> 0\): restore the run's own"):
        folder.check_checkpoint(now | {"config": {**now["config"], "seed": 1}}, place, corpus)


def test_a_run_folders_config_starts_another_run(runs, monkeypatch):
    """As `python -m train RUN/config.yaml run_dir=ELSEWHERE`; that of format 1 states no format."""
    config = saved_config(runs / "scan")
    assert config_lib.load(runs / "scan" / "config.yaml") == config
    with RunFolder(runs / "new", config) as folder:
        folder.begin({})
    path = runs / "new" / "config.yaml"
    assert path.read_text().startswith("format: 2\n")
    assert config_lib.load(path, ["run_dir=scan"]) == saved_config(runs / "new") == config
    path.write_text("format: 9\n")
    with pytest.raises(config_lib.ConfigError, match=r"config\.yaml: format is 9, this"):
        config_lib.load(path)


@pytest.mark.parametrize(
    "old, new",
    [
        ({"layers": "scan"}, {"scan_layers": True}),
        ({"layers": "unrolled"}, {"scan_layers": False}),
        ({"mixers": [{"kind": "softmax", "sinks": True}]},
         {"mixers": [{"kind": "softmax", "sink_logits": True}]}),
        ({"encoder": {"mixers": [{"kind": "cross", "sinks": False}]}},
         {"encoder": {"mixers": [{"kind": "cross", "sink_logits": False}]}}),
        ({"mixers": [{"kind": "other", "sinks": 3}]}, {"mixers": [{"kind": "other", "sinks": 3}]}),
        ({"mixers": [{"impl": "mosaic_gpu_fused"}]}, {"mixers": [{"impl": "mosaic_gpu"}]}),
        ({"mixers": [{"impl": None}]}, {"mixers": [{"impl": None}]}),
    ],
)  # fmt: skip
def test_keys_that_format_2_renamed(old, new):
    raw = {"model": old}
    migration.STEPS[1].config(raw)
    assert raw == {"model": new}
    current = {"format": 2, "model": old}
    assert migration.migrate_config(current) == {"model": old} and "format" in current


def test_arrays_that_format_2_renamed():
    for old, new in [
        ("params/stacks/0/mixer/sinks", "params/stacks/0/mixer/sink_logits"),
        ("opt_state/0/nu/encoder/stacks/3/mixer/sinks", "opt_state/0/nu/encoder/stacks/3/mixer/sink_logits"),
        ("params/stacks/0/mixer/q/kernel", "params/stacks/0/mixer/q/kernel"),
        ("opt_state/0/count", "opt_state/0/count"),
    ]:
        assert migration.migrate_path(old, 1) == new
        assert migration.migrate_path(old, 2) == old


def test_an_array_under_two_names_is_damage(runs):
    """One of the two would be read, and which one would depend on their order."""
    folder = runs / "scan" / "checkpoints" / "step_00000004"
    held = json.loads((folder / "info.json").read_text())
    name = next(name for name in held["leaves"] if name.endswith("mixer/sinks"))
    held["leaves"][name.replace("sinks", "sink_logits")] = held["leaves"][name]
    replace_info(folder, held)
    with pytest.raises(CheckpointError, match="it has an array under both its old and its new name"):
        load_run(runs / "scan")
    replace_info(folder, {**held, "leaves": None})
    with pytest.raises(CheckpointError, match=r"its info\.json lists no arrays; restore"):
        load_run(runs / "scan")


def replace_info(folder, value):
    """Write info.json, and its checksum in the manifest."""
    (folder / "info.json").write_text(json.dumps(value))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["info.json"] = hashlib.sha256((folder / "info.json").read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
