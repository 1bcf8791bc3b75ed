"""YAML, overrides, help and the command line: what is read, what is refused, and in which words."""

from __future__ import annotations

import copy
import dataclasses
import os
import random
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_jax.biases import T5
from attention_jax.masks import SlidingWindow
from attention_jax.mixers import AttentionConfig, CrossAttentionConfig, MixerConfig, base
from attention_jax.model import EncoderConfig, ModelConfig
from attention_jax.positions import Llama3, LongRoPE, RoPE, Temperature, XPos, YaRN
from train import cli, config, process
from train.config import ConfigError, yaml_text
from train.config import help as help_lib
from train.config import keys as keys_lib
from train.config.schema import RunConfig
from train.config.sections import DataConfig, EvaluationConfig, OptimizerConfig

ROOT = Path(__file__).parents[1]


@pytest.fixture
def load(tmp_path):
    def load(text: str = "", *overrides: str) -> RunConfig:
        path = tmp_path / "tiny.yaml"
        path.write_text(text)
        return config.load(path, overrides)

    return load


def test_an_empty_file_gives_the_defaults_and_a_run_dir(load):
    assert load() == RunConfig(run_dir="runs/tiny")
    assert load("run_dir: elsewhere").run_dir == "elsewhere"


def test_values_reach_their_fields(load):
    run = load(
        "steps: 7\nseed: 3\n"
        "optimizer: {learning_rate: 1, final_learning_rate: 3e-4, warmup_steps: 0, clip_norm: null}\n"
        "model:\n  mixers:\n  - kind: softmax\n    mask: SlidingWindow(8)\n    rope: {theta: 5e5}\n"
        "data: {files: 'a/*.txt', tokenizer: chars}\ncheckpoint: {keep_best: false}\n"
    )
    assert (run.steps, run.seed) == (7, 3)
    rates = run.optimizer.learning_rate, run.optimizer.final_learning_rate
    assert rates == (1.0, 3e-4) and all(type(rate) is float for rate in rates)
    assert run.optimizer.clip_norm is None
    assert run.model.mixers == (AttentionConfig(mask=SlidingWindow(8), rope=RoPE(theta=5e5)),)
    assert run.data == DataConfig(files="a/*.txt", tokenizer="chars")
    assert run.checkpoint.keep_best is False


_LISTS = "short_factor: [1, 2e0], long_factor: [3, 4], original_length: 8, length: 900"
_LONG = RoPE(
    width=4,
    scaling=LongRoPE(short_factor=(1.0, 2.0), long_factor=(3.0, 4.0), original_length=8, length=900),
)


@pytest.mark.parametrize(
    "written, value",
    [
        ("rope: {theta: 5e5, scaling: {kind: llama3}}", {"rope": RoPE(5e5, scaling=Llama3())}),
        (f"rope: {{width: 4, scaling: {{kind: longrope, {_LISTS}}}}}", {"rope": _LONG}),
        ("rope: {xpos: {centre: 100}}", {"rope": RoPE(xpos=XPos(centre=100))}),
        ("temperature: {floor: 64}", {"temperature": Temperature(64)}),
        ("bias: t5", {"bias": T5()}),
        ("bias: {kind: t5, buckets: 16}", {"bias": T5(buckets=16)}),
        ("bias: alibi", {"bias": "alibi"}),
    ],
)
def test_options_that_are_sections_of_several_kinds(load, written, value):
    run = load(f"model: {{mixers: [{{kind: softmax, {written}}}]}}")
    assert run.model.mixers == (AttentionConfig(**value),)
    assert config.from_dict(config.to_dict(run)) == run


def _mixer(options: str) -> str:
    return f"model: {{mixers: [{{kind: softmax, {options}}}]}}"


def _seq2seq(rest: str = "", model: str = "", mask: str = "Full()") -> str:
    mixers = f"mixers: [{{kind: softmax, mask: {mask}}}, {{kind: cross}}]"
    return f"objective: seq2seq\nmodel: {{encoder: {{}}, {mixers}, {model}}}\n{rest}"


