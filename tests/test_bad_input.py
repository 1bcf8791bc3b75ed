"""Values that no run can use, in each key of a configuration, in mask expressions, and on the command line."""

from __future__ import annotations

import dataclasses
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attention_jax import masks
from attention_jax.biases import T5
from attention_jax.choices import LARGEST
from attention_jax.masks import Mask
from attention_jax.mixers import AttentionConfig, Context, CrossAttention, GLAConfig, mixer_kinds
from attention_jax.model import ModelConfig
from attention_jax.positions import RoPE, Temperature
from train import config, memory
from train.config import ConfigError, yaml_text
from train.config.keys import hints, item_type, kind_of, members, sections
from train.config.schema import RunConfig
from train.config.sections import OptimizerConfig
from train.run import folder

ROOT = Path(__file__).parents[1]

# What a section needs beside its kind to be read, and what the run around it needs.
REQUIRED = {
    "linear": {"factor": 2.0},
    "dynamic_ntk": {"original_length": 64, "length": 128},
    "yarn": {"factor": 2.0, "original_length": 64},
    "longrope": {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16, "original_length": 64, "length": 128},
}
SKIPPED = {"kind"}  # the choices among sections are tested with the mistakes of tests/test_config.py

# Too large or too small for the 32 bits in which everything is computed, whatever the key.
HUGE = {int: [2**32, 2**63, 10**30, 1e23, -(2**40)], float: [1e39, 1e308, 1e-40, -1e-300, math.nan, math.inf]}
# Of any kind: read within the bounds, or refused.
ODD = [
    0,
    -1,
    1.5,
    1e-300,
    1e-30,
    2**31 - 1,
    0.9999999999999999,
    "x",
    "",
    True,
    None,
    [],
    {},
    [[[[1]]]],
    "\0",
    "~x/y",
]


def leaves(
    cls: type, before: dict[str, Any], place: tuple[Any, ...]
) -> Iterator[tuple[Any, tuple, str, Any]]:
    """(configuration, place of the section in it, name, annotation) of every key that is no section.

    `before` holds the section itself at `place`. A class that was met before is not visited again.
    """
    for name, annotation in hints(cls).items():
        yield before, place, name, annotation
        for section, below in [(s, (name,)) for s in sections(annotation)] + [
            (s, (name, 0)) for s in sections(item_type(annotation))
        ]:
            if (section, place[:1]) in SEEN or (section in SEEN and section.__module__.endswith("positions")):
                continue
            SEEN.add((section, place[:1]))
            SEEN.add(section)
            kind = kind_of(section)
            inner = {**({} if kind is None else {"kind": kind}), **REQUIRED.get(str(kind), {})}
            if issubclass(section, tuple(mixer_kinds().values())):
                inner = {"kind": kind}
            yield from leaves(section, _with(before, (*place, *below), inner), (*place, *below))


def _with(tree: Any, place: tuple[Any, ...], value: Any) -> Any:
    """A copy with `value` at `place`."""
    if not place:
        return value
    if isinstance(place[0], int):
        return [_with(tree[0] if tree else {}, place[1:], value)]
    tree = dict(tree or {})
    return tree | {place[0]: _with(tree.get(place[0]), place[1:], value)}


SEEN: set[Any] = set()
PLACES = list(leaves(RunConfig, {}, ()))


def _leaf_type(annotation: Any) -> type | None:
    """int or float, for a key that holds one number."""
    numbers = [member for member in members(annotation) if member in (int, float)]
    return numbers[0] if len(numbers) == 1 else None


def test_every_class_of_numbers_is_among_the_places():
    found = {(place[-1] if place else "", name) for _, place, name, _ in PLACES}
    assert {
        ("optimizer", "clip_norm"),
        ("rope", "theta"),
        ("scaling", "beta_fast"),
        ("task", "alpha"),
    } <= found
    kinds = {
        before["model"]["mixers"][0]["kind"] for before, place, *_ in PLACES if place[1:2] == ("mixers",)
    }
    assert kinds == set(mixer_kinds()) and len(PLACES) > 250


