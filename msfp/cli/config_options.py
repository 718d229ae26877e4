"""Command-line options that are generated from config dataclasses.

An option takes its name, type and default from a field, and its help from the documentation of the
field. A new field is therefore a new option. A field that is itself a dataclass gives an option for
each of its own fields, with its name as a prefix: `refine` gives `--refine-rounding`.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import re
import types
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from msfp.errors import InputError

Config = TypeVar("Config")
NONE = "none"
"""How None is written on the command line."""
GLOBS = tuple[str, ...]
"""The type of a field whose option is repeated, once for each item."""
ATTRIBUTE = re.compile(r"^    (\w+): ", re.MULTILINE)
"""The beginning of an attribute's documentation in a docstring."""


class _Option(NamedTuple):
    """How a value of some type is written on the command line.

    Attributes:
        parse: Converts one word to a value, or to one item of a tuple.
        metavar: Placeholder of the value in the help text.
        repeated: Whether the option is repeated, once for each item of a tuple.
    """

    parse: Callable[[str], Any] = str
    metavar: str | None = None
    repeated: bool = False


def add_config(
    command: argparse.ArgumentParser,
    config: type[Any],
    heading: str,
    *,
    skip: Collection[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Add an option for each field of a config.

    Args:
        command: The parser to add the options to.
        config: A frozen dataclass whose docstring describes its attributes.
        heading: Heading of the options in the help text.
        skip: Fields without an option.
        defaults: Defaults of the command that differ from those of the config.
    """
    group = command.add_argument_group(heading, "write none for None")
    _add_fields(group, config, "", skip, defaults or {})


def config_from(arguments: argparse.Namespace, config: type[Config], **values: Any) -> Config:
    """Return the config that the arguments describe.

    Args:
        arguments: Arguments of a parser whose options `add_config` added.
        config: The dataclass that `add_config` received.
        **values: Fields without an option, or fields to override.

    Raises:
        InputError: If a value is out of range.

    Example:
        >>> from msfp.config import RefinementConfig
        >>> command = argparse.ArgumentParser()
        >>> add_config(command, RefinementConfig, "refinement")
        >>> arguments = command.parse_args(["--rounding", "nearest", "--no-match-inputs"])
        >>> config = config_from(arguments, RefinementConfig, seed=1)
        >>> config.rounding, config.match_inputs, config.seed
        ('nearest', False, 1)
    """
    return config(**_given(arguments, config, "") | values)


def described(config: type[Any]) -> dict[str, str]:
    """Return the documentation of each attribute in a dataclass's docstring.

    Example:
        >>> from msfp.config import RefinementConfig
        >>> described(RefinementConfig)["seed"]
        'Seed of the random draws.'
    """
    _, _, section = (inspect.getdoc(config) or "").partition("Attributes:\n")
    section = re.split(r"^\S", section, maxsplit=1, flags=re.MULTILINE)[0]
    _, *parts = ATTRIBUTE.split(section)
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return {name: " ".join(text.split()) for name, text in pairs}


def _add_fields(
    group: Any, config: type[Any], prefix: str, skip: Collection[str], defaults: Mapping[str, Any]
) -> None:
    """Add the options of a dataclass; their names begin with a prefix."""
    texts, hints = described(config), get_type_hints(config)
    for each in dataclasses.fields(config):
        if each.name in skip:
            continue
        kind, name = hints[each.name], prefix + each.name
        text = texts.get(each.name, "").replace("%", "%%")
        nested, others = _dataclass_in(kind)
        if others:
            shown = defaults.get(each.name, _default(each))
            default = defaults.get(each.name, argparse.SUPPRESS)
            _add(group, name, others, f"{text} (default: {_shown(shown)})", default)
        if nested is not None:
            _add_fields(group, nested, f"{name}_", (), {})


def _add(group: Any, name: str, kinds: tuple[Any, ...], text: str, default: Any) -> None:
    """Add one option.

    With the default `argparse.SUPPRESS`, an option that is not given is absent from the arguments.
    """
    flag = _flag(name)
    if kinds == (bool,):
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=text)
        return
    option = _option(kinds)
    group.add_argument(
        flag, dest=name, type=option.parse, metavar=option.metavar, default=default, help=text,
        action="append" if option.repeated else "store",
    )  # fmt: skip


def _flag(name: str) -> str:
    """Return the option of a field."""
    return "--" + name.replace("_", "-")


def _option(kinds: tuple[Any, ...]) -> _Option:
    """Return how a value of these types is written on the command line."""
    optional = types.NoneType in kinds
    kinds = tuple(kind for kind in kinds if kind is not types.NoneType)
    if all(get_origin(kind) is Literal for kind in kinds):
        values = [value for kind in kinds for value in get_args(kind)]
        words = {str(value): value for value in values} | ({NONE: None} if optional else {})
        return _Option(_choice(words), f"{{{','.join(words)}}}")
    kind = kinds[0] if len(kinds) == 1 else None
    if kind == GLOBS and not optional:
        return _Option(str, "GLOB", repeated=True)
    if kind in (int, float):
        return _Option(_none_or(kind) if optional else kind, "N" if kind is int else "X")
    origin = get_origin(kind)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _Option(_table, "JSON")
    raise TypeError(f"there is no option for a field of the types {kinds}")


def _choice(values: Mapping[str, Any]) -> Callable[[str], Any]:
    """Return a parser that maps each allowed word to its value."""

    def parse(text: str) -> Any:
        if text not in values:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not allowed: choose from {', '.join(values)}"
            )
        return values[text]

    return parse


def _none_or(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a parser that also accepts "none"."""

    def parsed(text: str) -> Any:
        return None if text == NONE else parse(text)

    parsed.__name__ = parse.__name__  # argparse shows this name in its error messages
    return parsed


def _table(text: str) -> Any:
    """Parse a table in JSON."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from error


def _dataclass_in(kind: Any) -> tuple[type[Any] | None, tuple[Any, ...]]:
    """Return the dataclass among the types of a field, and the other types."""
    kinds = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    nested = next((each for each in kinds if dataclasses.is_dataclass(each)), None)
    return nested, tuple(each for each in kinds if each is not nested)  # type: ignore[return-value]


def _default(each: dataclasses.Field[Any]) -> Any:
    """Return the default of a field."""
    if each.default_factory is not dataclasses.MISSING:
        return each.default_factory()
    return each.default


def _shown(default: Any) -> str:
    """Return a default as it is written on the command line."""
    if isinstance(default, tuple):
        return " ".join(default) or NONE
    if isinstance(default, bool):
        return "yes" if default else "no"
    return NONE if default is None or default == {} else str(default)


def _given(arguments: argparse.Namespace, config: type[Any], prefix: str) -> dict[str, Any]:
    """Return the fields of a dataclass that were given."""
    hints = get_type_hints(config)
    found: dict[str, Any] = {}
    for each in dataclasses.fields(config):
        name = prefix + each.name
        if name in vars(arguments):
            value = getattr(arguments, name)
            found[each.name] = tuple(value) if hints[each.name] == GLOBS else value
        nested, _ = _dataclass_in(hints[each.name])
        parts = {} if nested is None else _given(arguments, nested, f"{name}_")
        if nested is not None and parts:
            if each.name in found:
                first = _flag(f"{name}_{next(iter(parts))}")
                raise InputError(f"{_flag(name)} cannot be combined with {first}")
            found[each.name] = nested(**parts)
    return found
