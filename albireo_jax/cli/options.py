"""Flags of the commands, made from the options of configurations or written as types of parameters."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from albireo_jax.cli.config_file import use_config_file
from albireo_jax.core import checks
from albireo_jax.core.config import EngineConfig
from albireo_jax.core.engine_options import ENGINE_OPTIONS, engine_config, engine_option
from albireo_jax.core.options import OptionField, alternatives, options_of
from albireo_jax.core.token_sampling import PARAMETERS
from albireo_jax.text.answers.answer_formats import ReasoningFormat, ToolFormat

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="smollm2 (built in), a Hugging Face folder, a saved checkpoint, or a .gguf file.",
        show_default=False,
    ),
]
NoModel = Annotated[
    str | None,
    typer.Argument(metavar="[MODEL]", help="Not needed: no model is loaded.", show_default=False),
]


@dataclass(frozen=True, slots=True)
class EngineFlags:
    """The values of the flags that set an engine's options; see `with_engine_flags`."""

    values: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def engine_config(self, model: str) -> EngineConfig:
        """The configuration of an engine for `model`; raises ValueError for values out of range."""
        given = [option for option in ENGINE_OPTIONS if option.flag in self.values]
        return engine_config(model, {option.name: _value(option, self.values) for option in given})


_ConfigFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.yaml",
        help="Read flags from a YAML file, one `flag: value` a line; the command line wins.",
        is_eager=True,
        callback=use_config_file,
        show_default=False,
    ),
]


def engine_flag(name: str, *, help: str | None = None) -> Any:
    """The flag of an engine's option for a command that has it without the others, with a help of its own."""
    option = engine_option(name).option
    return _flag(replace(engine_option(name), option=replace(option, help=help or option.help)))


def engine_default(name: str) -> Any:
    """The default of an engine's option."""
    return engine_option(name).default


def with_engine_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command that runs an engine all its flags, as the argument `engine`."""
    added = [_parameter("config", _ConfigFile, None), *map(_option_parameter, ENGINE_OPTIONS)]
    return _with_parameters(command, added, make=EngineFlags, argument="engine")


def with_flags(kind: type[Any], *, argument: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the fields of a dataclass as flags; it takes them as one argument of that name.

    A field is annotated with a flag of typer's or with an `Option`.
    """
    hints = get_type_hints(kind, include_extras=True)
    options = {option.field: option for option in options_of(kind)}
    added = [
        _option_parameter(options[field.name])
        if field.name in options
        else _parameter(field.name, hints[field.name], field.default)
        for field in fields(kind)
    ]

    def make(values: Mapping[str, Any]) -> Any:
        given = {option.field: _value(option, values) for option in options.values()}
        return kind(**{field.name: given.get(field.name, values.get(field.name)) for field in fields(kind)})

    return lambda command: _with_parameters(command, added, make=make, argument=argument)


def _with_parameters(
    command: Callable[..., None],
    added: Sequence[inspect.Parameter],
    *,
    make: Callable[[dict[str, Any]], Any],
    argument: str,
) -> Callable[..., None]:
    """The command with parameters more, whose values `make` turns into the argument of that name.

    typer reads flags from a function's signature, so the signature it sees is the command's own with
    the parameters in place of the argument.
    """
    signature = inspect.signature(command)
    own = [parameter for name, parameter in signature.parameters.items() if name != argument]

    @wraps(command)
    def run(**values: Any) -> None:
        flags = make({parameter.name: values.pop(parameter.name) for parameter in added})
        command(**{argument: flags}, **values)

    run.__signature__ = signature.replace(parameters=[*own, *added])  # pyright: ignore[reportAttributeAccessIssue]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *added)}
    return run


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    required = inspect.Parameter.empty if default is MISSING else default
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=required, annotation=annotation)


def _option_parameter(option: OptionField) -> inspect.Parameter:
    """The parameter that typer makes the flag of an option from."""
    default, kind = option.default, option.kind
    if option.option.gib_flag:
        default, kind = option.default / 2**30, float
    elif tuple in alternatives(kind):
        kind = list[str] | None  # a flag that may be repeated
    return _parameter(option.flag, Annotated[kind, _flag(option)], default)


def _flag(option: OptionField) -> Any:
    """The flag of an option, without its name: typer takes that of the parameter."""
    none_word, choices = option.option.none_word, option.choices

    def parse(text: str) -> StrEnum | None:
        assert choices is not None, "only a choice has a word for None"
        try:
            return checks.optional_choice(option.name, text, choices, none_word=none_word)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error

    return typer.Option(
        metavar=option.option.metavar or _metavar(option),
        help=option.option.help,
        show_default=option.default is not None,
        parser=None if none_word is None else parse,
    )


