"""Text of tokens as they come: characters of several tokens, stop strings, linear cost."""

import numpy as np
import pytest

from attention_jax.generation.stop import StoppableText, TextDecoder
from attention_jax.tokenizers import ByteTokenizer, CharTokenizer

BYTES = ByteTokenizer()


class Words:
    """Tokens of words with a leading space, which is left out in front of a text, as SentencePiece does."""

    def decode(self, ids):
        return "".join(f" w{i}" if i % 3 else f"{i}" for i in ids).removeprefix(" ")


class Counting:
    """A tokenizer that counts the tokens that it decodes."""

    def __init__(self, inner):
        self.inner, self.count = inner, 0

    def decode(self, ids):
        self.count += len(ids)
        return self.inner.decode(ids)


def in_pieces(ids, rng, most):
    while len(ids):
        size = int(rng.integers(1, most + 1))
        yield ids[:size]
        ids = ids[size:]


TEXTS = {
    "ascii": BYTES.encode("plain text. " * 30),
    "utf-8": BYTES.encode("äöü € 😀 한국어 " * 20),
    "ends within a character": BYTES.encode("ab€😀")[:-2],
    "not utf-8": np.random.default_rng(0).integers(0, 256, 400),
    "half characters": np.array([0xE2, 0x82] * 150),
    "one lost byte over and over": np.array([0x80] * 300),
    "unknown ids": np.array([65, 300, 300, 300, 300, 66, 256, 0xE2, 256, 300]),
}


@pytest.mark.parametrize("name", TEXTS)
def test_the_pieces_are_the_text(name):
    ids, rng = TEXTS[name], np.random.default_rng(1)
    for most in (1, 2, 7, 100):
        tokenizer = Counting(BYTES)
        decoder = TextDecoder(tokenizer)
        pieces = [decoder.push(part) for part in in_pieces(ids, rng, most)]
        assert "".join(pieces) + decoder.finish() == BYTES.decode(ids)
        assert tokenizer.count <= 150 * (len(ids) + most)  # linear, the window included


def test_a_tokenizer_that_treats_the_first_token_in_its_own_way():
    ids = list(range(1, 60))
    for size in (1, 3, 8):
        decoder = TextDecoder(Words())
        parts = [decoder.push(ids[i : i + size]) for i in range(0, len(ids), size)]
        assert "".join(parts) + decoder.finish() == Words().decode(ids)


def test_no_half_character_is_shown():
    decoder = TextDecoder(BYTES)
    assert [decoder.push([token]) for token in BYTES.encode("a€b")] == ["a", "", "", "€", "b"]


def first_stop(text, stops):
    """(end, start, stop) of the stop string that ends first, of those the longest; by trying every place."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return end, end - len(stop), stop
    return None


def test_stop_strings_are_found_wherever_they_stand():
    """Random texts of few characters, of one to three bytes, against a search of every place."""
    rng, seen = np.random.default_rng(0), 0
    for _ in range(300):
        text = "".join(rng.choice(list("ab€"), 12))
        stops = tuple({"".join(rng.choice(list("ab€"), rng.integers(1, 5))) for _ in range(3)})
        out, shown, kept, stop = StoppableText(BYTES, stops), "", 0, None
        ids = BYTES.encode(text)
        for part in in_pieces(ids, rng, 5):
            piece = out.push(part)
            shown, kept, stop = shown + piece.text, kept + piece.tokens, piece.stop
            wanted = first_stop(text, stops)
            assert text.startswith(shown) and (wanted is None or len(shown) <= wanted[1])
            if stop is not None:
                break
        if wanted is None:
            assert (shown + out.finish(), kept, stop) == (text, len(ids), None)
        else:
            end, start, expected = wanted
            seen += 1
            assert (shown, kept, stop) == (text[:start], len(BYTES.encode(text[:end])), expected)
    assert 100 < seen < 300


def test_text_is_held_back_only_as_long_as_it_may_become_a_stop_string():
    tokenizer = CharTokenizer(sorted("STOPab"))
    out = StoppableText(tokenizer, ("STOP",))
    assert [out.push([i]).text for i in tokenizer.encode("aSTbSTO")] == ["a", "", "", "STb", "", "", ""]
    assert out.finish() == "STO"


def test_a_stop_string_within_the_first_tokens_is_text():
    for least, wanted in ((0, ("a", 2, "b")), (2, ("a", 2, "b")), (3, ("aba", 4, "b"))):
        piece = StoppableText(BYTES, ("b",), least).push(BYTES.encode("abab"))
        assert tuple(piece) == wanted
