"""Tokenizers of published models, built here in small: ids, text, special tokens, streams, damaged files."""

import base64
import io
import json
import random

import gguf
import numpy as np
import pytest
import regex
import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from attention_jax.generation.stop import TextDecoder
from attention_jax.tokenizers import StreamDecoder, dumps, from_json, load, load_tokenizer
from attention_jax.tokenizers import gguf as gguf_module
from attention_jax.tokenizers.splits import SPLITS, pre_tokenizer
from attention_jax.tokenizers.tiktoken_ranks import TiktokenTokenizer, published_special_tokens, read_ranks
from tests.chat_templates import CHATML, message

LINES = [
    "The quick brown fox jumps over the lazy dog.",
    "def f(x):\n    return x ** 2  # é 😀",
    "1 22 333 4444",
] * 3
SPECIAL = ["<|end|>", "<|im_start|>", "<|im_end|>"]
TEXTS = [
    "",
    "The fox",
    " two  spaces",
    "é😀é",
    "a<|im_end|>b",
    "<|im_start|>user\nx<|im_end|>\n",
    "12 333\n\n\tx",
    "\x00\u200b",
]


def byte_level():
    """A byte-level `tokenizers.Tokenizer` with special tokens 0, 1, 2 and an added one that is text."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(
        LINES,
        trainers.BpeTrainer(
            vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        ),
    )
    made.decoder = decoders.ByteLevel()
    made.add_tokens([AddedToken("<think>", normalized=False)])
    return made


MADE = byte_level()


def write_folder(folder, **files):
    """A model's folder: tokenizer.json, and the other JSON files that are given."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(MADE.to_str())
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def sentencepiece_model():
    out, lines = io.BytesIO(), iter("\n".join(LINES).split("\n"))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=out, vocab_size=330, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False,
        num_threads=1, minloglevel=2,
    )  # fmt: skip
    return out.getvalue()


SP_MODEL = sentencepiece_model()


def write_gguf(path, model, tokens, types, **more):
    writer = gguf.GGUFWriter(path, more.pop("arch", "llama"))
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for name, value in more.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def write_byte_level_gguf(path, pre="gpt-2", **more):
    model = json.loads(MADE.to_str())["model"]
    tokens = [*sorted(model["vocab"], key=model["vocab"].get), "<think>"]
    types = [3, 3, 3, *[1] * (len(tokens) - 4), 4]
    merges = [" ".join(pair) for pair in model["merges"]]
    more = {"eos_token_id": 0, "eot_token_id": 2, "chat_template": CHATML} | more
    return write_gguf(path, "gpt2", tokens, types, tokenizer_pre=pre, token_merges=merges, **more)


def write_sentencepiece_gguf(path, **more):
    read = sentencepiece.SentencePieceProcessor(model_proto=SP_MODEL)
    ids = range(read.get_piece_size())
    types = [
        2 if read.is_unknown(i) else 3 if read.is_control(i) else 6 if read.is_byte(i) else 1 for i in ids
    ]
    more = {"token_scores": [read.get_score(i) for i in ids], "bos_token_id": 1, "eos_token_id": 2} | more
    return write_gguf(path, "llama", [read.id_to_piece(i) for i in ids], types, **more)


def tiny_ranks():
    return {bytes([byte]): byte for byte in range(256)} | {b"th": 256, b"the": 257, b" the": 258}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """One tokenizer of every kind."""
    folder = tmp_path_factory.mktemp("kinds")
    (folder / "sp").mkdir()
    (folder / "sp" / "tokenizer.model").write_bytes(SP_MODEL)
    names = {"<|im_start|>": 260, "<|im_end|>": 261}
    return {
        "tokenizer.json": load_tokenizer(write_folder(folder / "hf")),
        "gguf gpt2": load_tokenizer(write_byte_level_gguf(folder / "bytes.gguf")),
        "gguf llama": load_tokenizer(write_sentencepiece_gguf(folder / "pieces.gguf")),
        "sentencepiece": load_tokenizer(folder / "sp"),
        "tiktoken": TiktokenTokenizer(tiny_ranks(), r"\w+|\s*\w+|\W", names),
    }