def _metavar(option: OptionField) -> str | None:
    """The sign for a value that suits its type; a switch has none."""
    if option.option.gib_flag:
        return "GIB"
    if option.choices is not None:
        return "|".join((*filter(None, [option.option.none_word]), *option.choices))
    return {int: "N", float: "X"}.get(alternatives(option.kind)[0])


def _value(option: OptionField, values: Mapping[str, Any]) -> Any:
    """The value of an option's field, of those that the command line gives by flag."""
    value = values[option.flag]
    if option.option.gib_flag:
        return _gib(option.flag, value)
    return tuple(value) if isinstance(value, list) else value


def _gib(name: str, size: float) -> int:
    """Bytes of a size in GiB."""
    if not math.isfinite(size):
        raise ValueError(f"{name} must be a finite number, got {size}")
    return int(size * 2**30)


def _optional(name: str, *, metavar: str, help: str) -> Any:
    """An option without a default to show; its help says what holds where it is not given."""
    return typer.Option(name, metavar=metavar, help=help, show_default=False)


ServedName = Annotated[
    str | None,
    _optional(
        "--served-model-name",
        metavar="NAME",
        help="Name that clients ask for. Default: the built-in, folder's or file's name.",
    ),
]
Host = Annotated[str, typer.Option("--host", metavar="ADDRESS", help="Where to listen; 0.0.0.0 for all.")]
Port = Annotated[int, typer.Option("--port", metavar="N", help="Port to listen at; 0 takes a free one.")]
ApiKey = Annotated[
    str | None,
    _optional("--api-key", metavar="KEY", help="Refuse requests without `Authorization: Bearer KEY`."),
]
AllowOrigin = Annotated[
    list[str] | None,
    _optional(
        "--allow-origin",
        metavar="ORIGIN",
        help="Origin whose pages may call from a browser; may be repeated; none for none. Default: all.",
    ),
]
ToolCallParser = Annotated[
    ToolFormat | None,
    _optional(
        "--tool-call-parser",
        metavar="|".join(ToolFormat),
        help="How the model writes tool calls. Default: as its chat template shows.",
    ),
]
StreamInterval = Annotated[
    int,
    typer.Option(
        "--stream-interval",
        metavar="N",
        min=1,
        help="Tokens of an answer that one event of a stream brings at least, but the first and the last.",
    ),
]
FrontEnds = Annotated[
    int,
    typer.Option(
        "--frontends", metavar="N", min=1, help="Processes for HTTP and text beside that of the engine."
    ),
]
Restarts = Annotated[
    int,
    typer.Option(
        "--restarts",
        metavar="N",
        min=0,
        help="Times that an engine that ended is started anew; counted anew after ten minutes.",
    ),
]
ReasoningParser = Annotated[
    ReasoningFormat | None,
    _optional(
        "--reasoning-parser",
        metavar="|".join(ReasoningFormat),
        help="How the model sets off its reasoning. Default: as its chat template shows.",
    ),
]

PromptText = Annotated[
    str, typer.Option("--prompt", "-p", metavar="TEXT", help="The prompt; - reads it from standard input.")
]
Chat = Annotated[bool, typer.Option("--chat", help="Ask as a user in a chat instead of continuing the text.")]
MaxTokens = Annotated[
    int | None,
    _optional(
        "--max-tokens", metavar="N", help="Longest answer. Default: as long as the model's context allows."
    ),
]
Temperature = Annotated[
    float, typer.Option("--temperature", metavar="X", help=PARAMETERS["temperature"].help)
]
TopP = Annotated[float, typer.Option("--top-p", metavar="X", help=PARAMETERS["top_p"].help)]
Stop = Annotated[
    list[str] | None,
    _optional("--stop", metavar="TEXT", help="End before this text; may be repeated."),
]

NumRequests = Annotated[int, typer.Option("--requests", metavar="N", help="Requests sent at once.")]
InputLen = Annotated[int, typer.Option("--input-len", metavar="N", help="Tokens of each random prompt.")]
OutputLen = Annotated[int, typer.Option("--output-len", metavar="N", help="Tokens generated for each.")]
Repeats = Annotated[int, typer.Option("--repeats", metavar="N", help="Runs that count, after the warm-up.")]
Rows = Annotated[
    list[int] | None,
    _optional("--rows", metavar="N", help="Requests in the step; may be repeated. Default: 32, 128 and 512."),
]
Steps = Annotated[int, typer.Option("--steps", metavar="N", help="Decode steps to time.")]