def test_a_seq2seq_run_reads_back(load):
    run = load(_seq2seq("data: {source_length: 40}", "max_positions: 256"))
    assert run.objective == "seq2seq" and run.data.source_width == 40
    assert run.model.encoder == EncoderConfig() and isinstance(run.model.mixers[1], CrossAttentionConfig)
    assert config.from_dict(config.to_dict(run)) == run
    assert load(_seq2seq("data: {sequence_length: 32}")).data.source_width == 32
    assert load(_seq2seq(), "model.encoder.num_layers=3").model.encoder.num_layers == 3


# Nine lists of ten aliases of the one before: 600 bytes that would be ten billion values.
_BOMB = "a0: &a0 x\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 11))

REFUSED = [
    # (YAML, words the one-line message must hold)
    ("optimzer: {}", ["unknown key optimzer", "optimizer?"]),
    ("optimizer:\n  learning_rat: 1e-4", ["unknown key optimizer.learning_rat", "optimizer.learning_rate?"]),
    ("model:\n  layers: scan", ["unknown key model.layers", "it is model.scan_layers now"]),
    ("learning_rate: 1", ["unknown key learning_rate", "optimizer.learning_rate?"]),
    ("num_heads: 1", ["unknown key num_heads", "model.mixers.0.num_heads?"]),
    ("xyzzy: 1", ["unknown key xyzzy; the keys at the top are run_dir, seed, steps, "]),
    ("model: {mixers: [{kind: softmax, rope: {teta: 1}}]}", ["unknown key model.mixers.0.rope.teta", "a?"]),
    (_mixer("rope: {scaling: {factor: 8}}"), ["rope.scaling.kind is missing; there are: linear, "]),
    (_mixer("rope: {scaling: {kind: llama4}}"), ["model.mixers.0.rope.scaling.kind: there is no 'llama4'"]),
    (_mixer("rope: {scaling: {kind: yarn, factr: 8}}"), ["unknown key", "rope.scaling.factor?"]),
    (_mixer("rope: {scaling: {kind: yarn, factor: 8}}"), ["rope.scaling.original_length is missing"]),
    (_mixer("rope: {scaling: {kind: linear, factor: .5}}"), ["rope.scaling: LinearScaling factor must be"]),
    (_mixer("rope: {scaling: yarn}"), ["rope.scaling: expected a mapping of keys or null, got 'yarn'"]),
    (_mixer("rope: {xpos: {scale_base: x}}"), ["mixers.0.rope.xpos.scale_base: expected a number, got 'x'"]),
    (_mixer("bias: t6"), ['bias: expected "alibi" or "t5" or a mapping of keys or null, got', "'t6'"]),
    (_mixer("bias: {buckets: 8}"), ["model.mixers.0.bias.kind is missing; there are: alibi, t5"]),
    (_mixer("bias: {kind: t5, buckets: x}"), ["model.mixers.0.bias.buckets: expected an integer, got 'x'"]),
    (_mixer("bias: {kind: t5, buckets: 15}"), ["bias: T5 buckets must be even and >= 4, got 15"]),
    (_mixer("temperature: {floor: 0}"), ["temperature: Temperature floor must be >= 1, got 0"]),
    ("model: {sinusoidal: true, max_positions: 256}", ["model.sinusoidal and max_positions 256 both add"]),
    ("steps: 1\nseed: 1\nsteps: 2", ["tiny.yaml:3:1: duplicate key 'steps'"]),
    ("model:\n  d_model: 4\n  d_model: 4", ["tiny.yaml:3:3: duplicate key 'd_model'"]),
    ("steps: true", ["steps: expected an integer, got true"]),
    ("steps: 1.5", ["steps: expected an integer, got 1.5"]),
    ("steps: 1e23", ["steps must be an integer of 32 bits, at most 2147483647", "a number of 23 digits"]),
    ("steps: '5'", ["steps: expected an integer, got '5'"]),
    ("steps: 010", ["steps: expected an integer, got '010'"]),
    ("steps: 0x10", ["got '0x10'"]),
    ("steps: 1_000", ["got '1_000'"]),
    ("steps: 1:30", ["got '1:30'"]),
    ("steps: null", ["steps: expected an integer, got null"]),
    ("checkpoint: {keep_best: no}", ["checkpoint.keep_best: expected true or false, got 'no'"]),
    ("checkpoint: {keep_best: on}", ["expected true or false, got 'on'"]),
    ("checkpoint: {keep_best: 1}", ["expected true or false, got 1"]),
    ("optimizer: {learning_rate: true}", ["optimizer.learning_rate: expected a number, got true"]),
    ("optimizer: {learning_rate: .nan}", ["expected a number, got '.nan'"]),
    ("optimizer: {learning_rate: 1e999}", ["'1e999' is not a finite decimal number"]),
    ("optimizer: {clip_norm: big}", ["optimizer.clip_norm: expected a number or null, got 'big'"]),
    ("data: 3", ["data: expected a mapping of keys, got 3"]),
    ("data: {tokenizer: words}", ['data.tokenizer: expected "bytes" or "chars"', "'words'"]),
    ("data: {files: [a.txt]}", ["data.files: expected text or null, got [a.txt]"]),
    ("model: {mixers: {kind: softmax}}", ["model.mixers: expected a list"]),
    ("model: {mixers: [softmax]}", ["model.mixers.0: expected a mapping of keys, got 'softmax'"]),
    ("model: {mixers: [{num_heads: 2}]}", ["model.mixers.0.kind is missing", "softmax, cross"]),
    ("model: {mixers: [{kind: softmx}]}", ["model.mixers.0.kind: there is no 'softmx'", "softmax, cross"]),
    ("model: {mixers: [{kind: softmax, num_heads: '4'}]}", ["model.mixers.0.num_heads: expected an integer"]),
    ("model: {mixers: [{kind: cross, num_heads: '4'}]}", ["model.mixers.0.num_heads: expected an integer"]),
    ("model: {mixers: [{kind: cross, num_heads: 3, num_kv_heads: 2}]}", ["model.mixers.0.num_kv_heads 2"]),
    ("model: {mixers: [{kind: softmax, mask: 4}]}", ["mixers.0.mask: expected a mask expression, got 4"]),
    ("model: {mixers: [{kind: softmax, mask: Slid(4)}]}", ["model.mixers.0.mask", "Slid", "SlidingWindow"]),
    ("model: {mixers: [{kind: softmax, mask: SlidingWindow(0)}]}", ["model.mixers.0.mask", "window"]),
    (
        "model: {mixers: [{kind: softmax, mask: 'Dense([[True]])'}]}",
        ["model.mixers.0.mask: Dense(1 x 1", "cannot be written to YAML"],
    ),
    ("model: {mixers: [{kind: softmax, impl: flash}]}", ["model.mixers.0", "unknown impl 'flash'"]),
    (
        "model: {mixers: [{kind: softmax, softcap: 0}]}",
        ["model.mixers.0.softcap must be from 0.1 to 1e+06, got 0.0"],
    ),
    ("model: {mixers: [{kind: softmax, num_heads: 3, num_kv_heads: 2}]}", ["num_kv_heads 2", "num_heads 3"]),
    ("model: {d_model: 130}", ["model.mixers.0", "130", "num_heads 4"]),
    ("model: {d_model: 10, mixers: [{kind: softmax, num_heads: 2, rope: {}}]}", ["model.mixers.0", "odd"]),
    ("model: {d_model: 0}", ["model.d_model must be >= 1, got 0"]),
    ("model: {causal: false}", ["model.causal is false"]),
    (
        "model: {mixers: [{kind: cross}]}",
        ["model.mixers.0.kind is cross", "encoder's output", "objective: seq2seq"],
    ),
    ("model: {encoder: {}}", ["model.encoder: no mixer attends to it", "cross"]),
    ("objective: mlm", ['objective: expected "causal_lm" or "seq2seq" or "masked_lm", got', "'mlm'"]),
    ("objective: seq2seq", ["model.encoder is null: objective seq2seq", "kind cross"]),
    (
        "model: {encoder: {}, mixers: [{kind: softmax}, {kind: cross}]}",
        ["model.mixers.1.kind is cross", "objective: seq2seq and model.encoder"],
    ),
    ("model: {encoder: {num_layers: 1, mixers: [{kind: cross}]}}", ["model.encoder", "no memory"]),
    ("data: {source_length: 8}", ["data.source_length 8: objective causal_lm has no source"]),
    ("data: {source_length: 0}", ["data.source_length must be >= 1, got 0"]),
    (_seq2seq("data: {tokenizer: chars}"), ["data.tokenizer is chars", "end-of-document token", "use bytes"]),
    (_seq2seq("data: {packing: stream}"), ["data.packing is stream", "one pair per row"]),
    (_seq2seq("evaluation: {sample_prompt: a}"), ["evaluation.sample_prompt", "held-out sources"]),
    (_seq2seq("data: {source_length: 400}", "max_positions: 300"), ["data.source_length 400 exceeds"]),
    (_seq2seq("", "causal: false"), ["model.causal is false"]),
    (_seq2seq("", mask="Prefix(4)"), ["model.mixers: a prefix of 4 tokens", "causal masks only"]),
    ("model: {max_positions: 16}", ["data.sequence_length 256 exceeds model.max_positions 16"]),
    (
        "model: {mixers: [{kind: softmax}, {kind: cosformer, horizon: 255}]}",
        ["data.sequence_length 256 exceeds model.mixers.1.horizon 255"],
    ),
    ("steps: 0", ["steps must be >= 1, got 0"]),
    ("seed: -1", ["seed must be in [0, 4294967296), got -1"]),
    ("data: {sequence_length: 0}", ["data.sequence_length must be >= 1, got 0"]),
    ("data: {validation_fraction: 1}", ["data.validation_fraction must lie between 0 and 1", "1.0"]),
    ("data: {validation_fraction: 0}", ["data.validation_fraction must lie between 0 and 1"]),
    (
        "data: {shuffle_seed: 4294967296}",
        ["data.shuffle_seed must be an integer of 32 bits, at most 4294967295"],
    ),
    ("data: {files: ''}", ["data.files is an empty glob"]),
    ("data: {batch_size: 15}\noptimizer: {accumulation_steps: 2}", ["accumulation_steps 2", "batch_size 15"]),
    ("optimizer: {beta1: 1}", ["optimizer.beta1 must be in [0, 1), got 1.0"]),
    ("optimizer: {learning_rate: 0}", ["optimizer.learning_rate must be finite and > 0, got 0.0"]),
    ("optimizer: {weight_decay: -1}", ["optimizer.weight_decay must be >= 0, got -1.0"]),
    ("optimizer: {final_learning_rate: 2}", ["final_learning_rate 2.0 exceeds learning_rate 0.001"]),
    ("optimizer: {schedule: constant, decay_steps: 3}", ["optimizer.decay_steps 3", "constant"]),
    ("steps: 50\noptimizer: {warmup_steps: 100}", ["optimizer.warmup_steps 100 exceeds steps 50"]),
    ("steps: 100\noptimizer: {warmup_steps: 100}", ["warmup_steps 100 is not before the end of the cosine"]),
    ("steps: 110\noptimizer: {schedule: wsd, warmup_steps: 100}", ["100", "22 steps", "exceed steps 110"]),
    ("evaluation: {sample_prompt: ''}\ndata: {tokenizer: chars}", ["evaluation.sample_prompt is empty"]),
    ("evaluation: {batches: 0}", ["evaluation.batches must be >= 1, got 0"]),
    ("checkpoint: {keep: 0}", ["checkpoint.keep must be >= 1, got 0"]),
    ("[1]", ["expected a mapping of keys, got [1]"]),
    ("steps: 1\na: b: c", ["tiny.yaml:2:5: mapping values are not allowed here"]),
    ("1: 2", ["a key must be text, got 1"]),
    ("steps: 1\n? [a]\n: 2", ["tiny.yaml:2:3: a key must be text, got a list"]),
    ("a: &a b\n*a : 2", ["tiny.yaml:2:1: a key must be text, got an alias"]),
    ("a: !!set {a}", ["type 'set' is not supported"]),
    ("a: !!python/object:os.system {}", ["is not supported"]),
    ("a: !!bool no", ["type 'bool' is not supported"]),
    ("a: !!int '010'", ["type 'int' is not supported"]),
    ("&a [*a]", ["alias *a is recursive"]),
    ("a: &a {b: {c: *a}}", ["alias *a is recursive"]),
    ("a: *b", ["undefined alias 'b'"]),
    ("steps: 1\na: \x00", ["tiny.yaml:2:4: the character U+0000 is not allowed"]),
    ("[" * 3000, ["nested more than 50 levels"]),
    ("- " * 3000, ["nested more than 50 levels"]),
    ("{a: " * 3000, ["nested more than 50 levels"]),
    (_BOMB, ["tiny.yaml:5:55: more than 10000 values"]),
    ("9" * 5000, ["is not a finite decimal number"]),
    ('seed: 1\nrun_dir: "a\\uD800"', ["tiny.yaml:2:10: text must not hold the code of a surrogate"]),
    ("%YAML 1.1\n---\ncheckpoint: {keep_best: no}", ["expected true or false, got 'no'"]),
    ("steps: 1\n---\nsteps: 2", ["expected a single document in the stream, but found another document"]),
]


