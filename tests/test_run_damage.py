"""Run folders that were damaged, moved, unmounted or made elsewhere: what is refused, and what goes on.

Every case copies one small run, which was interrupted after step 7 of 8 with checkpoints of steps 2, 4 and 6.
A case that is refused changes no file; one that goes on ends with the parameters of a run that nothing
happened to.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax.model import init_params
from tests.runs import interrupt, measured, rows, saved
from train import cli, loop
from train import config as config_lib
from train.commands import generate
from train.data.batches import Data
from train.data.prepare import prepare
from train.run import checkpoint, environment, files, restore
from train.run.checkpoint import CheckpointError, Checkpoints, UnreadableError
from train.run.failure import RunError
from train.run.folder import RunFolder
from train.run.restore import load_run


def counting(model, optimizer, steps):
    """A train step without compilation; what it adds to the parameters depends on the step."""

    def step(params, opt_state, batch, step, key):
        added = np.float32(1 / (1 + step))
        return jax.tree.map(lambda x: jnp.asarray(np.asarray(x) + added), params), opt_state, measured(1.0)

    return step


def drawn(model, key):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype), shapes)


@pytest.fixture(scope="module", autouse=True)
def uncompiled():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(restore, "init_params", drawn)
        patch.setattr(loop, "make_train_step", counting)
        patch.setattr(
            loop, "make_eval_step", lambda model: lambda params, batch: (np.float32(30), np.int32(16))
        )
        patch.setattr(loop, "draw_losses", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("damage")


def configured(place, name, **changes):
    raw = {
        "run_dir": str(place / name),
        "steps": 8,
        "log_every": 1,
        "model": {"d_model": 4, "num_layers": 1, "mixers": [{"kind": "softmax", "num_heads": 1}]},
        "data": {"files": f"{place}/texts/*.txt", "sequence_length": 8, "batch_size": 2},
        "optimizer": {"warmup_steps": 2},
        "evaluation": {"every": 4, "batches": 1, "sample_tokens": 0, "final_full": False},
        "checkpoint": {"every": 2, "keep": 3},
    }
    return config_lib.from_dict(raw | changes)


@pytest.fixture(scope="module")
def whole(place):
    """What the run ends with if nothing happens: its newest checkpoint's arrays and its rows."""
    (place / "texts").mkdir()
    for name in "abcd":
        (place / "texts" / f"{name}.txt").write_text(f"{name} sat on the mat and saw {name} again. " * 4)
    config = configured(place, "whole")
    loop.train(config)
    return saved(config), rows(config)


@pytest.fixture(scope="module")
def stopped(place, whole):
    config = configured(place, "stopped")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, 7)
        loop.train(config)
    return place / "stopped"


@pytest.fixture
def run(stopped, tmp_path):
    """A copy of the interrupted run."""
    return Path(shutil.copytree(stopped, tmp_path / "run", symlinks=True))


def config_of(run):
    return configured(run.parent, run.name, data=configured_data(run))


def configured_data(run):
    made = (run / "data" / "meta.json").read_text() if (run / "data" / "meta.json").exists() else None
    source = json.loads(made)["source"] if made else FILES[0]
    return {"files": source, "sequence_length": 8, "batch_size": 2}


FILES = [""]


@pytest.fixture(autouse=True)
def texts(place):
    FILES[0] = f"{place}/texts/*.txt"


