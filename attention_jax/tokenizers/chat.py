"""Chat templates: Jinja source of a model's files, rendered in Jinja's sandbox as transformers renders it.

The sandbox keeps a template from files, the network and Python's internals; it does not bound time or memory.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

from attention_jax.optional import need

# Roles of published templates. Others are refused: a template prints a misspelt one without a word.
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
_MOST_SOURCE = 2**20


class ChatTemplate:
    """Renders conversations.

    Args:
      source: Jinja source.
      bos_token, eos_token: variables of most templates; None where the model has no such token.

    Raises: ValueError of one line for source that is no template.
    """

    def __init__(self, source: str, *, bos_token: str | None = None, eos_token: str | None = None):
        if len(source) > _MOST_SOURCE:
            raise ValueError(f"chat template: {len(source)} characters are too many, at most {_MOST_SOURCE}")
        self.source = source
        self.bos_token, self.eos_token = bos_token, eos_token
        try:
            self._template = _environment().from_string(source)
        except RecursionError:
            raise ValueError("chat template: it is nested too deeply") from None
        except need("jinja2", "a chat template").TemplateError as error:
            raise _refused(error) from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The text of a conversation.

        messages: dicts with a role of `ROLES` and content, text or a list of parts. add_generation_prompt:
        whether the head of the next answer follows. tools: JSON schemas of functions. variables: what else
        the template reads, such as enable_thinking.
        Raises: ValueError of one line for messages that are malformed or that the template refuses.
        """
        given = {
            "messages": checked_messages(messages),
            "tools": None if tools is None else [_plain(tool) for tool in tools],
            "documents": None if documents is None else [_plain(document) for document in documents],
            "add_generation_prompt": add_generation_prompt,
        }
        special = {"bos_token": self.bos_token, "eos_token": self.eos_token}
        special = {name: token for name, token in special.items() if token is not None}
        try:
            return self._template.render(special | {k: _plain(v) for k, v in variables.items()} | given)
        except Exception as error:
            raise _refused(error) from None


def checked_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copies of the messages as JSON values, without keys that are None. ValueError says what is wrong."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise ValueError('messages must be a list of dicts such as {"role": "user", "content": "Hello"}')
    checked = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not all(isinstance(key, str) for key in message):
            raise ValueError(
                f"message {index}: must be a dict with role and content, got {type(message).__name__}"
            )
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(f"message {index}: role {str(role)[:40]!r} is none of {', '.join(ROLES)}")
        if content is not None and not isinstance(content, str | list | tuple):
            raise ValueError(f"message {index}: content must be text or a list, got {type(content).__name__}")
        if content is None and not any(message.get(key) is not None for key in message if key != "role"):
            raise ValueError(f"message {index}: it has no content")
        checked.append({key: _plain(value) for key, value in message.items() if value is not None})
    return checked


def _plain(value: Any) -> Any:
    """A copy of JSON's types: no object with methods of its own reaches a template. ValueError for others."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, int, float):  # subclasses, such as enumerations
        if isinstance(value, kind):
            return kind.__new__(kind, value) if kind is not str else str.__str__(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    raise ValueError(f"a chat template reads text, numbers, lists and dicts, not {type(value).__name__}")


def _refused(error: Exception) -> ValueError:
    said = " ".join(str(error).split()) or type(error).__name__
    line = getattr(error, "lineno", None)
    return ValueError(f"chat template{f', line {line}' if line else ''}: {said}"[:190])


def _environment() -> Any:
    """Jinja's sandbox with what published templates use beside Jinja's own functions."""
    jinja2 = need("jinja2", "a chat template")
    extension, sandbox = (need(f"jinja2.{name}", "a chat template") for name in ("ext", "sandbox"))

    class Namespace(jinja2.utils.Namespace):
        """Jinja's namespace without attributes that begin with an underscore."""

        def __setitem__(self, name: str, value: Any) -> None:
            if str(name).startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a namespace has no attribute {name!r}")
            super().__setitem__(name, value)

    class Generation(extension.Extension):
        """{% generation %} ... {% endgeneration %}, which marks an answer for training, prints its body."""

        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own filter escapes the characters of HTML.
        options = {
            "ensure_ascii": ensure_ascii,
            "indent": indent,
            "separators": separators,
            "sort_keys": sort_keys,
        }
        return json.dumps(value, **options)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        "namespace": Namespace,
    }
    return environment