@pytest.mark.parametrize("text, words", REFUSED, ids=[text[:60] for text, _ in REFUSED])
def test_a_mistake_gives_one_line(load, text, words):
    with pytest.raises(ConfigError, match=re.escape(words[0])) as error:
        load(text)
    message = str(error.value)
    assert len(message.splitlines()) == 1
    for word in words:
        assert word in message


def test_a_kind_defined_after_a_config_was_read_is_known(load, monkeypatch):
    monkeypatch.setattr(base.MixerConfig, "_members", base.MixerConfig.kinds())
    load("")

    @dataclasses.dataclass(frozen=True)
    class Late(AttentionConfig):
        kind: typing.Literal["late"] = "late"

    assert load("model: {mixers: [{kind: late, num_heads: 2}]}").model.mixers == (Late(num_heads=2),)


def test_an_override_of_one_alias_leaves_the_others(load):
    text = "model: {num_layers: 2, mixers: [&m {kind: softmax, num_heads: 4}, *m]}"
    run = load(text, "model.mixers.1.num_heads=2")
    assert [mixer.num_heads for mixer in run.model.mixers] == [4, 2]


MUTANTS = [
    None, True, 0, -1, 1.5, 10**40, "x", "", "Causal()", "t5", [], {}, [1], [[[]]], [{}], {"a": 1},
    {"kind": "softmax"}, {"kind": "yarn"}, {"kind": "none"}, {"kind": 3}, {"kind": None}, {"kind": []},
]  # fmt: skip


