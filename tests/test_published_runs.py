"""Published models behind the commands: generate, chat, training from one, and conversion."""

import io
import json
import shutil
import sys

import jax
import numpy as np
import pytest

from attention_jax import AttentionConfig, ModelConfig, RoPE, SlidingWindow, apply
from attention_jax.generation import Sampling, generate
from attention_jax.mixers import make_config
from attention_jax.pretrained import load_pretrained
from attention_jax.pretrained.families.express import expressed
from tests.published_folder import TEMPLATE, same, write_folder
from tests.runs import interrupt, rows
from train import cli, config
from train.commands import convert
from train.commands import generate as script
from train.run.initial import resolved
from train.run.restore import load_run

GREEDY = ["--temperature", "0", "--tokens", "6", "--capacity", "128"]
CORPUS = "the quick brown fox jumps over the lazy dog\n" * 40
TRAIN = {
    "steps": 5, "log_every": 1, "evaluation.every": 5, "evaluation.batches": 1, "evaluation.sample_tokens": 0,
    "evaluation.final_full": False, "checkpoint.every": 3, "data.sequence_length": 16, "data.batch_size": 2,
    "data.validation_split": "tail", "optimizer.warmup_steps": 0, "optimizer.learning_rate": 1e-3,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("published") / "model")


@pytest.fixture
def chat(monkeypatch, capsys):
    def run(folder, *lines, options=()):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        status = script.main([str(folder), *GREEDY, "--chat", *options])
        return status, capsys.readouterr()

    return run


def _train(folder, tmp_path, *more):
    (tmp_path / "corpus.txt").write_text(CORPUS)
    keys = TRAIN | {"run_dir": tmp_path / "run", "data.files": tmp_path / "corpus.txt"}
    given = [f"{key}={json.dumps(v) if isinstance(v, bool) else v}" for key, v in keys.items()]
    return ["configs/finetune.yaml", *given, f"init_from={folder}", *more]


def _answer(model, ids):
    [done] = generate(
        model.config, model.params, [ids], max_new_tokens=6, capacity=128, tokenizer=model.tokenizer,
        sampling=Sampling(temperature=0, stop_ids=(257, 260)),
    )  # fmt: skip
    return done


def test_a_prompt_begins_with_bos_and_goes_on(folder, capsys):
    model = load_pretrained(folder)
    ids = model.tokenizer.encode("fox", add_special_tokens=True)
    assert ids[0] == 256
    assert script.main([str(folder), *GREEDY, "--prompt", "fox"]) == 0
    assert capsys.readouterr().out == f"fox{_answer(model, ids).text}\n"


def test_turns_are_those_of_the_template(folder, chat):
    model = load_pretrained(folder)
    messages, expected = [], ""
    for line in ("one", "two"):
        messages.append({"role": "user", "content": line})
        answer = _answer(model, model.tokenizer.encode_chat(messages).ids)
        messages.append({"role": "assistant", "content": answer.text})
        expected += answer.text if answer.text.endswith("\n") else answer.text + "\n"
    status, said = chat(folder, "one", "two")
    assert (status, said.out) == (0, expected)
    last = [line for line in said.err.splitlines() if line.startswith("[")][-1]
    used = len(model.tokenizer.encode_chat(messages, add_generation_prompt=False).ids)
    assert f"; {used - 1} of 128 positions]" in last  # all but the <|end|> of the last answer


def test_a_rewritten_history_is_read_again(tmp_path, chat):
    """A template that leaves earlier answers out."""
    template = TEMPLATE.replace("m.content | trim", "(m.content if m.role == 'user' else '') | trim")
    folder = write_folder(tmp_path / "model", template=template)
    model = load_pretrained(folder)
    status, said = chat(folder, "one", "two", "/undo", "two")
    assert status == 0 and "in other tokens from token 7 on" in said.err
    text = "<s><|user|>one<|end|><|assistant|><|end|><|user|>two<|end|><|assistant|>"
    expected = _answer(model, model.tokenizer.encode(text)).text
    assert said.out.endswith(expected + "\n" + expected + "\n")


def test_a_system_message_and_one_question(folder, capsys):
    model = load_pretrained(folder)
    options = [*GREEDY, "--ask", "/one", "--system", "brief"]
    # The tiny vocabulary has no <|system|>: it is spelt in bytes.
    messages = [{"role": "system", "content": "brief"}, {"role": "user", "content": "/one"}]
    expected = _answer(model, model.tokenizer.encode_chat(messages).ids).text
    assert script.main([str(folder), *options]) == 0
    assert capsys.readouterr().out == expected + "\n"


def test_messages_are_saved_with_the_state(folder, chat, tmp_path):
    _, whole = chat(folder, "one", "two")
    _, parts = chat(folder, "one", f"/save {tmp_path / 'c'}", "/reset", f"/load {tmp_path / 'c'}", "two")
    assert parts.out == whole.out


def test_mistakes_have_one_line(folder, tmp_path, capsys):
    write_folder(tmp_path / "base", template=None)
    write_folder(tmp_path / "mute", tokenizer=False)
    for options, message in (
        ([folder, "--step", "3"], "--step 3 is of a run"),
        ([folder, "--system", "x"], "--system is a message of --chat or --ask"),
        ([tmp_path / "base", "--chat", "--system", "x"], "this model has none"),
        ([tmp_path / "mute"], "it holds no tokenizer"),
        ([tmp_path / "none"], "does not exist"),
        ([folder, "--chat", "--ask", "x"], "leave out --chat"),
    ):
        assert script.main(list(map(str, options))) == 2
        err = capsys.readouterr().err
        assert message in err and len(err.splitlines()[-1]) < 250