def test_every_key_is_read_within_bounds_or_refused_in_one_line():
    """Numbers beyond 32 bits are refused for every key; other odd values are refused, or read back equal."""
    accepted: list[str] = []
    for before, place, name, annotation in PLACES:
        if name in SKIPPED or sections(annotation) or sections(item_type(annotation)):
            continue
        kind = _leaf_type(annotation)
        huge = HUGE.get(kind, [])
        for value in [*huge, *ODD]:
            raw = _with(before, (*place, name), value)
            where = ".".join(map(str, (*place, name)))
            try:
                run = config.from_dict(raw)
            except ConfigError as error:
                message = str(error)
                assert len(message.splitlines()) == 1 and len(message) < 700, (where, message)
                assert re.match(r"[a-z]\w*", message), (where, message)
            else:
                if any(value is one for one in huge):
                    accepted.append(f"{where}: {value}")
                assert config.from_dict(config.to_dict(run)) == run, where
                _check_numbers(run, where)
    assert not accepted


def _check_numbers(value: Any, where: str) -> None:
    """Every number of a configuration is one that 32 bits hold."""
    if isinstance(value, Mask | str | bool) or value is None:
        return
    if isinstance(value, int):
        assert abs(value) < 2**32, where
    elif isinstance(value, float):
        assert value == 0 or 2.0**-126 <= abs(value) <= float(np.finfo(np.float32).max), where
    elif isinstance(value, tuple):
        for item in value:
            _check_numbers(item, where)
    else:
        for field in dataclasses.fields(value):
            _check_numbers(getattr(value, field.name), where)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: AttentionConfig(softcap=1e308), "softcap must be at most 3.4e+38, the largest of float32, got"),
        (lambda: AttentionConfig(softcap=1e-6), "softcap must be from 0.1 to 1e+06, got 1e-06: less caps every"),
        (lambda: AttentionConfig(dropout=0.999999999), "dropout must be in [0, 0.99], got 0.999999999"),
        (lambda: AttentionConfig(num_heads=2**17), "num_heads must be <= 65536, got 131072"),
        (lambda: AttentionConfig(num_heads=10**500), "got a number of more than 400 digits"),
        (lambda: GLAConfig(decay_temperature=1e30), "decay_temperature must be from 0.01 to 10000, got 1e+30"),
        (lambda: RoPE(theta=1e-300), "theta must be 0 or at least 1.18e-38, the smallest normal number of"),
        (lambda: RoPE(theta="x"), "theta must be a number, got 'x'"),
        (lambda: Temperature(floor=2**31), "floor must be an integer of 32 bits, at most 2147483647"),
        (lambda: T5(max_distance=2**30), "max_distance must be from 3 to 1.04858e+06, got 1073741824"),
        (lambda: ModelConfig(d_model=2147483648), "d_model must be an integer of 32 bits, at most 2147483647"),
        (lambda: ModelConfig(num_layers=10**6), "num_layers must be <= 10000, got 1000000"),
        (lambda: ModelConfig(init_std=0.0), "init_std must be from 1e-06 to 10, got 0.0"),
        (lambda: ModelConfig(remat=3), "remat: unknown policy 3; choose from nothing_saveable"),
        (lambda: OptimizerConfig(clip_norm=1e-40), "clip_norm must be 0 or at least 1.18e-38"),
        (lambda: OptimizerConfig(clip_norm=1e-9), "clip_norm must be from 1e-06 to 3e+38, got 1e-09: smaller"),
        (lambda: OptimizerConfig(epsilon=2.0), "epsilon must be from 1e-20 to 1, got 2.0: updates vanish"),
        (lambda: OptimizerConfig(beta2=0.9999999999999999), "beta2 must be from 0 to 0.99999, got 0.99999"),
        (lambda: OptimizerConfig(weight_decay=2e3), "weight_decay 2000.0 times learning_rate 0.001 exceeds 1"),
        (lambda: masks.Sinks(2**30), "Sinks count must be <= 1048576, got 1073741824"),
        (lambda: masks.BigBird(2**20, global_blocks=2), "BigBird global_blocks block must be <= 1048576"),
        (lambda: masks.Global((2**30,)), "Global positions must be <= 16777216, got 1073741824"),
    ],
)  # fmt: skip
def test_the_library_refuses_what_yaml_would(make, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        make()
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "memory_shape, positions_shape, message",
    [
        (
            (2, 5, 24),
            None,
            "ctx.memory_BSD must be [2, S, 16], the rows of x and the width of the model, got [2, 5",
        ),
        ((3, 5, 16), None, "ctx.memory_BSD must be [2, S, 16]"),
        ((5, 16), None, "got [5, 16]: project an encoder of another width first"),
        (
            (2, 5, 16),
            (2, 4),
            "ctx.memory_positions_BS must be [2 or 1, 5], a position per slot of the memory, got",
        ),
    ],
)
def test_a_memory_of_another_width_is_refused(memory_shape, positions_shape, message):
    mixer = nnx.eval_shape(lambda: CrossAttention(16, num_heads=2, rngs=nnx.Rngs(0)))
    positions = None if positions_shape is None else jnp.zeros(positions_shape, jnp.int32)
    ctx = Context(memory_BSD=jnp.zeros(memory_shape), memory_positions_BS=positions)
    with pytest.raises(ValueError, match=re.escape(message)):
        mixer.mix(jnp.zeros((2, 3, 16)), ctx=ctx)


