"""Writes the reference parts of the documentation from the code, while the site is built.

A page holds a marker on a line of its own, `<!-- reference: NAME -->` or `<!-- reference: NAME ARGUMENT -->`.
The marker is replaced by a table that is made from the command line's own definitions, from the schemas of
bodies, or from signatures, so a table cannot be older than the code.
"""

import ast
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai.types.chat.completion_create_params as openai_chat
import openai.types.completion_create_params as openai_completions
from typer.core import TyperGroup, TyperOption
from typer.main import get_command

from albireo_jax.cli.commands import app as command_line
from albireo_jax.core.types import SamplingParams
from albireo_jax.serving import vllm_metrics
from albireo_jax.serving.app import create_app
from albireo_jax.serving.routes import prometheus
from albireo_jax.serving.schemas.chat_bodies import ChatBody
from albireo_jax.serving.schemas.completion_bodies import CompletionBody
from albireo_jax.serving.schemas.foreign_fields import FOREIGN
from albireo_jax.serving.schemas.list_limits import LIST_LIMITS
from albireo_jax.serving.schemas.strict_model import StrictModel

METRIC_PREFIXES = ("albireo_", "vllm:")
"""Names of metrics begin with one of these."""

_MARKER = re.compile(r"^<!-- reference: (\w+)(?: (.*?))? -->$", re.MULTILINE)

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BODIES: dict[str, type[StrictModel]] = {COMPLETIONS: CompletionBody, CHAT: ChatBody}

OPENAI_FIELDS: dict[str, frozenset[str]] = {
    COMPLETIONS: frozenset((*openai_completions.CompletionCreateParamsBase.__annotations__, "stream")),
    CHAT: frozenset((*openai_chat.CompletionCreateParamsBase.__annotations__, "stream")),
}
"""The fields that OpenAI's own client library sends, by path."""

_VLLM_BOTH = """
    add_special_tokens allowed_token_ids bad_words cache_salt ec_transfer_params ignore_eos
    include_stop_str_in_output kv_transfer_params length_penalty logprob_token_ids min_p min_tokens priority
    prompt_logprobs repetition_detection repetition_penalty request_id response_format return_token_ids
    return_token_offsets return_tokens_as_token_ids routed_experts_prompt_start session_id
    skip_special_tokens spaces_between_special_tokens stop_token_ids stream_interval structured_outputs
    thinking_token_budget top_k truncate_prompt_tokens truncation_side use_beam_search vllm_xargs watermarking
""".split()  # noqa: SIM905
_VLLM_CHAT = """
    add_generation_prompt chat_template chat_template_kwargs continue_final_message documents echo
    include_reasoning media_io_kwargs mm_processor_kwargs reasoning_effort return_prompt_text
""".split()  # noqa: SIM905

VLLM_FIELDS: dict[str, frozenset[str]] = {
    COMPLETIONS: frozenset((*_VLLM_BOTH, "prompt_embeds")),
    CHAT: frozenset((*_VLLM_BOTH, *_VLLM_CHAT)),
}
"""The fields that vLLM has beside OpenAI's, by path."""

EARLIER_FIELDS = frozenset(("guided_json", "guided_regex", "guided_choice", "guided_grammar"))
"""Fields that earlier versions of vLLM had."""

OTHER_ROUTES: dict[str, str] = {
    "/v1/responses": "OpenAI, vLLM",
    "/v1/messages": "vLLM (Anthropic's API)",
    "/v1/embeddings": "OpenAI, vLLM",
    "/v1/moderations": "OpenAI",
    "/v1/files": "OpenAI",
    "/v1/batches": "OpenAI",
    "/v1/fine_tuning/jobs": "OpenAI",
    "/v1/images/generations": "OpenAI",
    "/v1/audio/speech": "OpenAI",
    "/v1/audio/transcriptions": "OpenAI, vLLM",
    "/v1/chat/completions/render": "vLLM",
    "/v1/completions/render": "vLLM",
    "/v1/load_lora_adapter": "vLLM",
    "/pooling": "vLLM",
    "/classify": "vLLM",
    "/score": "vLLM",
    "/rerank": "vLLM",
}
"""Paths that other servers have, and whose they are."""


