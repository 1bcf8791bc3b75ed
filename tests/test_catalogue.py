"""The catalogue lists every mechanism, the factory makes every mixer, the gallery draws every pattern."""

import configparser
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attention_jax import catalogue, make_mixer, masks, mixers, optional
from attention_jax.__main__ import main as command_line
from attention_jax.masks.picture import gallery, shades
from attention_jax.mixers import mixer_kinds
from tests.reference import masks as truth
from train.commands import visualize


def test_every_mixer_and_every_mask_is_listed():
    listed = [(entry.group, entry.name) for entry in catalogue()]
    assert len(listed) == len(set(listed))
    configs = {cls for name, cls in vars(mixers).items() if name.endswith("Config")} - {mixers.MixerConfig}
    assert len(configs) > 20
    assert {cls.kind for cls in configs} <= {name for group, name in listed if group == "mixer"}
    composite = {masks.And, masks.Or, masks.Not, masks.Recipe, masks.Mask}
    classes = [getattr(masks, name) for name in masks.__all__]
    patterns = [cls for cls in classes if isinstance(cls, type) and issubclass(cls, masks.Mask)]
    assert {name for group, name in listed if group == "mask"} == {c.__name__ for c in patterns} - {
        cls.__name__ for cls in composite
    }


def test_an_entry_is_a_short_line_of_facts():
    """Time as O(...), a source by its arXiv number or in words, and what fits a cell of the table."""
    for entry in catalogue():
        assert re.match(r"O\(\S.*\)", entry.time), entry
        assert re.match(r"arXiv \d{4}\.\d{5}\b", entry.paper) or not re.search(r"\d\.\d", entry.paper), entry
        for text in (entry.title, entry.time, entry.memory, entry.cache):
            assert 0 < len(text) <= 64 and text == text.strip() and "\n" not in text, entry
        assert {"reference", "recurrent"} & set(entry.implementations), entry  # the readable form, always


def test_what_is_listed_of_a_mixer_is_what_its_config_takes():
    kinds = mixer_kinds()
    found = {entry.name: entry.implementations for entry in catalogue() if entry.group == "mixer"}
    for kind, cls in kinds.items():
        assert [cls(impl=impl).impl for impl in found[kind]] == list(found[kind])


@pytest.mark.parametrize("entry", [e for e in catalogue() if e.group == "mixer"], ids=lambda e: e.name)
def test_what_is_listed_of_a_cache_is_what_decoding_keeps(entry):
    """Nothing where a model cannot be causal; a matrix, of a fixed size; or more for more tokens."""
    if not entry.causal:
        assert entry.cache == "-"
        with pytest.raises(ValueError, match=f"{entry.name} .*causal"):
            make_mixer(entry.name, 64, rngs=nnx.Rngs(0), causal=True)
        return
    config = mixer_kinds()[entry.name]()
    if config.reads_memory:
        assert "memory" in entry.cache
        return

    def size(capacity):
        state = jax.eval_shape(lambda: config.init_state(64, 1, capacity))
        return sum(leaf.size for leaf in jax.tree.leaves(state))

    assert (size(4096) > size(64) > 0) == ("a matrix" not in entry.cache)