KINDS = ["tokenizer.json", "gguf gpt2", "gguf llama", "sentencepiece", "tiktoken"]


@pytest.mark.parametrize("kind", KINDS)
def test_text_comes_back(kinds, kind):
    made = kinds[kind]
    for text in TEXTS:
        ids = made.encode(text)
        assert ids.dtype == np.int32 and made.decode(ids, skip_special_tokens=False) == text
        plain = made.encode(text, parse_special=False)
        assert made.decode(plain) == text and not set(plain.tolist()) & made.pieces.special
        assert made.raw_bytes(plain) == text.encode()
    again = from_json(json.loads(dumps(made)))
    assert [again.encode(text).tolist() for text in TEXTS] == [made.encode(text).tolist() for text in TEXTS]
    assert again.special == made.special and again.vocab_size == made.vocab_size


@pytest.mark.parametrize("kind", KINDS)
def test_streams_of_ids(kinds, kind):
    made, rng = kinds[kind], random.Random(0)
    for _ in range(150):
        ids = [rng.randrange(made.vocab_size + 2) for _ in range(rng.randint(0, 15))]
        for skip in (True, False):
            stream = StreamDecoder(made, skip_special_tokens=skip)
            parts = [stream.push(i) for i in ids] + [stream.finish()]
            assert "".join(parts) == made.decode(ids, skip_special_tokens=skip)
        decoder = TextDecoder(made)
        assert "".join([decoder.push([i]) for i in ids]) + decoder.finish() == made.decode(ids)
    stream, ids = StreamDecoder(made), made.encode("a€b").tolist()
    parts = [stream.push(i) for i in ids]
    assert "".join(parts) == "a€b" and "\ufffd" not in "".join(parts) and parts[-1] == "b"
    with pytest.raises(ValueError, match="token id -1 is negative"):
        made.decode([-1])
    with pytest.raises(ValueError, match=f"token id {made.vocab_size} is outside"):
        made.raw_bytes(np.array([made.vocab_size]))
    with pytest.raises(ValueError, match="character 1 of the text is not valid Unicode"):
        made.encode("a\ud800")


@pytest.mark.parametrize("kind", KINDS)
def test_the_place_of_tokens(kinds, kind):
    for text in TEXTS:
        ids, spans = kinds[kind].offsets(text)
        assert ids.tolist() == kinds[kind].encode(text).tolist() and len(spans) == len(ids)
        covered = {i for start, end in spans for i in range(start, end)}
        assert covered >= {i for i, c in enumerate(text) if c != " "} and covered <= set(range(len(text)))


def test_ids_are_those_of_the_packages(kinds):
    pieces = sentencepiece.SentencePieceProcessor(model_proto=SP_MODEL)
    for text in TEXTS:
        assert (
            kinds["tokenizer.json"].encode(text).tolist() == MADE.encode(text, add_special_tokens=False).ids
        )
        assert kinds["gguf gpt2"].encode(text).tolist() == kinds["tokenizer.json"].encode(text).tolist()
        for kind in ("sentencepiece", "gguf llama"):
            assert kinds[kind].encode(text).tolist() == pieces.encode(text)
    assert kinds["tiktoken"].encode("the the<|im_end|>").tolist() == [257, 258, 261]
    # bos and eos in a text, which the package itself reads as text; a space precedes what follows them.
    ids = [1, *pieces.encode("The"), 2, *pieces.encode(" fox")]
    for kind in ("sentencepiece", "gguf llama"):
        assert kinds[kind].encode("<s>The</s> fox").tolist() == ids
        assert kinds[kind].encode("The", add_special_tokens=True).tolist() == [1, *pieces.encode("The")]