DEEP_MASKS = {
    "tildes": "~" * 5000 + "Causal()",
    "some tildes": "~" * 60 + "Causal()",
    "parentheses": "(" * 5000 + "Causal()" + ")" * 5000,
    "unions": " | ".join(f"SlidingWindow({n})" for n in range(1, 3000)),
    "signs": "SlidingWindow(" + "-" * 5000 + "1)",
    "digits": f"SlidingWindow({'9' * 5000})",
    "characters": "Causal() & " * 20_000 + "Causal()",
    "NUL": "Causal(\0)",
}


@pytest.mark.parametrize("name", DEEP_MASKS)
def test_a_deep_or_long_mask_expression_is_refused_in_one_short_line(name):
    with pytest.raises(ValueError, match="^mask '") as error:
        masks.parse(DEEP_MASKS[name])
    assert len(str(error.value)) < 250 and "\n" not in str(error.value)


def test_an_expression_of_many_masks_is_read():
    mask = masks.parse(" | ".join(f"Sinks({n})" for n in range(1, 41)))
    assert masks.parse(str(mask)) == mask


# Each stands for few characters with many values, or many characters with few.
_MISTAKES = ", ".join(f"k{n}: 1" for n in range(20))
YAML = {
    "aliases with mistakes": f"model: {{mixers: [&a {{kind: softmax, {_MISTAKES}}}{', *a' * 220}]}}",
    "comment": "#" + "x" * 300_000,
    "text": f"run_dir: '{'x' * 300_000}'",
    "keys": "\n".join(f"k{n}: {n}" for n in range(20_000)),
    "no ASCII at the limit": "#" + "é" * 200_000,
}


@pytest.mark.parametrize("name", YAML)
def test_a_large_configuration_is_refused_soon(tmp_path, monkeypatch, name):
    """The work is counted: pydantic's mistakes that are looked at, and characters that are parsed."""
    looked, parsed = [], []
    locate, check = config.read._locate, yaml_text._check
    monkeypatch.setattr(config.read, "_locate", lambda *given: (looked.append(1), locate(*given))[1])
    monkeypatch.setattr(yaml_text, "_check", lambda text: (parsed.append(len(text)), check(text))[1])
    path = tmp_path / "large.yaml"
    path.write_text(YAML[name], encoding="utf-8")
    with pytest.raises(ConfigError, match="unknown key model.mixers.0.k0|at most 250000 bytes") as error:
        config.load(path)
    assert len(str(error.value)) < 700
    assert len(looked) <= 1000 and sum(parsed) <= yaml_text.MOST_CHARACTERS


def test_a_configuration_without_an_end_is_refused():
    with pytest.raises(ConfigError, match="/dev/zero: a configuration has at most 250000 bytes"):
        config.load("/dev/zero")


def test_a_deep_override_and_a_deep_dict_are_refused(tmp_path):
    (tmp_path / "a.yaml").touch()
    with pytest.raises(ConfigError, match=r"^override model.x.x.*\.\.\. is nested more than 50 levels deep$"):
        config.load(tmp_path / "a.yaml", ["model" + ".x" * 5000 + "=1"])
    deep: dict[str, Any] = {}
    for _ in range(20_000):
        deep = {"model": deep}
    with pytest.raises(ConfigError, match="is not of nested dicts, lists and scalars"):
        config.from_dict(deep)
    with pytest.raises(ConfigError, match="is not of nested dicts, lists and scalars"):
        config.from_dict({"steps": np.int64})


