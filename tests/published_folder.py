"""A tiny published model with a tokenizer and a chat template, written where a test wants it."""

import json

import jax
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from attention_jax.pretrained import family_of
from attention_jax.pretrained.description import Description
from attention_jax.pretrained.files import write_safetensors
from attention_jax.pretrained.load import saved_specs, saved_tensors
from attention_jax.pretrained.models import read_config
from attention_jax.tokenizers.hugging_face import byte_alphabet
from tests.params import random_params

SPECIAL = ("<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
DESCRIPTION = {
    "model_type": "llama", "vocab_size": 263, "hidden_size": 8, "intermediate_size": 12,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5,
    "torch_dtype": "float32", "tie_word_embeddings": False, "max_position_embeddings": 512,
}  # fmt: skip


def write_folder(folder, *, template=TEMPLATE, tokenizer=True, **changes):
    """The folder, with config.json, weights and the files of a tokenizer of bytes."""
    folder.mkdir(parents=True)
    description = DESCRIPTION | changes
    family = family_of("llama")
    config = read_config(family, Description(description))
    params = random_params(config)
    write_safetensors(folder, saved_specs(family, config, params), saved_tensors(family, config, params))
    (folder / "config.json").write_text(json.dumps(description))
    if tokenizer:
        _write_tokenizer(folder, template)
    return folder


def _write_tokenizer(folder, template):
    backend = Tokenizer(models.BPE(byte_alphabet(), [("a", "b")][:0]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    backend.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    if template is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 260]}))


def same(a, b):
    """Whether two trees of arrays are the same bit for bit."""
    return jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and bool((x == y).all()), a, b))