def on_page_markdown(markdown: str, **_: object) -> str:
    """Replace the markers of a page; mkdocs calls this for every page."""
    return filled(markdown)


def filled(markdown: str) -> str:
    """A page's text with its markers replaced; raises ValueError for a marker that names no table."""

    def table(match: re.Match[str]) -> str:
        name, argument = match.group(1), match.group(2)
        if name not in TABLES:
            raise ValueError(f"no reference {name!r}; known are {sorted(TABLES)}")
        return "\n".join(TABLES[name](argument or ""))

    return _MARKER.sub(table, markdown)


def commands() -> dict[str, Any]:
    """Every command by the words that call it, such as `bench throughput`."""
    found: dict[str, Any] = {}

    def add(words: tuple[str, ...], command: Any) -> None:
        inner = command.commands if isinstance(command, TyperGroup) else {}
        if words and not inner:
            found[" ".join(words)] = command
        for name, each in inner.items():
            add((*words, name), each)

    add((), get_command(command_line))
    return found


def flag_names(command: Any) -> list[str]:
    """The flags of a command as they are typed, without --help."""
    options = [param for param in command.params if isinstance(param, TyperOption)]
    return [name for option in options for name in (*option.opts, *option.secondary_opts) if name != "--help"]


def _flags(argument: str) -> Iterator[str]:
    """The flags of one command, `own` or `engine` of them alone where so asked."""
    words, _, part = argument.partition(":")
    command = commands()[words]
    shared = _engine_flags()
    yield from _table("flag", "default", "meaning")
    for param in command.params:
        if not isinstance(param, TyperOption) or param.name == "help":
            continue
        if part and (param.name in shared) != (part == "engine"):
            continue
        yield _row(_spelled(param), _default(param), _text(param.help or ""))


def _engine_flags() -> frozenset[str]:
    """The flags that `serve` and `bench throughput` share: those of every command that runs an engine."""
    both = [{param.name for param in commands()[words].params} for words in ("serve", "bench throughput")]
    return frozenset(both[0] & both[1] - {"model", "help"})


def _spelled(option: Any) -> str:
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    if option.metavar is None:
        return names
    choices = ", ".join(f"`{choice}`" for choice in option.metavar.split("|"))
    return f"{names}<br>{choices}" if "|" in option.metavar else f"{names} {choices}"


def _default(option: Any) -> str:
    if option.required:
        return "required"
    if not option.show_default or option.default is None:
        return ""
    if isinstance(option.default, bool):
        return "on" if option.default else "off"
    return f"`{option.default}`"


def _usage(argument: str) -> Iterator[str]:
    """A command's own description and examples."""
    text, _, examples = inspect.cleandoc(commands()[argument].help or "").partition("\b")
    yield text.strip()
    if examples.strip():
        yield from ("", "```", *examples.strip().splitlines(), "```")


def _fields(_: str) -> Iterator[str]:
    """Every field of OpenAI's and vLLM's bodies and of ours, with its fate at each path."""
    names = set[str]().union(*OPENAI_FIELDS.values(), *VLLM_FIELDS.values(), *map(_known, BODIES.values()))
    yield from _table("field", "known to", *(f"`{path}`" for path in BODIES))
    for name in sorted(names):
        whose = [
            owner
            for owner, lists in (("OpenAI", OPENAI_FIELDS), ("vLLM", VLLM_FIELDS))
            if any(name in each for each in lists.values())
        ]
        whose += ["earlier vLLM"] if name in EARLIER_FIELDS else []
        yield _row(
            f"`{name}`", ", ".join(whose) or "this server", *(fate(name, body) for body in BODIES.values())
        )


def fate(name: str, body: type[StrictModel]) -> str:
    """The fate of a field in a body: honoured, refused (with the name to use), or ignored."""
    if name in _known(body):
        return "**honoured**"
    if name in body.refused:
        instead = body.instead.get(name)
        return "refused" if instead is None else f"refused: use {_text(instead)}"
    return "ignored"


def _known(body: type[StrictModel]) -> set[str]:
    return {field.alias or name for name, field in body.model_fields.items()}