def test_any_value_anywhere_is_read_or_refused_in_one_line():
    """Real configurations with one or two values of another type, a key too many or one missing."""

    def places(tree):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
        for key, below in items:
            yield tree, key
            yield from places(below)

    names = ("tiny", "seq2seq", "llama4_shaped", "mechanisms/t5_bias", "mechanisms/rope_yarn", "mqar/gla")
    originals = [config.to_dict(config.load(name)) for name in names]
    draw, refused = random.Random(0), 0
    for number in range(600):
        raw = copy.deepcopy(originals[number % len(originals)])
        for _ in range(draw.choice([1, 1, 2])):
            tree, key = draw.choice(list(places(raw)))
            action = draw.choice(["replace", "replace", "add", "remove"])
            if action == "remove":
                del tree[key]
            elif action == "add" and isinstance(tree, dict):
                tree[draw.choice(["kind", "rope", "softmax", "T5", "head"])] = copy.deepcopy(
                    draw.choice(MUTANTS)
                )
            else:
                tree[key] = copy.deepcopy(draw.choice(MUTANTS))
        try:
            run = config.from_dict(raw)
        except ConfigError as error:
            refused += 1
            assert re.fullmatch(r"(unknown key )?[a-z][\w.]*\b[^\n]+", str(error)), error
        else:
            assert config.from_dict(config.to_dict(run)) == run
    assert 300 < refused < 600


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the configuration .*none.yaml: No such file"):
        config.load(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"run_dir: caf\xe9")
    with pytest.raises(ConfigError, match="latin.yaml is not UTF-8 at byte 12"):
        config.load(tmp_path / "latin.yaml")


