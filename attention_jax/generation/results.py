"""What generation returns: `Completion` for a whole sample, `Increment` for a part of one."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

FinishReason = Literal["stop", "length", "error"]


@dataclasses.dataclass(frozen=True, eq=False)
class Increment:
    """The next part of one sample.

    request, sample: the index of the prompt, and of the sample of this prompt.
    tokens: int32 [T], without a stop id; with a stop string up to the token that completes it.
    text: the text that became certain, if a tokenizer is given: complete characters, and nothing of what may
      be the beginning of a stop string. The texts of a sample together are that of its `Completion`.
    logprobs: float32 [T], log-probabilities of the tokens; top_ids, top_logprobs: int32 and float32 [T, n],
      the n most probable ids in descending order. None unless `Sampling.logprobs` asks for them.
    finish_reason: None as long as the sample goes on, then "stop" (an id or a string), "length" (its most
      tokens) or "error".
    stop: the id or the string that ended it. error: the message of an error.
    drafts: with speculation, the drafts so far that the model has read, and those of them that were kept.
    """

    request: int
    sample: int
    tokens: np.ndarray
    text: str | None = None
    logprobs: np.ndarray | None = None
    top_ids: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None
    finish_reason: FinishReason | None = None
    stop: int | str | None = None
    error: str | None = None
    drafts: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Completion(Increment):
    """A whole sample: the fields of `Increment`, with all tokens and the whole text.

    `finish_reason` is set. After an error `tokens` holds those before it.
    """

    @staticmethod
    def of(parts: list[Increment]) -> Completion:
        """The sample of which these are all the parts, in order."""
        last = parts[-1]

        def joined(name: str):
            values = [getattr(part, name) for part in parts]
            return None if values[0] is None else np.concatenate(values)

        return Completion(
            request=last.request,
            sample=last.sample,
            tokens=joined("tokens"),
            text=None if last.text is None else "".join(part.text for part in parts),
            logprobs=joined("logprobs"),
            top_ids=joined("top_ids"),
            top_logprobs=joined("top_logprobs"),
            finish_reason=last.finish_reason,
            stop=last.stop,
            error=last.error,
            drafts=last.drafts,
        )
