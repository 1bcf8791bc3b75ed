"""What the catalogue tells of a mechanism; every class that is one carries an `about`."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class About:
    """A line of the catalogue.

    time, memory: of one head over T tokens, memory beside inputs and outputs, in the symbols of the class.
    cache: what decoding keeps per layer.
    """

    title: str
    paper: str
    time: str
    memory: str = "O(T)"
    cache: str = "all keys"