def contents(folder):
    """Every file and link below, and what it holds."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_symlink():
            found[path.relative_to(folder)] = os.readlink(path)
        elif path.is_file() and path.name != "run.lock":
            found[path.relative_to(folder)] = path.read_bytes()
    return found


def step(run, number=6):
    return run / "checkpoints" / f"step_{number:08d}"


def arrays(folder):
    """The largest file, which holds arrays."""
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: (p.stat().st_size, p.name))


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)


def restate(folder, **changes):
    """Another info.json, with checksums that fit it."""
    info = json.loads((folder / "info.json").read_text()) | changes
    (folder / "info.json").write_text(json.dumps(info))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["info.json"] = hashlib.sha256((folder / "info.json").read_bytes()).hexdigest()
    manifest["sha256"] = checkpoint._sha256(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def versions(folder):
    return json.loads((folder / "info.json").read_text())["versions"]


def linked(path, target):
    """Replace `path` by a link."""
    files.delete(path)
    path.symlink_to(target)


def config_with_seed(folder):
    return json.loads((folder / "info.json").read_text())["config"] | {"seed": 3}


def each(run, do):
    for number in (2, 4, 6):
        do(step(run, number))


# What is done to the folder, and the message: a regular expression of the whole line.
REFUSED = {
    "no config.yaml": (
        lambda run: (run / "config.yaml").unlink(),
        r"run_dir .* was trained in and has lost its config\.yaml: restore it from a copy .*",
    ),
    "no config.yaml, no lock": (
        lambda run: ((run / "config.yaml").unlink(), (run / "run.lock").unlink()),
        r"run_dir .* was trained in and has lost its config\.yaml.*",
    ),
    "config.yaml is a dangling link": (
        lambda run: linked(run / "config.yaml", "/nowhere/config.yaml"),
        r"run_dir: .*config\.yaml cannot be used: it is a dangling link to /nowhere/config\.yaml",
    ),
    "renamed to a later step": (
        lambda run: step(run).rename(step(run, 7)),
        r"checkpoint .*step_00000007 was renamed: it is of step 6; give it the name of that step again",
    ),
    "renamed to an earlier step": (
        lambda run: (shutil.rmtree(step(run)), step(run, 2).rename(step(run, 5))),
        r"checkpoint .*step_00000005 was renamed: it is of step 2; give.*",
    ),
    "no checkpoints": (
        lambda run: shutil.rmtree(run / "checkpoints"),
        r".*checkpoints has no complete checkpoint, but progress\.json says that one of step 6 was saved:"
        r" mount or restore the folder, or start at step 0 with --start-over, which.*",
    ),
    "no checkpoints, of an earlier version": (
        lambda run: (shutil.rmtree(run / "checkpoints"), (run / "progress.json").unlink()),
        r".*checkpoints has no complete checkpoint, but metrics\.jsonl says that one of step 4 was saved.*",
    ),
    "an unmounted volume": (
        lambda run: (shutil.rmtree(run / "checkpoints"), (run / "checkpoints").mkdir()),
        r".*checkpoints has no complete checkpoint, but progress\.json says.*",
    ),
    "a link to an absent volume": (
        lambda run: linked(run / "checkpoints", "/nowhere/volume"),
        r".*checkpoints cannot be read: it is a dangling link to /nowhere/volume; it may be sound: .*",
    ),
    "checkpoints is a file": (
        lambda run: (shutil.rmtree(run / "checkpoints"), (run / "checkpoints").write_text("x")),
        r".*checkpoints cannot be read: Not a directory; it may be sound.*",
    ),
    "no manifest anywhere": (
        lambda run: each(run, lambda folder: (folder / "manifest.json").unlink()),
        r".*checkpoints has no complete checkpoint, but progress\.json says.*",
    ),
    "all damaged": (
        lambda run: each(run, lambda folder: flip(arrays(folder))),
        r".*checkpoints has no sound checkpoint: .*step_00000006/\S+ differs from its checksum; restore one"
        r" from a copy, or start at step 0 with --start-over, which keeps these files under another name",
    ),
    "a link instead of a file": (
        lambda run: linked(arrays(step(run)), "/dev/null"),
        r".*step_00000006/\S+ cannot be read: is neither a file nor a folder; it may be sound.*, or move"
        r" \S+step_00000006 to another place to use step 4",
    ),
    "a link instead of the manifest": (
        lambda run: linked(step(run) / "manifest.json", "/nowhere/manifest.json"),
        r".*manifest\.json cannot be read: is neither a file nor a folder; it may be sound.*",
    ),
    "a checkpoint links to an absent volume": (
        lambda run: linked(step(run), "/nowhere/step"),
        r".*step_00000006 cannot be read: it is a dangling link to /nowhere/step; it may be sound.*",
    ),
    "a checkpoint is a loop of links": (
        lambda run: linked(step(run), "step_00000006"),
        r".*step_00000006\S* cannot be read: Too many levels of symbolic links; it may be sound.*",
    ),
    "a checkpoint is a file": (
        lambda run: (shutil.rmtree(step(run)), step(run).write_text("x")),
        r".*step_00000006\S* cannot be read: Not a directory; it may be sound.*",
    ),
    "of a later format": (
        lambda run: (step(run) / "manifest.json").write_text('{"format": 9, "files": {}}'),
        r"checkpoint .*: format is 9, this version reads 1 to 2: use the version that wrote it, or move"
        r" \S+step_00000006 to another place to use step 4",
    ),
    "of another corpus": (
        lambda run: restate(step(run), corpus_sha256="f" * 64),
        r"checkpoint .*step_00000006 was trained on another corpus: its sha256 is ffffffffffffffff, .*",
    ),
    "of another config": (
        lambda run: restate(step(run), config=config_with_seed(step(run))),
        r"checkpoint .*step_00000006 was made by another config \(seed 3 -> 0\): restore.*",
    ),
    "of no config": (
        lambda run: restate(step(run), config=None),
        r"checkpoint .*step_00000006 was made by another config \(.*",
    ),
    "other random numbers": (
        lambda run: restate(step(run), versions=versions(step(run)) | {"jax_default_prng_impl": "rbg"}),
        r"checkpoint .* was made with other settings: jax_default_prng_impl was rbg and is threefry2x32;"
        r" set.* or resume with other random numbers, dtypes or precision by --accept-environment",
    ),
    "other dtypes and precision": (
        lambda run: restate(
            step(run),
            versions=versions(step(run))
            | {"jax_enable_x64": True, "jax_default_matmul_precision": None, "NVIDIA_TF32_OVERRIDE": "0"},
        ),
        r".*: jax_enable_x64 was True and is False, jax_default_matmul_precision was not set and is highest,"
        r" NVIDIA_TF32_OVERRIDE was 0 and is not set; set them.*",
    ),
    "data is a dangling link": (
        lambda run: linked(run / "data", "/nowhere/data"),
        r".*data cannot be used: it is a dangling link to /nowhere/data; it may be sound",
    ),
    "no run.json": (
        lambda run: (run / "run.json").unlink(),
        r".*run\.json is missing: restore it from a copy.*",
    ),
    "another corpus in run.json": (
        lambda run: (run / "run.json").write_text('{"corpus_sha256": "f0"}'),
        r".*: corpus_sha256 was f0, is .*",
    ),
    "no data, and another corpus in run.json": (
        lambda run: (shutil.rmtree(run / "data"), (run / "run.json").write_text('{"corpus_sha256": "f0"}')),
        r".*data is missing, and the corpus is not the one that the run began with: its sha256 was f0, is .*",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_changes_nothing(run, name):
    damage, message = REFUSED[name]
    damage(run)
    before = contents(run)
    with pytest.raises(ValueError, match=rf"\A{message}\Z") as caught:
        loop.train(config_of(run))
    assert "\n" not in str(caught.value) and not re.search(r"\b(delete|remove|rm)\b", str(caught.value))
    assert contents(run) == before


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_an_unreadable_file_is_not_called_damaged(run, monkeypatch, code):
    """Neither where a file of the checkpoint fails, nor its manifest, nor its folder."""
    before, config = contents(run), config_of(run)
    victims = [arrays(step(run)), step(run) / "info.json", step(run) / "manifest.json", step(run) / "state"]

    def failing(real, victim):
        named = real is os.scandir  # a failing read, such as EIO, names no file

        def call(path, *arguments, **options):
            if os.fspath(path) == os.fspath(victim):
                raise OSError(code, os.strerror(code), *[path] * named)
            return real(path, *arguments, **options)

        return call

    for victim in victims:
        with monkeypatch.context() as patch:
            patch.setattr("builtins.open", failing(open, victim))
            patch.setattr("io.open", failing(open, victim))
            patch.setattr("os.scandir", failing(os.scandir, victim))
            with pytest.raises(UnreadableError) as caught:
                loop.train(config)
        assert str(caught.value) == (
            f"{victim} cannot be read: {os.strerror(code)}; it may be sound: mount it or correct its"
            f" permissions, or move {step(run)} to another place to use step 4"
        )
        assert contents(run) == before


DAMAGED = {
    "a flipped bit in the arrays": (lambda folder: flip(arrays(folder)), "differs from its checksum"),
    "a flipped bit in info.json": (lambda folder: flip(folder / "info.json"), "differs from its checksum"),
    "a truncated manifest": (lambda folder: os.truncate(folder / "manifest.json", 50), "is not valid JSON"),
    "a missing file": (lambda folder: arrays(folder).unlink(), "is missing"),
    "a foreign file": (lambda folder: (folder / "state" / "x").write_text(""), "does not belong to it"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_the_newest_sound_checkpoint_is_found(run, name):
    damage, what = DAMAGED[name]
    damage(step(run))
    before = contents(run)
    loaded = load_run(run, step=4)
    store, checked = Checkpoints(run / "checkpoints", keep=3), []
    like = restore.abstract_state(loaded.config, loaded.model)
    found = store.newest(like, lambda info, path: checked.append(path))
    assert found.step == 4 and found.info["step"] == 4 and list(found.damaged) == [6]
    assert found.damaged[6].endswith(what) and str(step(run)) in found.damaged[6]
    assert checked == [step(run, 4)] and contents(run) == before


def test_training_goes_on_from_the_checkpoint_before_damaged_ones(run, whole, capsys):
    """They are kept, one of them beside an earlier one of its step; the result is as if nothing happened."""
    flip(arrays(step(run)))
    (step(run, 4) / "info.json").unlink()
    (run / "checkpoints" / "aside.step_00000006").mkdir()
    held = [contents(step(run, number)) for number in (4, 6)]
    config = config_of(run)
    assert loop.train(config) == 0
    out = capsys.readouterr().out
    assert "resuming after step 2\n" in out
    for line in (
        r"note: damaged checkpoint of step 6 kept as checkpoints/aside\.step_00000006\.1: \S+ .*",
        r"note: damaged checkpoint of step 4 kept as checkpoints/aside\.step_00000004: \S+ is missing",
        r"note: the checkpoint of step 6 was saved last; the newest sound one here is 2",
    ):
        assert re.search(rf"^{line}$", out, re.M)
    assert [
        contents(run / "checkpoints" / f"aside.step_{name}") for name in ("00000004", "00000006.1")
    ] == held
    assert (saved(config), rows(config)) == whole
    assert Checkpoints(run / "checkpoints", keep=3).steps() == [4, 6, 8]


def test_starting_over_keeps_what_was_trained(run, whole, capsys, monkeypatch):
    """Without its checkpoints, and then, finished, with them."""
    config, metrics = config_of(run), (run / "metrics.jsonl").read_bytes()
    shutil.rmtree(run / "checkpoints")
    assert loop.train(config, start_over=True) == 0
    assert re.search(
        r"note: starting over: metrics\.jsonl, .* moved to \S+before\.1\n", capsys.readouterr().out
    )
    assert (run / "before.1" / "metrics.jsonl").read_bytes() == metrics
    assert (run / "before.1" / "versions.json").exists() and not (run / "before.1" / "checkpoints").exists()
    assert (saved(config), rows(config)) == whole
    held = contents(run / "checkpoints")
    interrupt(monkeypatch, 0)
    with pytest.raises(KeyboardInterrupt):
        loop.train(config, start_over=True)
    assert contents(run / "before.2" / "checkpoints") == held
    assert not (run / "checkpoints").exists() and not (run / "result.json").exists()


def test_options_of_the_command_line(monkeypatch):
    asked = []
    monkeypatch.setattr(loop, "train", lambda config, **options: asked.append(options) or 0)
    for flags in ([], ["--start-over"], ["--accept-environment", "--start-over"]):
        assert cli.main(["tiny", *flags]) == 0
    assert [sum(options.values()) for options in asked] == [0, 1, 2] and asked[1]["start_over"]


def test_other_settings_are_accepted_if_asked(run, whole, capsys):
    """And said; versions and flags, which change the last bits, are said without being asked."""
    known = versions(step(run))
    restate(step(run), versions=known | {"jax_enable_x64": True})
    other = {"jax_enable_x64": True, "XLA_FLAGS": "--xla_cpu_enable_fast_math=true", "devices": 4}
    (run / "versions.json").write_text(json.dumps(known | other))
    config = config_of(run)
    assert loop.train(config, accept_environment=True) == 0
    out = capsys.readouterr().out
    assert "note: jax_enable_x64 was True and is False: results may differ\n" in out
    assert re.search(
        r"note: XLA_FLAGS was --xla_cpu_enable_fast_math=true and is .*: results may differ\n", out
    )
    assert "note: devices was 4 and is 1: results may differ in the last bits\n" in out
    assert json.loads((run / "versions.json").read_text()) == known == versions(step(run, 8))
    assert (saved(config), rows(config)) == whole


def test_what_a_record_holds(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=dumps --xla_b=1 --xla_a=2 --xla_b=3")
    now = environment.record()
    assert now["XLA_FLAGS"] == "--xla_a=2 --xla_b=3"
    assert now["platform"] == "cpu" and now["devices"] == 1 and now["processor"]
    assert json.loads(json.dumps(now)) == now
    for name, value in [
        ("jax_default_prng_impl", "rbg"),
        ("jax_threefry_partitionable", not jax.config.jax_threefry_partitionable),
        ("jax_default_matmul_precision", "bfloat16"),
        ("jax_numpy_dtype_promotion", "strict"),
    ]:
        before = getattr(jax.config, name)
        jax.config.update(name, value)
        try:
            changes = environment.differences(now, environment.record())
        finally:
            jax.config.update(name, before)
        assert list(changes) == [name] and name in environment.SETTINGS
    assert environment.differences({"jax": now["jax"]}, now) == {}  # an earlier version's record
    assert environment.differences(now | {"gone": 1, "jax": "0.1"}, now) == {
        "jax": f"was 0.1 and is {now['jax']}"
    }


@pytest.mark.parametrize("deed", ["removed", "renamed", "replaced", "without its lock", "a file"])
def test_a_folder_that_is_gone_is_noticed(run, whole, deed, monkeypatch, tmp_path):
    """At the next checkpoint; it is not made again, and a new one in its place stays as it is."""
    (run / "checkpoints" / "step_00000006").rename(tmp_path / "later")
    train_batch = Data.train_batch

    def asked(self, index):
        if index == 5:
            run.rename(tmp_path / "elsewhere")
            if deed == "removed":
                shutil.rmtree(tmp_path / "elsewhere")
            elif deed == "replaced":
                shutil.copytree(tmp_path / "elsewhere", run)
            elif deed == "without its lock":
                (tmp_path / "elsewhere").rename(run)
                (run / "run.lock").unlink()
            elif deed == "a file":
                run.write_text("x")
        return train_batch(self, index)

    monkeypatch.setattr(Data, "train_batch", asked)
    config = config_of(run)
    with pytest.raises(RunError, match=r"\Arun_dir \S+ was removed or replaced during training: .*\Z"):
        loop.train(config)
    assert run.exists() == (deed not in ("removed", "renamed"))
    if run.is_dir():
        assert not (run / "checkpoints" / "step_00000006").exists() and (run / "config.yaml").exists()


def test_still_there(run):
    with RunFolder(run, config_of(run)) as folder:
        folder.still_there()
        run.rename(run.with_name("other"))
        with pytest.raises(RunError, match="was removed or replaced during training"):
            folder.still_there()
        run.with_name("other").rename(run)
        folder.still_there()
        (run / "config.yaml").unlink()  # leaving removes nothing of a folder that was set up
        before = contents(run)
    assert contents(run) == before


def test_an_unfinished_set_up_loses_only_what_is_its_own(tmp_path, stopped):
    config = configured(tmp_path, "run", data=configured_data(stopped))
    folder = tmp_path / "run"
    (folder / "data").mkdir(parents=True)
    (folder / "run.lock").write_text("1\n")
    for name in ("notes.txt", "data/thesis.txt", ".notes.tmp"):
        (folder / name).write_text("years of work")
        with pytest.raises(ValueError, match="is neither empty nor a run folder"):
            loop.train(config)
        assert (folder / name).read_text() == "years of work"
        (folder / name).unlink()
    (folder / "data" / "train.npy").write_text("of a killed set-up")
    assert loop.train(config) == 0


LEFTOVERS = ("tmp.step_00000008", "tmp.deleted.step_00000002")
KEPT = ("tmp.mine", "step_00000009.bak", "aside.step_00000001")


def test_only_our_own_leftovers_are_deleted(run, whole):
    for name in LEFTOVERS + KEPT:
        (run / "checkpoints" / name).mkdir()
        (run / "checkpoints" / name / "big").write_text("x")
    (run / "tmp.data").mkdir()
    assert loop.train(config_of(run)) == 0
    left = {path.name for path in (run / "checkpoints").iterdir()}
    assert not left & set(LEFTOVERS) and left >= set(KEPT) and not (run / "tmp.data").exists()


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_in_orbax(path, *_):
    path.mkdir()
    (path / "half").write_bytes(bytes(3 * 10**6))
    raise ValueError("RESOURCE_EXHAUSTED: Failed writing: \"x\": No space left [os_error_code='28']")


@pytest.mark.parametrize(
    "point, failure, size",
    [("train.run.checkpoint.ocp.save", full_in_orbax, "3.0 MB"), ("os.fsync", full, "2.0 MB")],
)
def test_a_full_disk_while_saving(run, whole, monkeypatch, point, failure, size):
    """Named with the space; nothing of the attempt holds space; the run goes on when there is some."""
    config, before = config_of(run), contents(run / "checkpoints")
    with RunFolder(run, config) as folder:
        store = Checkpoints(folder.path / "checkpoints", keep=3)
        monkeypatch.setattr(point, failure)
        with pytest.raises(files.DiskFullError) as caught:
            store.save(8, {"x": jnp.ones(500_000)}, {})
        monkeypatch.undo()
    assert re.fullmatch(
        rf"{step(run, 8)}: No space left on device; [\d,.]+ MB are free, more than {size} are"
        r" needed: free some space and run the same command again",
        str(caught.value),
    )
    assert caught.value.errno == errno.ENOSPC and contents(run / "checkpoints") == before


def test_a_full_disk_at_other_writes(run, place, monkeypatch, tmp_path):
    config = configured(tmp_path, "new", data=configured_data(run))
    with monkeypatch.context() as patch:
        patch.setattr("numpy.lib.format.write_array", full)
        patch.setattr("numpy.save", full)
        with pytest.raises(files.DiskFullError, match=r"\A\S+new/data: No space left on device; "):
            loop.train(config)
    assert not (tmp_path / "new").exists()
    held = (run / "progress.json").read_bytes()
    with RunFolder(run, config_of(run)) as folder, monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(files.DiskFullError, match=r"\A\S+progress\.json: No space left"):
            folder.reached(8)
    assert (run / "progress.json").read_bytes() == held and not list(run.glob(".*"))


def test_links_that_lead_nowhere_are_called_so(tmp_path, stopped):
    link = tmp_path / "link"
    link.symlink_to("/nowhere")
    config = configured(tmp_path, "link", data=configured_data(stopped))
    with pytest.raises(
        ValueError, match=r"\Arun_dir: \S+link cannot be used: it is a dangling link to /nowhere\Z"
    ):
        loop.train(config)
    with pytest.raises(ValueError, match=r"\A\S+link/?\S* cannot be read: .*dangling link to /nowhere\Z"):
        load_run(link)
    for pattern in (link, f"{link}/*", f"{link}/**", f"{link}/"):
        config = configured(tmp_path, "new", data=configured_data(stopped) | {"files": str(pattern)})
        with pytest.raises(ValueError, match=r"is a link to /nowhere\S*, which does not exist") as caught:
            loop.train(config)
        assert "folder" not in str(caught.value)


def other_tokenizer(run):
    flip(run / "data" / "tokenizer.json")


LOADING = {
    "of another config": (
        lambda run: restate(step(run), config=config_with_seed(step(run))),
        "latest",
        r"checkpoint \S+ was made by another config \(seed 3 -> 0\).*",
    ),
    "of another corpus": (
        lambda run: restate(step(run), corpus_sha256="f" * 64),
        6,
        r"checkpoint \S+ was trained on another corpus.*",
    ),
    "data of another corpus": (
        lambda run: (run / "run.json").write_text('{"corpus_sha256": "f0"}'),
        "latest",
        r"\S+data is of another corpus than the run: restore.*",
    ),
    "renamed": (
        lambda run: step(run).rename(step(run, 7)),
        "latest",
        r"\S+ \S+ was renamed: it is of step 6.*",
    ),
    "a damaged tokenizer": (other_tokenizer, "latest", r"\S+tokenizer\.json is damaged.*"),
    "latest is damaged": (
        lambda run: flip(arrays(step(run))),
        "latest",
        r"damaged checkpoint: .*, or use step 4",
    ),
    "best is told by a damaged one": (
        lambda run: flip(arrays(step(run))),
        "best",
        r"the newest checkpoint names the best one, but: damaged checkpoint: .* checksum; restore .* step 4",
    ),
    "best is told by a changed info.json": (
        lambda run: flip(step(run) / "info.json"),
        "best",
        r"the newest checkpoint names the best one, but: damaged checkpoint: .*info\.json differs .*",
    ),
    "best is gone": (
        lambda run: shutil.rmtree(step(run, 4)),
        "best",
        r"the best checkpoint, of step 4, is not in \S+: there are 2, 6",
    ),
    "no config.yaml": (
        lambda run: (run / "config.yaml").unlink(),
        "latest",
        r"\S+ is not a run folder: it has no config\.yaml",
    ),
    "no such step": (lambda run: None, 5, r"no checkpoint of step 5; there are 2, 4, 6"),
}


@pytest.mark.parametrize("name", LOADING)
def test_what_loading_refuses(run, name):
    damage, which, message = LOADING[name]
    damage(run)
    before = contents(run)
    with pytest.raises(ValueError, match=rf"\A{message}\Z"):
        load_run(run, step=which)
    assert contents(run) == before


def test_loading_says_which_step_it_chose(run, monkeypatch, capsys):
    for which, number, chosen in [
        ("latest", 6, "the latest"),
        ("best", 4, "the best, val/loss 1.8750"),
        ("2", 2, "as asked"),
    ]:
        monkeypatch.setattr(generate, "_print_text", lambda *_: None)
        assert generate.main([str(run), "--step", which]) == 0
        assert capsys.readouterr().err == f"{run}: checkpoint of step {number}, {chosen}\n"
    restate(step(run), best=None)
    assert load_run(run, step="best").chosen == "the latest; no val/loss was saved with it to tell the best"


def test_a_lost_snapshot_of_the_same_corpus_is_made_again(run):
    before = contents(run)
    config = config_of(run).data
    shutil.rmtree(run / "data")
    prepare(config, run)
    assert contents(run) == before


def test_a_configuration_is_restored_from_a_checkpoint(run):
    """As docs/runs.md says."""
    (run / "config.yaml").write_text(json.dumps(json.loads((step(run) / "info.json").read_text())["config"]))
    assert load_run(run).step == 6
    with RunFolder(run, config_of(run)) as folder:
        assert folder.begun


def test_a_checkpoint_that_is_deleted_while_it_is_read(run, monkeypatch):
    store = Checkpoints(run / "checkpoints", keep=3)

    def gone(path, **_):
        shutil.rmtree(path)
        raise FileNotFoundError(errno.ENOENT, "No such file", str(path / "info.json"))

    monkeypatch.setattr(checkpoint, "digests", gone)
    with pytest.raises(CheckpointError, match=r"was deleted while it was read: run the command again\Z"):
        store.info(6)