@pytest.mark.parametrize(
    "written, value", [("1e3", 1000), ("1.0", 1), ("25e1", 250), ("2147483647", LARGEST)]
)
def test_a_whole_number_is_an_integer(tmp_path, written, value):
    (tmp_path / "a.yaml").write_text(f"steps: {written}\n")
    run = config.load(
        tmp_path / "a.yaml", [f"data.sequence_length={written}", "model.mixers.0.num_heads=4.0"]
    )
    assert (run.steps, run.data.sequence_length, run.model.mixers[0].num_heads) == (value, value, 4)
    assert type(run.steps) is type(run.data.sequence_length) is int


def test_home_folders_are_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.yaml").write_text("run_dir: ~/runs/x\n")
    run = config.load("~/a.yaml")
    assert run.run_dir == f"{tmp_path}/runs/x" and RunConfig(run_dir="~").run_dir == str(tmp_path)
    with pytest.raises(
        ConfigError, match="run_dir ~nobody-of-this-name/x: ~nobody-of-this-name is no home folder"
    ):
        config.load("~/a.yaml", ["run_dir=~nobody-of-this-name/x"])


@pytest.mark.parametrize(
    "options, warmup, final",
    [
        ("", 100, 1e-4), ("steps: 30", 3, 1e-4), ("steps: 5", 0, 1e-4), ("steps: 1", 0, 1e-4),
        ("steps: 101", 100, 1e-4), ("steps: 100", 10, 1e-4),
        ("steps: 30\noptimizer: {schedule: wsd}", 3, 1e-4),
        ("steps: 125\noptimizer: {schedule: wsd}", 100, 1e-4),
        ("steps: 30\noptimizer: {schedule: wsd, decay_steps: 29}", 1, 1e-4),
        ("steps: 30\noptimizer: {schedule: constant}", 3, 1e-4),
        ("steps: 500\noptimizer: {decay_steps: 80}", 50, 1e-4),
        ("optimizer: {learning_rate: 1e-5}", 100, 1e-6), ("optimizer: {learning_rate: 1e-4}", 100, 1e-4),
    ],
)  # fmt: skip
def test_defaults_follow_the_keys_that_bound_them(tmp_path, options, warmup, final):
    (tmp_path / "a.yaml").write_text(options)
    optimizer = config.load(tmp_path / "a.yaml").optimizer
    assert (optimizer.warmup_steps, optimizer.final_learning_rate) == (warmup, pytest.approx(final))


def test_samples_follow_the_length_of_the_model_and_the_task(tmp_path):
    (tmp_path / "a.yaml").write_text("data: {sequence_length: 64}")
    tokens = [
        config.load(tmp_path / "a.yaml", overrides).evaluation.sample_tokens
        for overrides in ([], ["model.max_positions=64"], ["data.task={kind: mqar}"])
    ]
    assert tokens == [200, 64 - 1 - len("def "), 0]


def test_a_run_of_the_earlier_defaults_goes_on():
    """What is now null stood as a number in the configuration that was saved."""
    saved = {
        "format": 2,
        "optimizer": {"warmup_steps": 100, "final_learning_rate": 1e-4},
        "evaluation": {"sample_tokens": 200},
        "data": {"validation_split": "files"},
    }
    assert folder.differences(saved, RunConfig(), Path("here")) == []
    saved["optimizer"]["warmup_steps"] = 10
    assert folder.differences(saved, RunConfig(), Path("here")) == ["optimizer.warmup_steps 10 -> 100"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"model": {"d_model": 2**20}}, r"^model: its [\d,]{15,} parameters take [\d,]+ (G|T)iB with gradient"),
        ({"model": {"mixers": [{"kind": "softmax", "head_dim": 2**16, "num_heads": 2**16}]}}, "^model: its "),
        ({"model": {"num_layers": 10_000, "d_model": 4096}}, "^model: its .* lower model.d_model, num_layers"),
        ({"data": {"batch_size": 2**31 - 1}}, "^data: a batch of 2147483647 rows of 256 tokens takes at least"),
        ({"data": {"sequence_length": 2**30}}, "^data: a batch of 16 rows of 1073741824 tokens takes at least"),
        ({"evaluation": {"sample_tokens": 2**31 - 1}}, "^evaluation.sample_tokens 2147483647: the state of so"),
    ],
)  # fmt: skip
def test_a_run_beyond_the_memory_is_refused_with_both_numbers(options, message):
    with pytest.raises(ValueError, match=message) as error:
        memory.check_memory(config.from_dict(options))
    assert "this machine has" in str(error.value) and "\n" not in str(error.value)


