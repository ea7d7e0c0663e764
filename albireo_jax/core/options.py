"""Options: the fields of configurations that flags, keys of YAML files and keyword arguments set."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from types import NoneType
from typing import Annotated, Any, get_args, get_origin, get_type_hints


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """Makes a field an option: `depth: Annotated[int, Option(help="Steps in flight.")] = 2`.

    The field holds type and default. `metavar` is shown for a value on the command line, by default one for
    the type. `name` is the option's name where it is not the field's. `gib_flag` names a flag that takes GiB
    where the field holds bytes. `none_word` is a word for None on the command line. `is_open` makes None
    the option's default: it stands for a value that is chosen at launch.
    """

    help: str
    metavar: str | None = None
    name: str | None = None
    gib_flag: str | None = None
    none_word: str | None = None
    is_open: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionField:
    """An option and the field that it sets, in the `section` of that name, or "" for the outermost.

    `name` is the keyword argument, `kind` the type of its values and `default` the field's.
    """

    section: str
    field: str
    name: str
    kind: Any
    default: Any
    option: Option

    @property
    def flag(self) -> str:
        """The flag and the key of a file, with `_` for `-` and without the leading dashes."""
        return self.option.gib_flag or self.name

    @property
    def choices(self) -> type[StrEnum] | None:
        """The names that a value can have, None for a number, a switch or a free text."""
        return next((kind for kind in alternatives(self.kind) if issubclass(kind, StrEnum)), None)


def alternatives(kind: Any) -> tuple[type[Any], ...]:
    """The types of which a value can be, without None."""
    members = get_args(kind) or (kind,)
    return tuple(get_origin(member) or member for member in members if member is not NoneType)


def options_of(kind: type[Any], *, section: str = "") -> tuple[OptionField, ...]:
    """The options of a configuration and of those that it holds, in the order of the fields."""
    return tuple(_options(kind, section))


def _options(kind: type[Any], section: str) -> Iterator[OptionField]:
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        hint = hints[field.name]
        if is_dataclass(hint) and isinstance(hint, type):
            yield from _options(hint, field.name)
        elif get_origin(hint) is Annotated and isinstance(get_args(hint)[1], Option):
            plain, option = get_args(hint)
            yield OptionField(
                section=section,
                field=field.name,
                name=option.name or field.name,
                kind=plain | None if option.is_open else plain,
                default=None if option.is_open else field.default,
                option=option,
            )