def test_overrides_win_over_the_file_and_later_ones_over_earlier_ones(load):
    run = load("steps: 500\nseed: 1", "steps=600", "optimizer.learning_rate=3e-4", "steps=700")
    assert (run.steps, run.seed, run.optimizer.learning_rate) == (700, 1, 3e-4)


def test_an_override_inside_a_default_keeps_the_rest_of_it(load):
    run = load("", "model.mixers.0.num_heads=8", "model.mixers.0.rope.layout=interleaved")
    default = ModelConfig().mixers[0]
    rope = dataclasses.replace(default.rope, layout="interleaved")
    assert run.model.mixers == (dataclasses.replace(default, num_heads=8, rope=rope),)
    run = load("model: {mixers: [{kind: softmax}]}", "model.mixers.0.rope.theta=1e6")
    assert run.model.mixers == (AttentionConfig(rope=RoPE(theta=1e6)),)
    assert load("model: {mixers: [{kind: softmax, rope: {}}]}", "model.mixers.0.rope=null").model.mixers == (
        AttentionConfig(),
    )


def test_an_override_may_choose_a_kind_where_none_is_chosen(load):
    at = "model.mixers.0.rope.scaling"
    run = load(
        "", f"{at}.kind=yarn", f"{at}.factor=4", f"{at}.original_length=64", "model.mixers.0.bias.kind=t5"
    )
    (mixer,) = run.model.mixers
    assert (mixer.rope.scaling, mixer.bias) == (YaRN(factor=4.0, original_length=64), T5())
    with pytest.raises(ConfigError, match=f"{at}.kind is missing; there are: linear, "):
        load("", f"{at}.factor=4")
    with pytest.raises(ConfigError, match=f"{at}.kind: there is no 'yarm'; there are: linear, "):
        load("", f"{at}.kind=yarm")


