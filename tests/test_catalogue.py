"""The catalogue lists every mechanism, the factory makes every mixer, the gallery draws every pattern."""

import subprocess
import sys
import typing

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import scripts.visualize as visualize
from attention_jax import Context, catalogue, make_mixer, masks
from attention_jax.masks.picture import gallery, shades
from attention_jax.mixers import Mixer, MixerConfig, mixer_kinds
from tests.reference import masks as truth


def test_every_mixer_and_every_mask_is_listed():
    listed = {(entry.group, entry.name) for entry in catalogue()}
    assert {("mixer", cls.kind) for cls in typing.get_args(MixerConfig)} <= listed
    composite = {masks.And, masks.Or, masks.Not, masks.Recipe, masks.Mask}
    classes = [getattr(masks, name) for name in masks.__all__]
    for cls in classes:
        if isinstance(cls, type) and issubclass(cls, masks.Mask) and cls not in composite:
            assert ("mask", cls.__name__) in listed
    for entry in catalogue():
        assert entry.title and entry.time and entry.memory and entry.cache and entry.implementations


def test_what_is_listed_of_a_mixer_is_what_its_config_takes():
    for entry in catalogue():
        if entry.group == "mixer":
            for impl in entry.implementations:
                assert mixer_kinds()[entry.name](impl=impl).impl == impl


def test_python_m_attention_jax_prints_it():
    command = [sys.executable, "-m", "attention_jax"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    for name in (*mixer_kinds(), "BigBird", "alibi", "rope.scaling: yarn"):
        assert any(line.startswith(name) for line in text.splitlines()), name


@pytest.mark.parametrize("kind", [kind for kind in mixer_kinds() if kind != "cross"])
def test_the_factory_makes_every_kind(kind):
    causal = mixer_kinds()[kind].about.causal
    mixer = nnx.eval_shape(lambda: make_mixer(kind, 64, rngs=nnx.Rngs(0), causal=causal))
    assert callable(mixer) and hasattr(mixer, "init_state")


def test_a_made_mixer_runs():
    mixer = make_mixer("gated", 32, rngs=nnx.Rngs(0), causal=True, num_kv_heads=2)
    y, state, aux = mixer.mix(jnp.ones((1, 5, 32)), ctx=Context())
    assert y.shape == (1, 5, 32) and state is None and np.isfinite(y).all()
    assert Mixer.__call__ is not None


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("softmx", 32), "no mixer 'softmx'; did you mean 'softmax'"),
        (
            ("mla", 32, {"latent_dims": 3}),
            "mixer 'mla' has no option 'latent_dims'; did you mean 'latent_dim'",
        ),
        (("gated", 30), "d_model 30 is not divisible by num_heads 4"),
    ],
)
def test_what_the_factory_refuses(arguments, message):
    kind, d_model, *options = arguments
    with pytest.raises(ValueError, match=message) as error:
        make_mixer(kind, d_model, rngs=nnx.Rngs(0), **dict(*options))
    assert "\n" not in str(error.value)


def test_shades_tell_full_partial_and_empty_blocks_apart():
    found = shades(masks.Causal(), 12, 12, 4)
    kept = truth.table(truth.causal, np.arange(12), np.arange(12))
    assert (found[8:, :8] == 3).all() and (found[:4, 4:] == 0).all()
    assert (found[4:8, 4:8] == 1 + kept[4:8, 4:8]).all()


def test_the_gallery_draws_every_pattern(tmp_path):
    drawn = {name: masks.parse(text) for name, text in visualize.GALLERY.items()}
    text = " ".join(visualize.GALLERY.values())
    for name, cls in vars(masks).items():
        if (
            isinstance(cls, type)
            and issubclass(cls, masks.Mask)
            and cls.about
            and name not in ("Predicate", "Dense")
        ):
            assert name in text, f"{name} is not in the gallery"
    figure = gallery(drawn, 16, block=4)
    assert len(figure.axes) >= len(drawn)
    out = tmp_path / "masks" / "one.png"
    assert visualize.main(["mask", "SlidingWindow(3) | Sinks(1)", "--length", "9", "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "command, message",
    [
        (["mask", "Causl()"], "no mask 'Causl'"),
        (["mask", "Causal()", "--length", "0"], "lengths from 1 to 4096, got 0"),
        (["mask", "Causal()", "--block", "0"], "block must be >= 1, got 0"),
    ],
)
def test_a_mistake_is_one_line(command, message, capsys, tmp_path):
    out = tmp_path / "no.png"
    assert visualize.main([*command, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not out.exists()