def test_special_tokens_of_a_folder(tmp_path):
    config = {"bos_token": {"content": "<|im_start|>"}, "eos_token": "<|im_end|>", "chat_template": CHATML}
    config["added_tokens_decoder"] = {str(MADE.get_vocab_size()): {"content": "<tool>", "special": True}}
    generation = {"eos_token_id": [2, 0], "bos_token_id": 1}
    made = load_tokenizer(write_folder(tmp_path, tokenizer_config=config, generation_config=generation))
    assert (made.bos_id, made.eos_id, made.stop_ids, made.end_of_document) == (1, 2, (2, 0), 2)
    assert (
        made.encode("<tool>").tolist() == [MADE.get_vocab_size()]
        and made.decode([MADE.get_vocab_size()]) == ""
    )
    assert made.decode([made.token_id("<think>")]) == "<think>"  # added, but text
    assert made.encode("x", add_special_tokens=True).tolist() == made.encode("x").tolist()
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    write_folder(
        tmp_path, tokenizer_config={"add_bos_token": True}, special_tokens_map={"bos_token": "<|end|>"}
    )
    made = load_tokenizer(tmp_path)
    assert made.encode("x", add_special_tokens=True).tolist() == [0, *made.encode("x")] and made.stop_ids == (
        2,
        0,
    )
    chat = made.encode_chat([message("user", "a 😀 b")])
    assert chat.text == "<|end|>a 😀 b" and chat.ids.tolist() == made.encode(chat.text).tolist()
    assert [turn.role for turn in chat.turns] == [None, "user"]
    assert [made.decode(chat.ids[slice(*t.tokens)], skip_special_tokens=False) for t in chat.turns] == [
        "<|end|>",
        "a 😀 b",
    ]


def test_options_saved_in_a_file_do_not_change_ids(tmp_path):
    cut = Tokenizer.from_str(MADE.to_str())
    cut.enable_truncation(2)
    cut.enable_padding(length=50)
    cut.post_processor = processors.TemplateProcessing("<|end|> $A", special_tokens=[("<|end|>", 0)])
    (tmp_path / "tokenizer.json").write_text(cut.to_str())
    made, text = load_tokenizer(tmp_path), "The quick brown fox"
    assert made.encode(text).tolist() == MADE.encode(text).ids and len(made.encode(text)) > 2
    assert made.encode(text, add_special_tokens=True).tolist() == [0, *MADE.encode(text).ids]


def test_what_a_gguf_file_says(tmp_path):
    made = load_tokenizer(write_byte_level_gguf(tmp_path / "a.gguf"))
    assert (made.bos_id, made.eos_id, made.stop_ids) == (None, 0, (0, 2))
    assert made.encode_chat([message("user", "x")]).text.endswith("<|im_start|>assistant\n")
    with pytest.raises(ValueError, match="no chat template"):
        load_tokenizer(write_sentencepiece_gguf(tmp_path / "b.gguf")).encode_chat([message("user", "x")])
    without = load_tokenizer(write_sentencepiece_gguf(tmp_path / "c.gguf", add_space_prefix=False))
    assert without.decode(without.encode(" fox")) == " fox"
    assert without.encode("fox").tolist() != load_tokenizer(tmp_path / "b.gguf").encode("fox").tolist()
    # Digits are words of their own, so that spaces in front of them stay together.
    one, each = (
        load_tokenizer(write_byte_level_gguf(tmp_path / "d.gguf", pre)) for pre in ("gpt-2", "smollm")
    )
    assert [len(made.encode("x    1")) for made in (one, each)] == [5, 4]


TEXT_TO_SPLIT = (
    "Don't stop, I'LL go! naïve Ünïcode HTTPServer 한국어 x=1234567;\r\n\r\n\tint a[3] += $5.00 ... ??\n"
    "   end  e\u0301 १२३/"
)