@pytest.mark.parametrize(
    "written, value",
    [("*.txt", "*.txt"), ("a: b", "a: b"), ("x ", "x "), ("null", None), ("'null'", "null"), ("010", "010"),
     ('"a\\nb"', "a\nb"), ("no", "no"), ("[a]", "[a]"), ("#x", "#x"), ("a=b", "a=b"), ("1", "1")],
)  # fmt: skip
def test_text_in_an_override_is_taken_as_written(load, written, value):
    assert load("", f"data.files={written}").data.files == value


@pytest.mark.parametrize(
    "override, words",
    [
        ("steps", ["'steps' is not of the form key.path=value"]),
        ("=3", ["is not of the form key.path=value"]),
        ("model..d_model=3", ["is not of the form key.path=value"]),
        ("optimzer.learning_rate=1", ["unknown key optimzer", "optimizer?"]),
        ("model.mixers.0.masc=Causal()", ["unknown key model.mixers.0.masc", "model.mixers.0.mask?"]),
        ("model.mixers.1.num_heads=2", ["model.mixers has the items 0 to 0"]),
        ("model.mixers.x=2", ["model.mixers has the items 0 to 0"]),
        ("model.mixers.-1.num_heads=2", ["model.mixers has the items 0 to 0"]),
        ("steps.x=1", ["steps has no keys below it: it is an integer"]),
        ("steps=[1", ["override steps: "]),
        ("steps=two", ["steps: expected an integer, got 'two'"]),
        ("steps=", ["steps: expected an integer, got null"]),
        ("model.mixers.0.mask=", ["model.mixers.0.mask"]),
        ("data.files=\udcff", ["override data.files: the value is not valid UTF-8"]),
    ],
)
def test_a_wrong_override_gives_one_line(load, override, words):
    with pytest.raises(ConfigError, match=re.escape(words[0])) as error:
        load("", override)
    assert len(str(error.value).splitlines()) == 1
    for word in words:
        assert word in str(error.value)