def test_the_parameters_are_counted_by_the_shapes_of_a_few_layers():
    for options in (
        {"num_layers": 7, "mixers": [{"kind": "gla"}, {"kind": "softmax"}, {"kind": "softmax"}]},
        {"num_layers": 6, "mixers": [{"kind": "softmax"}, {"kind": "cross"}], "encoder": {"num_layers": 5}},
    ):
        objective = "seq2seq" if "encoder" in options else "causal_lm"
        model = config.from_dict({"model": options | {"vocab_size": 300}, "objective": objective}).model
        exact, counted = memory._count(model), memory.parameter_count(model)
        # Layers of a period that is cut short count as the mean of the period.
        assert counted == pytest.approx(exact, rel=0.05 if model.num_layers % len(model.mixers) else 1e-9)


def test_hints_name_what_there_is():
    """Nothing is proposed where no word is near; a word of another library has a sentence."""
    from attention_jax import hints as table

    kinds = list(mixer_kinds())
    assert table.hint("kind", "softmx", kinds) == "; did you mean softmax?"
    assert table.hint("kind", "xyzzy", kinds) == table.hint("remat", "xyzzy", ["dots_saveable"]) == ""
    assert table.near("Gated-DeltaNet", kinds) == "gated_deltanet"
    for (
        word
    ) in "mha gqa mqa flash sdpa local sliding_window relative linear_attention mamba retnet fox s4".split():
        assert not table.hint("kind", word, kinds).startswith("; did you mean"), word
    said = {sentence for name in ("kind", "feature_map", "mask") for sentence in table.VALUES[name].values()}
    for sentence in said:  # what a sentence names exists
        assert set(re.findall(r"\bkinds? (\w+)", sentence)) <= set(kinds), sentence
        for expression in re.findall(r"[A-Z]\w+\([^)]*\)+", sentence):
            if not expression.startswith(("DeepSeek", "FAVOR")):
                masks.parse(expression.replace("))", ")") if expression.count("(") == 1 else expression)


@pytest.mark.parametrize(
    "override, words",
    [
        ("model.mixers.0.kind=gqa", "grouped-query attention is kind softmax with num_kv_heads"),
        ("model.mixers.0.kind=mha", "multi-head attention is kind softmax"),
        ("model.mixers.0.impl=flash", "attention in blocks is chunked, or null"),
        ("model.mixers.0.mask=swa", "write SlidingWindow(128)"),
        ("model.mixers.0.mask=sliding_window(4)", "did you mean SlidingWindow?"),
        ("model.mixers.0.rope.scaling.kind=ntk", "the NTK-aware base is dynamic_ntk"),
        ("model.remat=full", "nothing_saveable recomputes everything"),
        ("model.dtype=fp16", "float16 is not supported: write bfloat16"),
        ("model.dtype=bf16", "write bfloat16"),
        ("optimizer=adam", "the optimiser is AdamW"),
        ("optimizer.kind=adam", "the optimiser is AdamW; there is no other to choose"),
        ("optimizer.lr=1", "the learning rate is optimizer.learning_rate"),
        ("lr=1", "the learning rate is optimizer.learning_rate"),
        ("epochs=1", "training is counted in steps"),
        ("batch=1", "the rows per step are data.batch_size"),
        ("model.hidden_size=1", "the model's width is model.d_model"),
        ("model.n_layer=1", "the number of layers is model.num_layers"),
        ("model.num_layer=1", "did you mean model.num_layers?"),
        ("d_model=1", "did you mean model.d_model?"),
        ("model.n_heads=1", "model.mixers.0.num_heads"),
        ("seq_len=1", "the tokens per row are data.sequence_length"),
        ("context_length=1", "the tokens per row are data.sequence_length"),
        ("objective=mlm", "write masked_lm"),
        ("data.tokenizer=bpe", "there are bytes and chars only"),
        ("optimizer.xyzzy=1", "the keys of optimizer are learning_rate, final_learning_rate, "),
    ],
)
def test_another_librarys_word_is_answered_with_ours(tmp_path, override, words):
    (tmp_path / "a.yaml").touch()
    with pytest.raises(ConfigError, match=re.escape(words)) as error:
        config.load(tmp_path / "a.yaml", [override])
    assert "\n" not in str(error.value)


