"""Prompts, conversations and sampling parameters from the many forms that callers of the Python API bring.

A prompt is a text, token ids (a list, tuple, NumPy or JAX array), the messages of a chat, or one of these
in a dictionary as vLLM has it. Several prompts are a list, tuple, iterator or rows of an array. Anything
else is refused by a ValueError that names the argument, its value and the form that is wanted.
"""

from collections.abc import Mapping
from typing import Any, TypeGuard, cast

import numpy as np

from albireo_jax.core import checks
from albireo_jax.core.types import SamplingParams
from albireo_jax.engine.frontend import Prompt
from albireo_jax.text.chat_template import ConversationMessage

_KEYS = ("prompt", "prompt_token_ids", "messages")
"""Keys of a dictionary that stands for a prompt; it has one of them."""

_PROMPT = "a text, token ids, chat messages, or a dict with one of " + ", ".join(map(repr, _KEYS))
_CONVERSATION = "a list of messages with role and content"


def read_prompts(prompts: object) -> list[Prompt]:
    """The prompts in order, from one prompt or from several. Raises ValueError."""
    if isinstance(prompts, str | Mapping):
        return [_prompt("prompts", cast("object", prompts))]
    if not checks.is_ordered(prompts):
        raise ValueError(f"prompts must be {_PROMPT}, or a list of such prompts, got {prompts!r:.200}")
    elements = checks.ordered("prompts", prompts, of="prompts")
    if elements and (_is_scalar(elements[0]) or _is_message(elements[0])):
        return [_prompt("prompts", elements)]
    return [_prompt(f"prompts[{i}]", element) for i, element in enumerate(elements)]


def read_conversations(messages: object) -> list[list[ConversationMessage]]:
    """The conversations in order, from one or from several; a text is what a user says. Raises ValueError."""
    if isinstance(messages, str):
        return [[{"role": "user", "content": messages}]]
    if isinstance(messages, Mapping) and "messages" in messages:
        return [_conversation("messages", cast("object", messages))]
    if isinstance(messages, Mapping | checks.ArrayLike) or not checks.is_ordered(messages):
        raise ValueError(
            f"messages must be {_CONVERSATION}, a list of such conversations, or one user's text, "
            f"got {messages!r:.200}"
        )
    elements = checks.ordered("messages", messages, of="messages")
    if elements and isinstance(elements[0], Mapping) and "messages" not in elements[0]:
        return [_conversation("messages", elements)]
    return [_conversation(f"messages[{i}]", element) for i, element in enumerate(elements)]


def read_params(
    params: object, num_prompts: int, default: SamplingParams | None = None
) -> list[SamplingParams]:
    """Parameters of each prompt, from those of all or from a list with as many; None gives the `default`.

    Raises ValueError.
    """
    if params is None:
        return [default or SamplingParams()] * num_prompts
    if isinstance(params, SamplingParams):
        return [params] * num_prompts
    wanted = "params must be a SamplingParams, or a list with one for each prompt"
    if isinstance(params, Mapping):
        raise ValueError(f"{wanted}, got a dict; write SamplingParams(**{params!r:.200})")
    if not checks.is_ordered(params):
        raise ValueError(f"{wanted}, got {params!r:.200}")
    each = checks.ordered("params", params, of="sampling parameters")
    for i, one in enumerate(each):
        if not isinstance(one, SamplingParams):
            raise ValueError(f"{wanted}, params[{i}] is {one!r:.200}")
    if len(each) != num_prompts:
        raise ValueError(f"{num_prompts} prompts but {len(each)} sampling parameters")
    return each


def read_priorities(priority: object, num_prompts: int) -> list[int]:
    """Read the priority of each prompt from that of all or from a list with as many; None is 0.

    Raises ValueError.
    """
    if not checks.is_ordered(priority):
        return [_priority(0 if priority is None else priority)] * num_prompts
    each = [_priority(one) for one in checks.ordered("priority", priority, of="integers")]
    if len(each) != num_prompts:
        raise ValueError(f"{num_prompts} prompts but {len(each)} priorities")
    return each