@pytest.mark.parametrize("name", ["gpt-2", "llama-bpe", "qwen2", "qwen35", "tekken", "gpt-4o"])
def test_words_are_those_of_the_expression(name):
    [expression] = SPLITS[name].expressions
    unspelled = pre_tokenizers.Sequence([pre_tokenizer(SPLITS[name])])
    words = [TEXT_TO_SPLIT[start:end] for _, (start, end) in unspelled.pre_tokenize_str(TEXT_TO_SPLIT)]
    assert words == regex.findall(expression, TEXT_TO_SPLIT) and "".join(words) == TEXT_TO_SPLIT


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("smollm", "a 12", ["a", " ", "1", "2"]),
        ("llama-bpe", "12345 I'LL", ["123", "45", " I", "'LL"]),
        ("qwen2", "12 I'm", ["1", "2", " I", "'m"]),
        ("gpt-4o", "HTTPServer's", ["HTTPServer's"]),
        ("tekken", "fooBar", ["foo", "Bar"]),
        ("deepseek-v3", "日本 1234", ["日本", " ", "123", "4"]),
        ("default", "a+b 12345", ["a", "+", "b", " ", "123", "45"]),
        ("falcon", "a.b 12345", ["a", ".", "b", " ", "123", "45"]),
    ],
)
def test_words_of_each_rule(name, text, words):
    found = pre_tokenizer(SPLITS[name]).pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in found] == words


def test_ranks_of_llama(tmp_path):
    ends = {
        128_000: {"<|eot_id|>": 128009, "<|reserved_special_token_245|>": 128255},
        200_000: {"<|eot|>": 200008, "<|patch|>": 200092, "<|reserved_special_token_903|>": 202047},
    }
    for count, names in ends.items():
        _, published = published_special_tokens(count)
        assert len(published) == len(set(published)) == (256 if count == 128_000 else 2048)
        assert [published[i - count] for i in names.values()] == list(names)
    lines = [base64.b64encode(raw).decode() + f" {i}\n" for raw, i in tiny_ranks().items()]
    assert read_ranks("".join(lines).encode()) == tiny_ranks()
    (tmp_path / "tokenizer.model").write_text("".join(lines))
    with pytest.raises(ValueError, match="its 259 ranks are of no known model"):
        load_tokenizer(tmp_path)
    for wrong, error in (
        ("AA", "line 1 is not"),
        ("A@== 1", "line 1 is not"),
        ("AA== 1\nAA== 2", "line 2: its token"),
    ):
        with pytest.raises(ValueError, match=error):
            read_ranks(wrong.encode())
    with pytest.raises(ValueError, match="byte 0 has no rank"):
        TiktokenTokenizer({b"a": 0}, ".", {})
    with pytest.raises(ValueError, match="same id"):
        TiktokenTokenizer(tiny_ranks(), ".", {"<s>": 3})


def cut(raw):
    return raw[: len(raw) // 2]


def claim(raw):
    """More tokens than any file has."""
    place = raw.index(b"tokenizer.ggml.tokens") + 21 + 4 + 4
    return raw[:place] + (2**60).to_bytes(8, "little") + raw[place + 8 :]


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (cut, "claims .* bytes are left"),
        (claim, "claims 1152921504606846976 strings in 'tokenizer.ggml.tokens'"),
        (lambda raw: b"", "not a GGUF file"),
        (lambda raw: b"GGUF", "not a GGUF file"),
        (lambda raw: raw[:4] + b"\x09" + raw[5:], "GGUF version 9, supported are 2 and 3"),
        (lambda raw: raw[:16] + b"\xff" * 8 + raw[24:], "claims 18446744073709551615 metadata entries"),
        (lambda raw: raw.replace(b"gpt-2", b"gpt-3"), "'gpt-3' .* is not implemented; did you mean gpt-2"),
        (lambda raw: raw.replace(b"gpt-2", b"qu\xffen"), "is not UTF-8"),
        (lambda raw: raw.replace(b"ggml.model", b"ggml.modem"), "it has no tokenizer.ggml.model"),
        (lambda raw: raw.replace(b"ggml.merges", b"ggml.mergez"), "it has no tokenizer.ggml.merges"),
        (lambda raw: raw.replace(b"ggml.pre", b"ggml.prf"), "does not say how text is split"),
    ],
)  # fmt: skip
def test_damaged_gguf_files(tmp_path, damage, error):
    path = write_byte_level_gguf(tmp_path / "model.gguf")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=error) as caught:
        load_tokenizer(path)
    assert str(caught.value).startswith(str(tmp_path)) and len(str(caught.value).splitlines()) == 1