def test_the_words_of_other_trainers_name_keys_that_exist():
    from train.config import synonyms

    def known(cls: type, path: str) -> Iterator[str]:
        for name, annotation in hints(cls).items():
            yield f"{path}{name}"
            for section in sections(annotation):
                yield from known(section, f"{path}{name}.")
            for section in sections(item_type(annotation)):
                yield from known(section, f"{path}{name}.0.")

    keys = set(known(RunConfig, ""))
    for sentence in {*synonyms.KEYS.values(), *synonyms.VALUES["optimizer"].values()}:
        for key in re.findall(r"\b(?:model|data|optimizer|evaluation|checkpoint)\.[\w.]*\w", sentence):
            assert key in keys, sentence


# Run in a process of its own, whose stdout is closed from the start: what main answers, on stderr.
MANY = """
import contextlib, io, os, sys
import jax
from attention_jax.__main__ import main as catalogue
from train import cli, command_line
from train.commands import benchmark, compare, generate, recall, visualize

def answer(main, *argv):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(argv)
    print(repr((argv, status, len(out.getvalue()), err.getvalue())), file=sys.stderr)

status = cli.main(["tiny.yaml", "--print-config"])
print(repr((("closed",), status, 0, "")), file=sys.stderr)
for override in OVERRIDES:
    answer(cli.main, "tiny.yaml", override)
answer(cli.main, "tiny.yaml", "run_dir=x")  # JAX_PLATFORMS=cpuu
os.environ["JAX_PLATFORMS"] = "cpu"
jax.config.update("jax_platforms", "cpu")
answer(cli.main, "tiny.yaml", "model.d_model=1048576", "run_dir=x")
answer(cli.main, "tiny.yaml", "run_dir=" + "x" * 300)
answer(generate.main, "a\\0b")
answer(generate.main, "~nobody-of-this-name/x")
answer(generate.main, "runs/none", "--tokens", "9" * 5000)
answer(generate.main, "runs/none", "--tokens", "1.5")
answer(generate.main, "runs/none", "--top-p", "nan")
answer(generate.main, "runs/none", "--tokens", "1e3")
answer(compare.main, "tiny.yaml", "--runs", "")
answer(visualize.main, "mask", "~" * 5000 + "Causal()")
answer(visualize.main, "mask", "Causal()", "--length", "1e23")
answer(catalogue, "gqa")
answer(catalogue, "mla", "SlidingWindow")
"""


def test_the_command_line_answers_in_one_line(tmp_path):
    (tmp_path / "tiny.yaml").write_text("steps: 30\n")
    overrides = [
        "d_model=1", "model.d_model=2147483648", "steps=1e23", "steps=" + "9" * 5000, "model.mixers=" + "[" * 5000,
        "model.mixers.0.mask=" + "~" * 5000 + "Causal()", "optimizer.clip_norm=1e-40", "run_dir=a\0b",
        "data.files=a\0b", "model.mixers.0.softcap=1e308", "x" * 50_000 + "=1", "model" + ".x" * 5000 + "=1",
        "seed=\ud800", "steps=\x1b[31m",
    ]  # fmt: skip
    code = MANY.replace("OVERRIDES", ascii(overrides))
    command = ["bash", "-c", 'exec "$0" -W error::ResourceWarning -c "$1" >&-', sys.executable, code]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env={"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpuu", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    answers = [eval(line) for line in done.stderr.splitlines()]
    for argv, status, printed, error in answers:
        if argv[0] in ("closed", "mla"):
            assert (status, error) == (0, "") and (printed > 0) == (argv[0] == "mla")
            continue
        assert status == 2 and printed == 0, (argv, status, error)
        assert error.startswith("error: ") and error.count("\n") == 1 and len(error) < 900, error
    assert len(answers) == len(overrides) + 15
    everything = "\n".join(error for *_, error in answers)
    for words in (
        "JAX_PLATFORMS=cpuu: jax cannot use this platform here; did you mean cpu?", "parameters take",
        "must be a path, got 'a\\x00b'", "there is no home folder ~nobody-of-this-name", "number of 5000 digits",
        "must be an integer, got 1.5", "must be a number, got nan", "runs/none does not exist",
        " nests ", "grouped-query attention is kind softmax", "File name too long",
    ):  # fmt: skip
        assert words in everything, (words, everything)
    assert not [path for path in tmp_path.iterdir() if path.name != "tiny.yaml"]
