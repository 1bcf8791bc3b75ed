"""Text of tokens as they come, and the stop strings that end it.

A character of several bytes may take several tokens, and a stop string may begin in one token and end in
another. Text that later tokens could still change, or that could become part of a stop string, is held back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from attention_jax.tokenizers.base import Decodes

_REPLACED = "\ufffd"  # what tokenizers put in the place of bytes that are not (yet) UTF-8
_OPEN = 3  # an incomplete character of UTF-8 has at most 3 bytes, each of which may show as one such
_WINDOW = 64  # tokens that are decoded again, beside those of one call
_TRIES = 16


class TextDecoder:
    """Decodes tokens as they come, in linear time: the pieces together are `tokenizer.decode` of all tokens.

    Only the last tokens are decoded again, behind some tokens of context, since a tokenizer may treat the
    first token of a text in its own way.
    """

    def __init__(self, tokenizer: Decodes):
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # those that may be decoded again
        self._clean = 0  # how many of them stand before the last place without an incomplete character
        self._shown = 0  # characters of their text that were returned

    def push(self, ids: Sequence[int]) -> str:
        """The text that these ids complete."""
        self._ids += map(int, ids)
        text = self._tokenizer.decode(self._ids)
        open_ = len(text) - len(text.rstrip(_REPLACED))
        end = len(text) - min(open_, _OPEN)
        new, self._shown = text[self._shown : end], max(self._shown, end)
        if not open_:
            if self._clean:
                del self._ids[: self._clean]
                self._shown = len(self._tokenizer.decode(self._ids))
            self._clean = len(self._ids)
        elif len(self._ids) > _WINDOW:
            self._cut(text)
        return new

    def finish(self) -> str:
        """The rest of the text, where it ends within a character."""
        return self._tokenizer.decode(self._ids)[self._shown :]

    def _cut(self, text: str) -> None:
        """Forget tokens of bytes that are no text, up to a place that both sides leave as they are."""
        for place in range(len(self._ids) - 1, max(0, len(self._ids) - _TRIES), -1):
            before, after = (self._tokenizer.decode(ids) for ids in (self._ids[:place], self._ids[place:]))
            if before + after == text and len(before) <= self._shown:
                del self._ids[:place]
                self._shown -= len(before)
                self._clean = 0
                return


class Text(NamedTuple):
    """Text that is certain, how many of the tokens given belong to it, and the stop string that ended it."""

    text: str
    tokens: int
    stop: str | None


class StoppableText:
    """The text of one request, up to the first of its stop strings.

    Of several stop strings the one that ends first counts, and of those that end together the longest. One
    that ends within the first `min_tokens` - 1 tokens is ordinary text.
    """

    def __init__(self, tokenizer: Decodes, stop: tuple[str, ...] = (), min_tokens: int = 0):
        self._decoder, self._stop, self._min_tokens = TextDecoder(tokenizer), stop, min_tokens
        self._held, self._tokens = "", 0

    def push(self, ids: Sequence[int]) -> Text:
        """The text that these ids complete, without a suffix that may become a stop string."""
        if not self._stop:
            return Text(self._decoder.push(ids), len(ids), None)
        found = ""
        for count, token in enumerate(ids, 1):  # one by one: to know the token that completes a stop string
            held, new = self._held, self._decoder.push([token])
            text, self._tokens = held + new, self._tokens + 1
            if new and self._tokens >= self._min_tokens and (match := self._match(text, len(held))):
                self._held = ""
                return Text(found + text[: match[0]], count, match[1])
            self._held = text[len(text) - self._open(text) :]
            found += text[: len(text) - len(self._held)]
        return Text(found, len(ids), None)

    def finish(self) -> str:
        """The rest of a text that no stop string ended."""
        return self._held + self._decoder.finish()

    def _match(self, text: str, old: int) -> tuple[int, str] | None:
        """Start and text of the stop string that ends first, behind the first `old` characters."""
        ends = []
        for stop in self._stop:
            if (start := text.find(stop, max(0, old - len(stop) + 1))) >= 0:
                ends.append((start + len(stop), start, stop))
        if not ends:
            return None
        _, start, stop = min(ends)  # of one end the smallest start: the longest
        return start, stop

    def _open(self, text: str) -> int:
        """The length of the longest suffix with which a stop string begins."""
        longest = 0
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:size]):
                    longest = size
                    break
        return longest