finite = st.floats(allow_nan=False, allow_infinity=False)
character = st.characters(exclude_categories=["Cs"]) | st.sampled_from("\r\n\x85\u2028 '\"#:")
text = st.text(character, max_size=20)
path = text.filter(lambda written: written.strip() and "\0" not in written and written[0] != "~")
mixers = st.builds(
    AttentionConfig,
    num_heads=st.sampled_from([1, 2, 4]),
    mask=st.sampled_from(["Causal()", "SlidingWindow(128) | Sinks(4)", "~SlidingWindow(3, right=2)"]),
    rope=st.none()
    | st.builds(RoPE, theta=st.floats(1, 1e15), layout=st.sampled_from(["half", "interleaved"])),
    bias=st.sampled_from([None, "alibi"]),
    scale=st.none() | st.floats(1e-6, 1e6),
    sink_logits=st.booleans(),
)
runs = st.builds(
    RunConfig,
    run_dir=path,
    seed=st.integers(0, 2**32 - 1),
    steps=st.integers(1, 2**31 - 1),
    model=st.builds(ModelConfig, mixers=st.lists(mixers, min_size=1, max_size=3).map(tuple)),
    data=st.builds(DataConfig, files=st.none() | path),
    optimizer=st.builds(
        OptimizerConfig,
        final_learning_rate=st.sampled_from([None, 0.0, 1e-30, 1e-3]),
        epsilon=st.floats(1e-20, 1),
    ),
    evaluation=st.builds(EvaluationConfig, sample_prompt=text, batches=st.none() | st.integers(1, 2**31 - 1)),
)


@settings(max_examples=60, deadline=None)
@given(runs)
def test_what_is_dumped_reads_back_equal(tmp_path_factory, run):
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    path.write_text(config.dump_yaml(run), encoding="utf-8", newline="")
    again = config.load(path)
    assert again == run
    assert config.dump_yaml(again) == config.dump_yaml(run)
    assert config.from_dict(config.to_dict(run)) == run


@settings(max_examples=200, deadline=None)
@given(st.recursive(
    st.none() | st.booleans() | st.integers() | finite | text
    | st.sampled_from(["no", "010", "1e-4", "1e4", "~", "null", "true", ".5", "<<", "=", "2020-01-01"]),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(text, below, max_size=3), max_leaves=6,
))  # fmt: skip
def test_yaml_text_reads_what_it_writes(value):
    again = yaml_text.parse(yaml_text.dumps(value), "here")
    assert again == value and repr(again) == repr(value)
    assert "\n" not in yaml_text.scalar(value)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_the_projects_own_configs_load(path):
    assert config.load(path).run_dir == f"runs/{path.stem}"


def test_every_key_has_a_meaning_a_type_and_a_default():
    shown = list(help_lib.keys())
    assert [key.path for key in shown if not key.meaning or not key.type] == []
    paths = {key.path for key in shown}
    assert {"steps", "data.files", "model.mixers.N.mask", "model.mixers.N.rope.theta"} <= paths
    defaults = {key.path: key.default for key in shown}
    assert defaults["optimizer.learning_rate"] == "0.001" and defaults["data.files"] == "null"


def test_help_shows_every_key_and_kind_within_80_columns():
    text = help_lib.help_text()
    assert max(map(len, text.splitlines())) <= help_lib.WIDTH == 80
    for key in help_lib.keys():  # a section met a second time refers to the first
        assert key.path in text or re.search(rf"\.{key.path.rpartition('.')[2]} ", text)
    assert "with the keys of model.mixers.N.rope above" in text
    for cls in typing.get_args(MixerConfig):
        assert f"kind: {keys_lib.kind_of(cls)}" in text


def test_meanings_stand_above_a_field_or_behind_it():
    meanings = keys_lib.meanings(DataConfig)
    assert meanings["batch_size"] == "rows per step (B), all accumulation steps together"
    assert meanings["packing"].startswith("documents: packed end to end into rows, with segment ids")
    assert "stream: random windows of the concatenated text" in meanings["packing"]


@pytest.fixture
def run_cli(tmp_path, monkeypatch, capsys):
    """main([...]) in a folder with tiny.yaml; (status, stdout, stderr)."""
    (tmp_path / "tiny.yaml").write_text("steps: 200\n")
    monkeypatch.chdir(tmp_path)

    def run(*argv: str) -> tuple[int, str, str]:
        status = cli.main(argv)
        return status, *capsys.readouterr()

    return run