def test_gguf_files_that_do_not_fit(tmp_path):
    base = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "a"],
        "tokenizer.ggml.scores": [0, 1],
    }
    gguf_module.from_metadata(base)
    for change, error in (
        ({"model": "t5"}, "the tokenizer 't5' .* is not implemented"),
        ({"tokens": ["a", "a"]}, "its tokens 0 and 1 are both 'a'"),
        ({"tokens": [1]}, "its tokenizer.ggml.tokens has a wrong type"),
        ({"token_type": [1]}, "it has 2 tokens, but 1 token types"),
        ({"scores": [0]}, "it has 2 tokens, but 1 scores"),
        ({"eos_token_id": 2}, "eos_token_id 2 is none of its 2 tokens"),
        ({"model": "gpt2", "pre": "gpt-2", "merges": ["a b c"]}, "its merge 'a b c' is not a pair"),
        ({"model": "gpt2", "pre": "gpt-2", "merges": ["a b"]}, "its merges and tokens do not fit"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=error):
            gguf_module.from_metadata(
                base | {f"tokenizer.ggml.{key}": value for key, value in change.items()}
            )


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("tokenizer.json", "{", "it is damaged"),
        ("tokenizer.json", "[" * 100_000, "none of tokenizer.json"),
        ("tokenizer.json", '{"a":' * 100_000, "it is damaged"),
        ("tokenizer.json", '{"version": "1.0"}', "it is no tokenizer.json"),
        ("tokenizer.json", '{"kind": "pickle"}', "it does not describe a tokenizer"),
        ("tokenizer.json", "\x80\x04pickle", "none of tokenizer.json"),
        ("tokenizer_config.json", '{"bos_token": "<none>"}', "bos_token '<none>' is no token"),
        ("tokenizer_config.json", "[]", "it is no JSON object"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"-1": {"content": "x"}}}', "has no token '-1'"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"7": {"content": "new"}}}', "'new' has id 321"),
        ("tokenizer_config.json", '{"chat_template": 3}', "its chat_template is not text"),
        ("generation_config.json", '{"eos_token_id": "2"}', "eos_token_id 2 is no token id"),
        ("generation_config.json", '{"eos_token_id": 5000}', "its eos token 5000 is outside"),
    ],
)  # fmt: skip
def test_damaged_folders(tmp_path, name, content, error):
    write_folder(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=error) as caught:
        load_tokenizer(tmp_path)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 320


def test_paths_without_a_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="none: no such folder or file"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(ValueError, match="it holds no tokenizer.json, tokenizer.model or .gguf file"):
        load_tokenizer(tmp_path)
    for name in "ab":
        (tmp_path / f"{name}.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="it holds 2 .gguf files: name one of them, such as a.gguf"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\xff\xff")
    with pytest.raises(ValueError, match="it is no SentencePiece model"):
        load_tokenizer(tmp_path)


def test_decoders_that_depend_on_neighbours_are_refused(tmp_path):
    made = Tokenizer.from_str(MADE.to_str())
    made.decoder = decoders.WordPiece()
    (tmp_path / "tokenizer.json").write_text(made.to_str())
    with pytest.raises(ValueError, match="its decoder WordPiece is not supported"):
        load_tokenizer(tmp_path)


def test_a_runs_tokenizer(tmp_path, kinds):
    (tmp_path / "tokenizer.json").write_text('{"kind": "bytes"}')
    assert load_tokenizer(tmp_path).kind == load(tmp_path / "tokenizer.json").kind == "bytes"
    (tmp_path / "tokenizer.json").write_text(dumps(kinds["sentencepiece"]))
    ids = kinds["sentencepiece"].encode("The fox").tolist()
    assert load(tmp_path / "tokenizer.json").encode("The fox").tolist() == ids
    with pytest.raises(ValueError, match="it does not describe a tokenizer"):
        from_json({"kind": "sentencepiece", "model": "!"})
