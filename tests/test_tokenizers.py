"""Tokenizers without a file: bytes and characters; streams of ids; what is refused."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_jax import tokenizers

unicode_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@settings(max_examples=100, deadline=None)
@given(unicode_text, unicode_text)
def test_text_comes_back_from_its_tokens(text, more):
    bytes_ = tokenizers.ByteTokenizer()
    ids = bytes_.encode(text)
    assert ids.dtype == np.int32 and ids.tolist() == list(text.encode())
    assert bytes_.decode(ids) == text and bytes_.raw_bytes(ids) == text.encode()
    marked = np.concatenate([[256], ids, [256], bytes_.encode(more), [256]]).astype(np.uint16)
    assert bytes_.decode(marked) == text + more
    assert bytes_.raw_bytes(marked) == (text + more).encode()
    if text:
        chars = tokenizers.CharTokenizer.of([text, more])
        assert chars.decode(chars.encode(more + text)) == more + text
        assert chars.raw_bytes(chars.encode(text)) == text.encode()
        assert list(chars.characters) == sorted(set(text + more))
        again = tokenizers.from_json(json.loads(tokenizers.dumps(chars)))
        assert again.characters == chars.characters


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 300) | st.sampled_from([0xE2, 0x82, 0xAC, 0xC3, 256]), max_size=12))
def test_a_stream_of_ids_gives_the_text_of_all_of_them(ids):
    tokenizer = tokenizers.ByteTokenizer()
    stream = tokenizers.StreamDecoder(tokenizer)
    pieces = [stream.push(i) for i in ids] + [stream.finish()]
    assert "".join(pieces) == tokenizer.decode(ids)
    # The same, a stretch of real bytes at a time.
    expected, stretch = "", b""
    for i in [*ids, 256]:
        if i < 256:
            stretch += bytes([i])
            continue
        expected += stretch.decode("utf-8", "replace") + ("\ufffd" if i > 256 else "")
        stretch = b""
    assert "".join(pieces) == expected


def test_a_character_of_several_bytes_streams_when_it_is_whole():
    stream = tokenizers.StreamDecoder(tokenizers.ByteTokenizer())
    assert [stream.push(i) for i in "a€b".encode()] == ["a", "", "", "€", "b"]
    assert stream.push(0xE2) == "" and stream.finish() == "\ufffd" and stream.finish() == ""


def test_what_a_tokenizer_refuses(tmp_path):
    chars = tokenizers.CharTokenizer.of(["hello"])
    with pytest.raises(ValueError, match="character 'z' at 2 is not among the 4 characters"):
        chars.encode("hezo")
    with pytest.raises(ValueError, match=r"character '\\udc80' at 0"):
        chars.encode("\udc80")
    with pytest.raises(ValueError, match="character 1 of the text is not valid Unicode"):
        tokenizers.ByteTokenizer().encode("a\udc80")
    for tokenizer in (chars, tokenizers.ByteTokenizer()):
        with pytest.raises(ValueError, match="token id -1 is negative"):
            tokenizer.decode([1, -1])
    assert chars.decode([1, 4]) == "h\ufffd"
    with pytest.raises(ValueError, match="cannot read the tokenizer .*none.json: No such file"):
        tokenizers.load(tmp_path / "none.json")
    lists = [f'{{"kind": "chars", "characters": {value}}}' for value in ('["b", "a"]', '["ab"]', "[]", "[1]")]
    for text in ("{", '{"kind": "words"}', "[]", "\xff", *lists):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match="the tokenizer .*bad.json is damaged"):
            tokenizers.load(tmp_path / "bad.json")