def test_python_m_attention_jax_prints_it():
    command = [sys.executable, "-m", "attention_jax"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    for name in (*mixer_kinds(), "BigBird", "alibi", "rope.scaling: yarn"):
        assert any(line.startswith(f"{name}  ") for line in text.splitlines()), name
    assert max(map(len, text.splitlines())) <= 80


def test_named_mechanisms_are_described(capsys):
    assert command_line(["MLA", "SlidingWindow", "alibi"]) == 0
    out = capsys.readouterr().out
    assert re.findall(r"^\S+", out, re.MULTILINE) == ["mla", "SlidingWindow", "alibi"]
    assert max(map(len, out.splitlines())) <= 80 and "arXiv 2405.04434" in out
    for name, words in (
        ("gqa", "kind softmax with num_kv_heads"),
        ("sofmax", "did you mean softmax?"),
        ("xyzzy", "lists all"),
    ):
        assert command_line([name]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: there is no mechanism '{name}'; ") and words in error
    command_line(["--help"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_a_plot_without_matplotlib_names_what_installs_it(monkeypatch):
    for name in ("matplotlib", "matplotlib.colors"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        ModuleNotFoundError, match=r'a plot of a mask needs .*: pip install "attention_jax\[train\]"$'
    ):
        masks.Causal().plot(8)


def test_every_optional_package_has_its_extra():
    """setup.cfg's extras and the table of what brings a package agree."""
    setup = configparser.ConfigParser()
    setup.read(pathlib.Path(__file__).parents[1] / "setup.cfg")
    for extra, packages in optional._EXTRAS.items():
        wanted = setup["options.extras_require"][extra]
        for package in packages.split():
            assert re.search(rf"^{package}\b", wanted, re.MULTILINE), (extra, package)
            assert optional.install_line(package) == f'pip install "attention_jax[{extra}]"'
    assert optional.install_line("xyzzy") == "pip install xyzzy"


@pytest.mark.parametrize("kind", [kind for kind in mixer_kinds() if kind != "cross"])
def test_the_factory_makes_every_kind(kind):
    causal = mixer_kinds()[kind].direction != "bidirectional"
    mixer = nnx.eval_shape(lambda: make_mixer(kind, 64, rngs=nnx.Rngs(0), causal=causal))
    x = jax.ShapeDtypeStruct((2, 9, 64), jnp.float32)
    y = nnx.eval_shape(lambda mixer, x: mixer(x), mixer, x)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)


def test_a_made_mixer_runs():
    mixer = make_mixer("gated", 32, rngs=nnx.Rngs(0), causal=True, num_kv_heads=2)
    config = mixers.GatedAttentionConfig(num_kv_heads=2)
    x = jax.random.normal(jax.random.key(1), (1, 5, 32))
    y, wanted = mixer(x), config.build(32, nnx.Rngs(0), causal=True)(x)
    np.testing.assert_array_equal(y, wanted)
    assert np.abs(y).max() > 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("softmx", 32), r"unknown mixer 'softmx'; choose from softmax, .*; did you mean softmax\?"),
        (("gqa", 32), "; grouped-query attention is kind softmax with num_kv_heads below num_heads$"),
        (
            ("mla", 32, {"latent_dims": 3}),
            "mixer 'mla' has no option 'latent_dims'; did you mean latent_dim",
        ),
        (("gated", 30), "d_model 30 is not divisible by num_heads 4"),
    ],
)
def test_what_the_factory_refuses(arguments, message):
    kind, d_model, *options = arguments
    with pytest.raises(ValueError, match=message) as error:
        make_mixer(kind, d_model, rngs=nnx.Rngs(0), **dict(*options))
    assert "\n" not in str(error.value)


def test_shades_distinguish_full_partial_and_empty_blocks():
    found = shades(masks.Causal(), 12, 12, 4)
    kept = truth.table(truth.causal, np.arange(12), np.arange(12))
    assert (found[8:, :8] == 3).all() and (found[:4, 4:] == 0).all()
    assert (found[4:8, 4:8] == 1 + kept[4:8, 4:8]).all()


def test_the_gallery_draws_every_pattern(tmp_path):
    drawn = {name: masks.parse(text) for name, text in visualize.GALLERY.items()}
    called = set(re.findall(r"(\w+)\(", " ".join(visualize.GALLERY.values())))
    listed = {entry.name for entry in catalogue() if entry.group == "mask"}
    assert called == listed - {"Predicate", "Dense"}
    figure = gallery(drawn, 16, block=4)
    for axes, (name, mask) in zip(figure.axes, drawn.items(), strict=False):
        [image] = axes.images
        np.testing.assert_array_equal(image.get_array(), shades(mask, 16, 16, 4))
        assert axes.get_title() == f"{name}\ndensity {mask.density(16, 16)}"
    assert not any(axes.images for axes in figure.axes[len(drawn) :])
    out = tmp_path / "masks" / "one.png"
    assert visualize.main(["mask", "SlidingWindow(3) | Sinks(1)", "--length", "9", "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "command, message",
    [
        (["mask", "Causl()"], "unknown mask 'Causl'"),
        (["mask", "Causal()", "--length", "5000"], "T and S must be 1 to 4096, got 5000"),
        (["mask", "Causal()", "--block", "0"], "--block: must be an integer >= 1, got 0"),
    ],
)
def test_a_mistake_is_one_line(command, message, capsys, tmp_path):
    out = tmp_path / "no.png"
    assert visualize.main([*command, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not out.exists()
