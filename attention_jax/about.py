"""The catalogue entry of a mechanism, stored in the class attribute `about`."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class About:
    """The catalogue entry of one mechanism.

    time, memory: asymptotic cost of one head over T tokens, in the symbols of the class; memory excludes
      inputs and outputs.
    cache: the decoding state of one layer.
    """

    title: str
    paper: str
    time: str
    memory: str = "O(T)"
    cache: str = "all keys"