def test_training_goes_on_from_a_model_and_resumes_without_it(folder, tmp_path, monkeypatch, capsys):
    source = shutil.copytree(folder, tmp_path / "source")
    argv = _train(f"hf:{source}", tmp_path)
    run = resolved(config.load(argv[0], argv[1:]))
    model = load_pretrained(folder)
    assert run.model == model.config and run.data.tokenizer == "init_from"
    assert config.from_dict(config.to_dict(run)) == run
    assert cli.main(argv) == 0
    whole = rows(run)
    other = [*argv, f"run_dir={tmp_path / 'other'}"]
    with monkeypatch.context() as patch:
        interrupt(patch, 4)
        assert cli.main(other) == 130
    shutil.rmtree(source)
    assert cli.main(other) == 0
    assert rows(resolved(config.load(other[0], other[1:]))) == whole
    done = load_run(tmp_path / "other")
    assert done.tokenizer.to_json() == model.tokenizer.to_json()
    capsys.readouterr()
    assert script.main([str(tmp_path / "run"), *GREEDY, "--ask", "one"]) == 0

    # Another run starts from this one, and its first loss is the last one's.
    again = [*_train(f"run:{tmp_path / 'run'}", tmp_path), f"run_dir={tmp_path / 'again'}", "steps=1"]
    assert cli.main([*again, "optimizer.learning_rate=1e-9"]) == 0
    [first] = rows(config.load(again[0], again[1:]))
    assert first["val/loss"] == pytest.approx(whole[-1]["val/loss"], abs=1e-5)

    # It is written as a folder with the tokenizer of its source.
    assert convert.main([str(tmp_path / "run"), str(tmp_path / "saved")]) == 0
    saved = load_pretrained(tmp_path / "saved")
    assert saved.config == model.config and same(saved.params, load_run(tmp_path / "run").params)
    assert saved.tokenizer.to_json() == model.tokenizer.to_json()


def test_keys_in_conflict_are_named(folder, tmp_path, capsys):
    for more, message in (
        ("model.d_model=16", "model.d_model 16: the model of init_from"),
        ("data.tokenizer=chars", "data.tokenizer is chars"),
        ("init_from=hf:", "init_from 'hf:'"),
        (f"init_from={tmp_path}/none", "init_from: "),
    ):
        assert cli.main(_train(folder, tmp_path, more)) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert cli.main(_train(folder, tmp_path, "model.dtype=bfloat16", "--print-config")) == 0
    assert "d_model: 8" in capsys.readouterr().out


def test_conversion_of_a_folder_changes_the_dtype_alone(folder, tmp_path):
    assert convert.main([str(folder), str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    half, whole = load_pretrained(tmp_path / "half"), load_pretrained(folder)
    assert same(half.params, jax.tree.map(lambda x: x.astype("bfloat16"), whole.params))
    assert (half.config, half.tokenizer.to_json()) == (whole.config, whole.tokenizer.to_json())
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert convert.main([str(folder), str(tmp_path / "half")]) == 2
    assert np.isfinite(float(jax.tree.leaves(half.params)[0].astype("float32").sum()))


def test_a_run_of_its_own_is_written_as_llama_where_llama_computes_it(tmp_path, capsys):
    (tmp_path / "corpus.txt").write_text(CORPUS)
    keys = TRAIN | {"steps": 1, "run_dir": tmp_path / "run", "data.files": tmp_path / "corpus.txt"}
    keys |= {"model.d_model": 16, "model.num_layers": 1, "data.tokenizer": "bytes"}
    given = [f"{key}={json.dumps(v) if isinstance(v, bool) else v}" for key, v in keys.items()]
    assert cli.main(["finetune", *given]) == 0
    assert convert.main([str(tmp_path / "run"), str(tmp_path / "saved")]) == 0
    saved, run = load_pretrained(tmp_path / "saved"), load_run(tmp_path / "run")
    ids = jax.numpy.asarray([run.tokenizer.encode("fox")])
    assert same(saved.params, run.params) and saved.tokenizer.to_json() == run.tokenizer.to_json()
    assert (apply(saved.config, saved.params, ids).logits == apply(run.model, run.params, ids).logits).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "layernorm"}, "model.norm layernorm"),
        ({"mlp": "gelu"}, "model.blocks.0.feed_forward.activation gelu"),
        ({"mixers": (AttentionConfig(num_heads=4, mask=SlidingWindow(8)),)}, "model.blocks.0.mixer.mask"),
        ({"mixers": (AttentionConfig(num_heads=4, qk_norm="rms", rope=RoPE()),)}, "mixer.qk_norm_eps 1e-06"),
        ({"mixers": (AttentionConfig(num_heads=4),)}, "model.blocks.0.mixer.rope None"),
        ({"max_positions": 64}, "model.max_positions 64"),
        ({"logit_scale": 2.0}, "model.logit_scale 2.0"),
        ({"mixers": (make_config("gla", num_heads=4),)}, "no layer of kind gla"),
    ],
)
def test_what_config_json_cannot_say_is_named(change, message):
    model = ModelConfig(
        **{"vocab_size": 257, "mixers": (AttentionConfig(num_heads=4, rope=RoPE()),)} | change
    )
    with pytest.raises(ValueError, match=message):
        expressed(model)
