"""Where the turns of a conversation lie in its rendered text.

A template is a program, and nothing says where it puts a message. The place is found by rendering again:
with other content the text differs exactly where the content is, and what follows the content of a
conversation's last message is what the template writes behind a message of its role.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from attention_jax.tokenizers.chat import ChatTemplate, checked_messages

_PROBE = "\ue0f1"  # of the private use area: no text begins or ends with it


@dataclass(frozen=True)
class Turn:
    """A stretch of a rendered conversation, characters [start, end) of it.

    role: of the message; "assistant" for the generation prompt; None for text of the template itself, such as
    bos or a default system prompt. message: its index, None where there is none. content: the characters of
    its content, None where the template does not print it. tokens: ids [start, end), filled in by
    `encode_chat`.
    """

    role: str | None
    message: int | None
    start: int
    end: int
    content: tuple[int, int] | None = None
    tokens: tuple[int, int] | None = None

    def with_tokens(self, starts: np.ndarray) -> Turn:
        """The turn with the tokens that begin in it. starts: every token's first character, ascending."""
        first, last = np.searchsorted(starts, [self.start, self.end], "left")
        return replace(self, tokens=(int(first), int(last)))


class Turns(NamedTuple):
    """A rendered conversation and its turns, which cover the text in order."""

    text: str
    turns: list[Turn]


def turns_of(
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = False,
    **variables: Any,
) -> Turns:
    """The text that the template renders, and the turns in it.

    Raises: ValueError of one line for messages that the template refuses, and for those that have no place of
    their own in its text.
    """
    messages = checked_messages(messages)
    finder = _Finder(template, variables)
    text = template.render(messages, add_generation_prompt=add_generation_prompt, **variables)
    ended = template.render(messages, **variables) if add_generation_prompt else text
    if not text.startswith(ended):
        ended = text[: _common(text, ended)]
    contents = [finder.content(messages, i, ended) for i in range(len(messages))]
    turns: list[Turn] = []
    place = finder.preamble(messages, contents[0], ended) if messages else len(ended)
    if place:
        turns.append(Turn(None, None, 0, place))
    for index, message in enumerate(messages):
        end = len(ended)
        if index + 1 < len(messages):
            end = finder.end(messages, index, contents, ended)
        if end < place:
            raise ValueError(
                f"chat template: message {index} ({message['role']}) has no place of its own in the text"
            )
        turns.append(Turn(message["role"], index, place, end, contents[index]))
        place = end
    if len(text) > place:
        turns.append(Turn("assistant", None, place, len(text)))
    return Turns(text, turns)


class _Finder:
    """Renders conversations like the one that is asked about."""

    def __init__(self, template: ChatTemplate, variables: Mapping[str, Any]):
        self._template, self._variables = template, variables

    def content(self, messages: list[dict[str, Any]], index: int, text: str) -> tuple[int, int] | None:
        """The characters of a message's content; None where the template prints none."""
        content = messages[index].get("content")
        if content is None:
            return None
        probe: Any = _PROBE
        if isinstance(content, list):
            probe = [part | {"text": _PROBE} if "text" in part else part for part in content]
        other = self._render(
            [*messages[:index], messages[index] | {"content": probe}, *messages[index + 1 :]]
        )
        if other is None or other == text:
            return None
        start = _common(text, other)
        return start, len(text) - _common(text[start:][::-1], other[start:][::-1])

    def end(self, messages: list[dict[str, Any]], index: int, contents: Sequence, text: str) -> int:
        """Where a message's turn ends and the next one begins; -1 where that is not known."""
        own, following = contents[index], contents[index + 1]
        alone = self._render(messages[: index + 1])
        if alone and text.startswith(alone) and len(alone) >= (own[1] if own else 0):
            return len(alone)
        inside = self.content(messages[: index + 1], index, alone) if alone and own else None
        if inside is None:  # the message alone is no conversation: its turn goes on to the next content
            return following[0] if following else -1
        behind = text[own[1] : following[0] if following else None]
        return own[1] + _common(behind, alone[inside[1] :])

    def preamble(self, messages: list[dict[str, Any]], first: tuple[int, int] | None, text: str) -> int:
        """How many characters the template writes before the first message."""
        bos = self._template.bos_token
        plain = len(bos) if bos and text.startswith(bos) else 0
        if first is None or messages[0]["role"] == "system":
            return plain
        # The head of a message, from a conversation in which it is the third: what precedes it is known
        # there.
        between = {"role": "user" if messages[0]["role"] == "assistant" else "assistant", "content": "Yes."}
        before = self._render([messages[0], between])
        rendered = self._render([messages[0], between, messages[0] | {"content": _PROBE}])
        if before is None or rendered is None or not rendered.startswith(before):
            return plain
        head = rendered[len(before) :].partition(_PROBE)[0]
        return first[0] - len(head) if text[: first[0]].endswith(head) else plain

    def _render(self, messages: list[dict[str, Any]]) -> str | None:
        try:
            return self._template.render(messages, **self._variables)
        except ValueError:
            return None


def _common(a: str, b: str) -> int:
    """The length of the longest common prefix."""
    return len(os.path.commonprefix([a, b]))
