"""Families of configs: frozen dataclasses of which a key `kind` chooses one."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Self

from attention_jax.hints import hint, near


class Kind:
    """Base of a family of configs. Its direct subclass is the family, which errors call by its `noun`.

    A subclass of the family that gives `kind` a default is registered under it; a kind that another class has
    is refused.
    """

    # Read by pydantic when a config is loaded from YAML; the library itself does not import pydantic.
    __pydantic_config__ = {"extra": "forbid", "strict": True, "arbitrary_types_allowed": True}

    noun: ClassVar[str]
    _family: ClassVar[type]
    _members: ClassVar[dict[str, type]]

    def __init_subclass__(cls, **arguments: Any):
        super().__init_subclass__(**arguments)
        if Kind in cls.__bases__:
            cls._family, cls._members = cls, {}
        kind = cls.__dict__.get("kind")
        kind = kind.default if isinstance(kind, dataclasses.Field) else kind
        if isinstance(kind, str) and kind:
            if not same_definition(known := cls._members.get(kind, cls), cls):
                raise ValueError(
                    f"kind {kind!r} of {cls.__qualname__} is already that of {known.__qualname__} in "
                    f"{known.__module__}: choose another kind"
                )
            cls._members[kind] = cls

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        """The pydantic schema: of the family the union of all its kinds, discriminated by `kind`."""
        if cls is not cls._family:
            return handler(source)
        choices = {kind: handler.generate_schema(config) for kind, config in cls.kinds().items()}
        return {"type": "tagged-union", "discriminator": "kind", "choices": choices}

    @classmethod
    def kinds(cls) -> dict[str, type[Self]]:
        """The config class of every kind of this family."""
        return dict(cls._members)

    @classmethod
    def make(cls, kind: str, **options: Any) -> Self:
        """The config of a kind; ValueError for an unknown kind or option, with what was probably meant."""
        if not isinstance(kind, str) or kind not in cls._members:
            known = ", ".join(cls._members)
            raise ValueError(
                f"unknown {cls.noun} {kind!r}; choose from {known}{hint('kind', kind, cls._members)}"
            )
        return cls._members[kind].from_options(options)

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> Self:
        """The config with these options; ValueError for one that it does not have."""
        known = [f.name for f in dataclasses.fields(cls) if f.name != "kind"]
        for name in options:
            if name not in known:
                meant = near(name, known)
                more = f"; did you mean {meant}?" if meant else f"; it has {', '.join(known) or 'none'}"
                raise ValueError(f"{cls.noun} {cls.kind or cls.__name__!r} has no option {name!r}{more}")
        return cls(**options)


class Built:
    """Base of the modules that configs of a family build; a subclass names its config class in `config_type`.

    The config class then has the module as its `module`, which no other may be.
    """

    config_type: ClassVar[type[Kind]]

    def __init_subclass__(cls, **arguments: Any):
        super().__init_subclass__(**arguments)
        if "config_type" in cls.__dict__:
            if not same_definition(known := cls.config_type.__dict__.get("module", cls), cls):
                raise ValueError(
                    f"config_type {cls.config_type.__name__} of {cls.__qualname__} already builds "
                    f"{known.__qualname__}: derive a config with a kind of its own"
                )
            cls.config_type.module = cls

    @classmethod
    def chosen_config(cls, config: Any, options: dict[str, Any]) -> Any:
        """The config, or the one with these options if it is None; ValueError for both or another class."""
        if config is None:
            return cls.config_type.from_options(options)
        if options or not isinstance(config, cls.config_type):
            raise ValueError(
                f"{cls.__name__} takes a {cls.config_type.__name__} or its fields as keywords, got "
                f"{type(config).__name__} and {sorted(options)}"
            )
        return config


def is_family(annotation: Any) -> bool:
    """Whether an annotation is a family, for which any of its kinds may stand."""
    return isinstance(annotation, type) and annotation is getattr(annotation, "_family", None)


def same_definition(known: type, cls: type) -> bool:
    """Whether two classes come from the same statement, as when a notebook's cell is run again."""
    return (known.__module__, known.__qualname__) == (cls.__module__, cls.__qualname__)
