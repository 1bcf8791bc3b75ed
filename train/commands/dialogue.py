"""The messages of a chat, and the tokens that the model's chat template makes of them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from attention_jax.tokenizers import PublishedTokenizer

Messages = tuple[dict[str, str], ...]


class Dialogue:
    """A conversation. `messages` is all of it, answers included; whoever keeps the tuple can put it back.

    system: the message in front of the others, None for what the template itself writes there.
    """

    def __init__(self, tokenizer: PublishedTokenizer, system: str | None):
        self._tokenizer = tokenizer
        self._start: Messages = () if system is None else ({"role": "system", "content": system},)
        self.messages = self._start

    def reset(self) -> None:
        """Forget all messages but the system's."""
        self.messages = self._start

    def ask(self, text: str) -> np.ndarray:
        """Add a message of the user; the tokens of the whole conversation up to the answer's first one.

        The whole is rendered, because a template may write earlier turns in another way once there are later
        ones. ValueError for messages that the template refuses.
        """
        messages = (*self.messages, {"role": "user", "content": text})
        whole = self._tokenizer.chat_template.render(messages, add_generation_prompt=True)
        ids = self._tokenizer.encode(whole)
        self.messages = messages
        return ids

    def go_on(self) -> None:
        """ValueError where there is no answer that could go on."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise ValueError("there is no answer yet that could go on: write a message")

    def answer(self, text: str) -> None:
        """What the model has written is an answer, or goes on with the last one."""
        last = self.messages[-1] if self.messages else {"role": ""}
        if last["role"] == "assistant":
            self.messages = (*self.messages[:-1], last | {"content": last["content"] + text})
        else:
            self.messages = (*self.messages, {"role": "assistant", "content": text})

    def dumps(self) -> np.ndarray:
        """The messages as uint8 JSON, for a file of arrays."""
        return np.frombuffer(json.dumps(self.messages).encode(), np.uint8)

    def load(self, array: Any) -> None:
        """Go on after the messages that `dumps` described. ValueError for anything else."""
        try:
            found = json.loads(np.asarray(array, np.uint8).tobytes())
            self.messages = tuple({"role": str(m["role"]), "content": str(m["content"])} for m in found)
        except (ValueError, TypeError, KeyError):
            raise ValueError("its messages are damaged") from None


def common_length(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two texts begin with alike."""
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if len(differs) else n
