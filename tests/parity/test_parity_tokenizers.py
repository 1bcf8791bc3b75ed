"""Chat templates and GGUF's tokenizers against transformers' own reading of them."""

import json
import random

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer

from attention_jax.tokenizers import ChatTemplate
from attention_jax.tokenizers.gguf import from_metadata
from tests.chat_templates import CONVERSATIONS, TEMPLATES, TOOLS

ATOMS = (
    "hello; world;The capital;don't;I'LL;\n;\n\n; ;  ;    ;\t;\r\n;😀;é;e\u0301;한국어;日本語;العربية;हिन्दी"
    ";\u200b;\ufeff;\u00a0;def f(x):\n    return x**2;{'a': [1,2]};<|im_end|>;<|im;http://a.b/c?d=e;...;!!!"
    ";\x00;ﬁ;İ;1;12;12345; 7;3.14;٣;½"
).split(";")


def texts(count):
    rng = random.Random(0)
    return ["".join(rng.choice(ATOMS) for _ in range(rng.randint(0, 12))) for _ in range(count)]


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_templates(name):
    vocabulary = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))
    peer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, bos_token="<s>", eos_token="</s>")
    ours = ChatTemplate(TEMPLATES[name], bos_token="<s>", eos_token="</s>")
    for conversation, messages in CONVERSATIONS.items():
        if name == "model turns" and conversation == "system":
            continue
        for options in ({}, {"tools": TOOLS}, {"enable_thinking": False}, {"add_generation_prompt": True}):
            given = {"chat_template": TEMPLATES[name], "tokenize": False} | options
            assert ours.render(messages, **options) == peer.apply_chat_template(messages, **given)


@pytest.fixture(scope="module")
def byte_level():
    """The tokens and merges of a byte-level vocabulary."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    trained.train_from_iterator(texts(3000), trainer)
    model = json.loads(trained.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [" ".join(pair) for pair in model["merges"]]


@pytest.mark.parametrize("pre", ["gpt-2", "qwen2", "llama-bpe", "tekken", "gpt-4o", "qwen35"])
def test_byte_level_vocabularies_of_gguf(byte_level, pre):
    tokens, merges = byte_level
    types = [3] * 3 + [1] * (len(tokens) - 3)
    metadata = {"model": "gpt2", "pre": pre, "tokens": tokens, "merges": merges, "token_type": types}
    ours = from_metadata({f"tokenizer.ggml.{key}": value for key, value in metadata.items()})
    theirs = {"tokenizer_type": "gpt2", "pre_tokenizer_type": pre, "tokens": tokens, "merges": merges}
    peer, _ = convert_gguf_tokenizer("llama", theirs | {"token_type": types})
    for text in texts(400):
        ids = ours.encode(text).tolist()
        assert ids == peer.encode(text, add_special_tokens=False).ids
        assert (
            ours.decode(ids, skip_special_tokens=False) == peer.decode(ids, skip_special_tokens=False) == text
        )
        assert ours.decode(ids) == peer.decode(ids)


def test_sentencepiece_vocabularies_of_gguf():
    """As transformers where it adds the space that SentencePiece adds: at the start, not before a space."""
    letters = sorted(set("".join(ATOMS)) - set("😀 ")) + ["▁"]
    words = "▁hello he ll llo hello ▁world wo rld ld world ▁w ▁▁ ▁▁▁▁ ▁he ret".split()
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words, *letters]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(words) + len(letters))]
    scores = [0.0] * 259 + [-float(i) for i in range(len(words) + len(letters))]
    metadata = {"model": "llama", "tokens": tokens, "scores": scores, "token_type": types}
    ours = from_metadata({f"tokenizer.ggml.{key}": value for key, value in metadata.items()})
    theirs = {"tokenizer_type": "llama", "tokens": tokens, "scores": scores, "token_type": types}
    peer, _ = convert_gguf_tokenizer("llama", theirs)
    compared = [text for text in texts(600) if not text.startswith(" ")]
    assert len(compared) > 300
    for text in compared:
        ids = ours.encode(text).tolist()
        assert ids == peer.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids) == text