def _foreign(_: str) -> Iterator[str]:
    """Fields of other servers that are refused by name."""
    yield from _table("field", "values that ask for nothing", "use instead")
    known = set[str]().union(*OPENAI_FIELDS.values(), *VLLM_FIELDS.values())
    for name in sorted(set(FOREIGN) - known):
        harmless = ", ".join(f"`{value!r}`" for value in FOREIGN[name])
        yield _row(f"`{name}`", harmless, _text(CompletionBody.instead.get(name, "")))


def _limits(_: str) -> Iterator[str]:
    """The most entries of the lists of a body."""
    yield from _table("list", "most entries")
    for name, limit in sorted(LIST_LIMITS.items()):
        most = f"{limit.most:,} {limit.things}"
        more = "" if limit.numbers is None else f", or {limit.numbers.most:,} {limit.numbers.things}"
        yield _row(f"`{name}`", most + more)


def routes() -> dict[str, list[str]]:
    """The paths that the server answers, and their methods."""
    no_engine: Any = SimpleNamespace(tokenizer=SimpleNamespace(chat_template_source=""))
    paths = create_app(no_engine).openapi()["paths"]
    found = {path: sorted(method.upper() for method in operations) for path, operations in paths.items()}
    return {**found, "/docs": ["GET"], "/openapi.json": ["GET"]}


def _routes(_: str) -> Iterator[str]:
    """The paths that are served, and those of other servers that are not."""
    yield from _table("path", "methods", "known to")
    for path, methods in routes().items():
        whose = "OpenAI, vLLM" if path.startswith("/v1/") else "vLLM"
        yield _row(f"`{path}`", ", ".join(methods), whose)
    for path, whose in OTHER_ROUTES.items():
        yield _row(f"`{path}`", "**absent**", whose)


def metric_names() -> dict[str, str]:
    """The name and the description of every metric, read from the source of the collectors."""
    found: dict[str, str] = {}
    for module in (prometheus, vllm_metrics):
        for node in ast.walk(ast.parse(Path(inspect.getfile(module)).read_text())):
            if not isinstance(node, ast.Call) or len(node.args) < 2:
                continue
            called = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
            texts = [arg.value for arg in node.args[:2] if isinstance(arg, ast.Constant)]
            if len(texts) == 2 and str(texts[0]).startswith(METRIC_PREFIXES):
                is_counter = called.lower().startswith("counter")
                found[f"{texts[0]}_total" if is_counter else str(texts[0])] = str(texts[1])
    return found


def _metrics(prefix: str) -> Iterator[str]:
    """The metrics whose names begin in one way."""
    yield from _table("metric", "meaning")
    for name, meaning in metric_names().items():
        if name.startswith(prefix):
            yield _row(f"`{name}`", _text(meaning))


def _llm(_: str) -> Iterator[str]:
    """The keyword arguments of `LLM`."""
    from albireo_jax.api import LLM

    yield from _table("argument", "type", "default")
    for parameter in inspect.signature(LLM).parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            continue
        is_given = parameter.default is not inspect.Parameter.empty
        kind = _kind(parameter.annotation)
        default = f"`{parameter.default!r}`" if is_given else "required"
        yield _row(f"`{parameter.name}`", kind, default)


def _params(_: str) -> Iterator[str]:
    """The fields of `SamplingParams`."""
    yield from _table("field", "type", "default")
    for field in fields(SamplingParams):
        kind = _kind(field.type)
        default = "required" if field.default is MISSING else f"`{field.default!r}`"
        yield _row(f"`{field.name}`", kind, default)


def _kind(annotation: Any) -> str:
    """A type in words: its alternatives, one after the other."""
    names = inspect.formatannotation(annotation).replace("albireo_jax.", "").split(" | ")
    return " or ".join(f"`{name.rpartition('.')[2] if '[' not in name else name}`" for name in names)


def _table(*titles: str) -> Iterator[str]:
    yield _row(*titles)
    yield _row(*("---" for _ in titles))


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _text(text: str) -> str:
    """A text as it may stand in a cell of a table."""
    return " ".join(text.split()).replace("|", "&#124;")


TABLES: dict[str, Callable[[str], Iterable[str]]] = {
    "flags": _flags,
    "usage": _usage,
    "fields": _fields,
    "foreign": _foreign,
    "limits": _limits,
    "routes": _routes,
    "metrics": _metrics,
    "llm": _llm,
    "sampling_params": _params,
}
"""The tables that a marker can name."""