def test_print_config_prints_what_load_reads_back(run_cli, tmp_path):
    status, out, err = run_cli("tiny.yaml", "steps=300", "--print-config")
    assert (status, err) == (0, "")
    (tmp_path / "again.yaml").write_text(out)
    assert config.load(tmp_path / "again.yaml") == config.load(tmp_path / "tiny.yaml", ["steps=300"])


def test_help_is_printed(run_cli):
    assert run_cli("--help") == (0, help_lib.help_text(), "")
    assert run_cli("tiny.yaml", "-h") == (0, help_lib.help_text(), "")


@pytest.mark.parametrize(
    "argv, word",
    [
        ([], "no configuration"),
        (["steps=3"], "the configuration comes first"),
        (["--print-confg", "tiny.yaml"], "did you mean --print-config?"),
        (["none.yaml"], "cannot read the configuration none.yaml"),
        (["tiny.yaml", "stps=3"], "unknown key stps; did you mean steps?"),
        (["tiny.yaml", "data.files=none/*.txt"], "data.files=none/*.txt matches no file"),
    ],
)
def test_a_users_mistake_exits_with_2_and_one_line(run_cli, tmp_path, argv, word):
    status, out, err = run_cli(*argv)
    assert status == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and word in err
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["tiny.yaml"]


def test_interrupts_and_internal_errors_are_distinguished(run_cli, monkeypatch):
    def raising(error):
        def load(*_):
            raise error

        return load

    monkeypatch.setattr(config, "load", raising(KeyboardInterrupt()))
    assert run_cli("tiny.yaml")[0] == 130
    monkeypatch.setattr(config, "load", raising(OSError(28, "No space left on device", "runs/x")))
    status, _, err = run_cli("tiny.yaml")
    assert (status, err) == (1, "error: runs/x: No space left on device\n")
    # A ValueError that does not come from our own frames is a defect, and keeps its traceback.
    monkeypatch.setattr(config, "load", raising(ValueError("a library's own")))
    with pytest.raises(ValueError, match="a library's own"):
        run_cli("tiny.yaml")


# Stands for jaxlib, which can crash at the end of a process while a step is still running.
ENDING = """
import atexit, os, runpy, signal, sys
from train import cli
def run(argv, own_process):
    print("printed before")
    {body}
cli._run = run
atexit.register(os.kill, os.getpid(), signal.SIGKILL)
runpy.run_module("train", run_name="__main__")
"""


@pytest.mark.parametrize(
    "body, status, message",
    [("raise KeyboardInterrupt", 130, "interrupted"), ("raise OSError('disk full')", 2, "error: disk full")],
)
def test_the_exit_status_survives_a_crash_at_the_end(body, status, message):
    command = [sys.executable, "-c", ENDING.format(body=body)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (status, "printed before\n", f"{message}\n")


PREPARE = (
    "import os, sys; from train import cli, process; process.prepare_process();"
    "print([os.environ.get(name) for name in sorted(process.ALLOCATOR)], sys.argv[1:], 'jax' in sys.modules)"
)


@pytest.mark.skipif(not process.has_glibc(), reason="the allocator's settings are glibc's")
def test_the_process_is_started_anew_with_the_allocators_settings():
    def run(**settings: str) -> str:
        set_by_us = {*process.ALLOCATOR, process.PREPARED}
        environment = {name: value for name, value in os.environ.items() if name not in set_by_us}
        command = [sys.executable, "-W", "error", "-c", PREPARE, "x", "steps=3 4"]
        done = subprocess.run(
            command, env=environment | settings, cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    arguments = "['x', 'steps=3 4'] False"
    assert run() == f"['4294967296', '268435456', '4294967296'] {arguments}"
    assert run(MALLOC_TOP_PAD_="1") == f"['4294967296', '1', '4294967296'] {arguments}"
    assert run(ATTENTION_JAX_PREPARED="1") == f"[None, None, None] {arguments}"