def read_chat_options(
    *,
    tools: object,
    add_generation_prompt: object,
    continue_final_message: object,
    chat_template_kwargs: object,
) -> dict[str, Any]:
    """Read how to render a conversation: arguments of `Tokenizer.encode_chat`. Raises ValueError."""
    if tools is not None and not checks.is_ordered(tools):
        raise ValueError(f"tools must be a list of function schemas, got {tools!r:.200}")
    options: dict[str, Any] = {
        "tools": None if tools is None else checks.ordered("tools", tools, of="function schemas"),
        "add_generation_prompt": None
        if add_generation_prompt is None
        else checks.flag("add_generation_prompt", add_generation_prompt),
        "continue_final_message": checks.flag("continue_final_message", continue_final_message),
    }
    variables = {} if chat_template_kwargs is None else chat_template_kwargs
    if not isinstance(variables, Mapping) or not all(isinstance(name, str) for name in variables):
        raise ValueError(
            f"chat_template_kwargs must map names of variables to values, got {chat_template_kwargs!r:.200}"
        )
    taken = [name for name in ("messages", "context_len", *options) if name in variables]
    if taken:
        raise ValueError(f"chat_template_kwargs cannot hold {taken[0]!r}")
    return {**options, **cast("Mapping[str, Any]", variables)}


def _prompt(where: str, value: object) -> Prompt:
    """One prompt, which the caller finds at `where`."""
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Mapping):
        return _from_dict(where, cast("Mapping[object, object]", value))
    if not checks.is_ordered(value):
        raise ValueError(f"{where} must be {_PROMPT}, got {value!r:.200}")
    if isinstance(value, checks.ArrayLike):
        array = np.asarray(value)
        if array.ndim != 1:
            raise ValueError(
                f"{where} is an array of shape {array.shape}, token ids of a prompt have one axis"
            )
        if array.dtype.kind not in "iuO":
            raise ValueError(f"{where} is an array of {array.dtype}, token ids are integers")
        value = array.tolist()
    elements = checks.ordered(where, value, of="token ids")
    if elements and _is_message(elements[0]):
        return _conversation(where, elements)
    return checks.token_ids(f"a token id of {where}", elements)


def _from_dict(where: str, value: Mapping[object, object]) -> Prompt:
    given = {key: item for key, item in value.items() if item is not None}
    if "role" in given:
        raise ValueError(f"{where} is a single message, a prompt of messages is a list of them")
    unknown = [key for key in given if key not in _KEYS]
    if unknown:
        raise ValueError(f"{where} has {unknown[0]!r}, a prompt has one of {list(_KEYS)}")
    if len(given) != 1:
        raise ValueError(f"{where} has {list(given) or 'none'} of {list(_KEYS)}, a prompt has one of them")
    [(key, item)] = given.items()
    if key == "messages":
        return _conversation(where, value)
    if key == "prompt_token_ids" and isinstance(item, str | Mapping):
        raise ValueError(f"{where}['prompt_token_ids'] must be token ids, got {item!r:.200}")
    return _prompt(f"{where}[{key!r}]", item)


def _conversation(where: str, value: object) -> list[ConversationMessage]:
    """The messages of one conversation, each a mapping; the chat template checks what is in them."""
    if isinstance(value, Mapping) and "messages" in value:
        others = [key for key, item in value.items() if key != "messages" and item is not None]
        if others:
            raise ValueError(f"{where} has {others[0]!r} beside 'messages', which is not supported")
        where, value = f"{where}['messages']", cast("object", value["messages"])
    if isinstance(value, Mapping) or not checks.is_ordered(value):
        raise ValueError(f"{where} must be {_CONVERSATION}, got {value!r:.200}")
    messages = checks.ordered(where, value, of="messages")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(f"{where}[{i}] must be a message with role and content, got {message!r:.200}")
    if not messages:
        raise ValueError(f"{where} is empty, at least 1 message is needed")
    return messages


def _is_scalar(value: object) -> bool:
    return isinstance(checks.plain(value), bool | int | float)


def _is_message(value: object) -> TypeGuard[ConversationMessage]:
    return isinstance(value, Mapping) and "role" in value


def _priority(value: object) -> int:
    return checks.integer("priority", value, low=-checks.MAX_INT)
