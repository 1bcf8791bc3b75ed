"""Every YAML in configs/ trains: twenty steps on real text, with falling loss."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from attention_jax.mixers import mixer_kinds
from tests import marks
from tests.params import random_params
from train import config as config_lib
from train.optimizer import make_optimizer
from train.step import make_train_step

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"), key=lambda path: (len(path.parts), path))
ROWS, LENGTH, STEPS = 2, 96, 20
VOCABULARY = 257


def _load(path: Path):
    task = path.parent.name == "mqar"  # whose rows are not text
    return config_lib.load(path, [] if task else ["data.files=unread.txt"])


@pytest.fixture(scope="module")
def batches():
    """The same few windows of this project's own source, over and over: the loss must fall."""
    text = b"".join(path.read_bytes() for path in sorted((ROOT / "attention_jax").glob("*.py")))
    ids = np.frombuffer(text, np.uint8).astype(np.int32)
    starts = np.random.default_rng(0).integers(0, ids.size - LENGTH - 1, (4, ROWS))
    rows = ids[starts[..., None] + np.arange(LENGTH + 1)]
    return [{"tokens": r[:, :-1], "targets": r[:, 1:]} for r in rows]


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT / "configs").with_suffix(""))


# The contract test has every kind of mixer: here a few stand for the folders, the rest are slow.
_FAST = {"tiny", "shakespeare_char", "gemma_shaped", "llama4_shaped", "mechanisms/mamba2"}


@pytest.mark.parametrize(
    "path",
    marks.params(CONFIGS, slow=lambda path: _name(path) not in _FAST),
    ids=_name,
)
def test_twenty_steps_lower_the_loss(path, batches):
    config = _load(path)
    if config.objective != "causal_lm":
        pytest.skip(
            f"objective {config.objective}: tests/test_seq2seq.py and tests/test_masked_lm.py train it"
        )
    # Short chunks: what is unrolled in one is most of what there is to compile. The fast ones have one layer
    # of each mixer, the slow ones the whole pattern.
    pattern = config.model.mixers
    mixers = tuple(
        dataclasses.replace(mixer, chunk_size=8) if hasattr(mixer, "chunk_size") else mixer
        for mixer in (dict.fromkeys(pattern) if _name(path) in _FAST else pattern)
    )
    layers = {"mixers": mixers, "num_layers": len(mixers)}
    if config.model.blocks is not None:
        layers = {"num_layers": len(config.model.blocks)}
    model = dataclasses.replace(
        config.model, vocab_size=VOCABULARY, **layers,
        max_positions=None if config.model.max_positions is None else 128,
    )  # fmt: skip
    optimizer = dataclasses.replace(
        config.optimizer, learning_rate=3e-3, final_learning_rate=3e-3, schedule="constant", warmup_steps=2,
        decay_steps=None, weight_decay=0.0,
    )  # fmt: skip
    step = make_train_step(model, optimizer, STEPS)
    start = random_params(model)
    params = jax.tree.map(jax.numpy.asarray, start)
    opt_state, losses = make_optimizer(optimizer, STEPS).init(params), []
    for i in range(STEPS):
        batch = batches[i % len(batches)]
        params, opt_state, metrics = step(params, opt_state, batch, np.int32(i), jax.random.key(0))
        losses.append(float(metrics["train/loss"]))
        assert bool(metrics["finite"])
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.5, losses
    # Without weight decay, what has not moved has had no gradient.
    before, after = jax.tree_util.tree_leaves_with_path(start), jax.tree.leaves(params)
    still = {path[-1].key for (path, x), y in zip(before, after, strict=True) if np.array_equal(x, y)}
    assert still <= {"random_directions"}, still


def test_every_kind_of_mixer_has_a_config():
    used = {mixer.kind for path in CONFIGS for mixer in _load(path).model.mixers}
    assert used == set(mixer_kinds())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_config_says_what_it_is(path):
    """A sentence of several words stands first, and the commands in its comment name this very file."""
    lines = path.read_text().splitlines()
    comment = list(itertools.takewhile(lambda line: line.startswith("#"), lines))
    assert len(" ".join(line.removeprefix("#") for line in comment).split()) >= 5
    commands = re.findall(r"python -m train (\S+)", "\n".join(comment))
    assert set(commands) <= {str(path.relative_to(ROOT)), _name(path)}
