"""A published model's config.json, of which every key must be understood."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from attention_jax.hints import near, quoted

_MISSING = object()
_MOST_LAYERS = 10_000

# Keys that say nothing about the function from tokens to logits.
_WITHOUT_MEANING = frozenset(
    """
    architectures transformers_version dtype torch_dtype _name_or_path use_cache initializer_range
    pad_token_id bos_token_id eos_token_id sep_token_id decoder_start_token_id output_hidden_states
    output_attentions return_dict chunk_size_feed_forward id2label label2id problem_type pretraining_tp
    tokenizer_class auto_map model_type is_decoder _attn_implementation_autoset use_return_dict
    task_specific_params max_position_embeddings tie_encoder_decoder cache_implementation unsloth_version
    unsloth_fixed """.split()
)
# Keys that must have this value, where they are given.
_ONLY = {"is_encoder_decoder": False, "add_cross_attention": False, "quantization_config": None}


class Description:
    """The keys and values of a config.json. Each method reads one key; `finish` refuses those that were not
    read.

    where: the file, for messages. length: the longest text that the model is loaded for, for the options that
    depend on it. A null stands for an absent key.
    """

    def __init__(self, values: Mapping[str, Any], where: str = "config.json", *, length: int | None = None):
        if not isinstance(values, Mapping):
            raise ValueError(f"{where}: a description must be a mapping of keys, got {type(values).__name__}")
        self.values, self.where, self.length = dict(values), where, length
        self._read: set[str] = set()

    @property
    def model_type(self) -> str:
        """The name of the architecture."""
        return self.word("model_type")

    def get(self, key: str, default: Any = _MISSING) -> Any:
        """The value of a key; ValueError where it is absent and no default is given."""
        self._read.add(key)
        value = self.values.get(key)
        if value is not None:
            return value
        if default is _MISSING:
            raise ValueError(f"{self.where}: {key} is missing")
        return default

    def integer(self, key: str, default: Any = _MISSING) -> int:
        """A whole number from 0 to 2^31 - 1."""
        value = self.get(key, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
            raise self._wrong(key, value, "a whole number from 0 to 2^31 - 1")
        return value

    def layers(self, key: str = "num_hidden_layers") -> int:
        """A number of layers, of which a list can be made."""
        count = self.integer(key)
        if not 1 <= count <= _MOST_LAYERS:
            raise self._wrong(key, count, f"from 1 to {_MOST_LAYERS}")
        return count

    def same_integer(self, *keys: str) -> int:
        """The whole number that goes by any of several names; ValueError where two of them differ."""
        given = {key: self.integer(key, None) for key in keys}
        values = {value for value in given.values() if value is not None}
        if len(values) > 1:
            raise ValueError(f"{self.where}: {' and '.join(keys)} mean the same, got {given}")
        return values.pop() if values else self.integer(keys[0])

    def number(self, key: str, default: Any = _MISSING) -> float:
        """A finite number."""
        value = self.get(key, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self._wrong(key, value, "a finite number")
        return value

    def flag(self, key: str, default: Any = _MISSING) -> bool:
        """true or false."""
        value = self.get(key, default)
        if value is not default and not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def word(self, key: str, default: Any = _MISSING) -> str:
        """A text."""
        value = self.get(key, default)
        if value is not default and not isinstance(value, str):
            raise self._wrong(key, value, "a text")
        return value

    def items(self, key: str, default: Any = _MISSING) -> list:
        """A list."""
        value = self.get(key, default)
        if value is not default and not isinstance(value, list):
            raise self._wrong(key, value, "a list")
        return value

    def mapping(self, key: str, default: Any = _MISSING) -> Description:
        """The description that is nested under a key; its own keys must all be read, too."""
        value = self.get(key, default)
        return value if value is default else Description(value, f"{self.where}: {key}")

    def one_of(self, key: str, choices: Mapping[Any, Any], default: Any = _MISSING) -> Any:
        """What `choices` has for the value; ValueError, which lists them, for any other."""
        value = self.get(key, default)
        if not isinstance(value, (str, bool, int, type(None))) or value not in choices:
            raise self._wrong(key, value, f"one of {', '.join(map(str, choices))}")
        return choices[value]

    def only(self, key: str, *allowed: Any) -> None:
        """Refuse a key with any other value than these: an option that is not implemented. Absent is
        allowed."""
        value = self.get(key, None)
        if value is not None and value not in allowed:
            only = f", only {' or '.join(map(str, allowed))}" if allowed else ""
            raise ValueError(f"{self.where}: {key} {quoted(value)} is not supported{only}")

    def ignore(self, *keys: str) -> None:
        """Keys that do not matter for the family."""
        self._read.update(keys)

    def finish(self) -> None:
        """Raise ValueError for a key that was not read: its meaning is not implemented."""
        for key, value in _ONLY.items():
            if key not in self._read:
                self.only(key, value)
        unread = sorted(set(self.values) - self._read - _WITHOUT_MEANING)
        unread = [key for key in unread if self.values[key] is not None]
        if unread:
            meant = near(unread[0], self._read)
            more = f"; did you mean {meant}?" if meant else ""
            raise ValueError(
                f"{self.where}: {unread[0]} {quoted(self.values[unread[0]])} is not supported for model_type "
                f"{self.values.get('model_type')}{more}"
            )

    def _wrong(self, key: str, value: Any, what: str) -> ValueError:
        return ValueError(f"{self.where}: {key} must be {what}, got {quoted(value)}")
