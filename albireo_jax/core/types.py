"""What a caller asks for and what comes back: requests, sampling parameters, outputs."""

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import NamedTuple

from albireo_jax.core.config import MAX_LOGPROBS
from albireo_jax.core.plan import Int32s, TokenConstraint, TokenScores
from albireo_jax.core.rules import TokenRules
from albireo_jax.core.token_ids import token_array

MAX_STOP_IDS = 32
"""Stop ids that a row can hold on the device, where they are held back until `min_tokens`."""

MAX_SEED = 2**63 - 1


class FinishReason(StrEnum):
    """Why a request ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class StructureKind(StrEnum):
    """Languages in which a caller may say what an output must look like."""

    JSON_OBJECT = "json_object"
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    CHOICE = "choice"
    GRAMMAR = "grammar"


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutput:
    """What a whole output must match.

    `text` is the schema as JSON, the regular expression (matched from end to end), or the grammar in Lark's
    notation; empty for JSON_OBJECT, and for CHOICE, which has `choices` instead.
    """

    kind: StructureKind
    text: str = ""
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of a request are chosen and when it ends.

    temperature 0 is greedy; top_k 0 and -1 mean the whole vocabulary; top_p 1 and min_p 0 filter nothing.
    The penalties, `logit_bias` (token id to what is added to its logit), `allowed_token_ids` and `bad_words`
    are those of `core.rules`. `max_tokens` None generates until the model's length limit. A request without
    a seed gets one at the door, so that its tokens still do not depend on batch, depth or preemption.
    `logprobs` and `prompt_logprobs` ask for log probabilities of the answer's and the prompt's tokens, and of
    so many of the likeliest in the place of each; None asks for none.
    `shown_tokens` are special tokens whose text is given although `skip_special_tokens` hides the others.
    Raises ValueError naming the value and the limit.
    """

    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    shown_tokens: tuple[str, ...] = ()
    n: int = 1
    structured: StructuredOutput | None = None

    def __post_init__(self) -> None:
        """Refuse what no sampler can do."""
        object.__setattr__(self, "stop", _strings("stop", self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        object.__setattr__(self, "bad_words", _strings("bad_words", self.bad_words))
        if self.allowed_token_ids is not None:
            object.__setattr__(self, "allowed_token_ids", tuple(self.allowed_token_ids))
        object.__setattr__(self, "top_k", 0 if self.top_k == -1 else self.top_k)
        _check_int("max_tokens", self.max_tokens, low=1)
        _check_int("min_tokens", self.min_tokens, low=0)
        _check_int("top_k", self.top_k, low=0)
        _check_int("seed", self.seed, low=0, high=MAX_SEED)
        _check_int("n", self.n, low=1, high=128)
        _check_int("logprobs", self.logprobs, low=0, high=MAX_LOGPROBS)
        _check_int("prompt_logprobs", self.prompt_logprobs, low=0, high=MAX_LOGPROBS)
        _check_float("temperature", self.temperature, low=0.0, high=100.0)
        _check_float("top_p", self.top_p, low=0.0, high=1.0, open_low=True)
        _check_float("min_p", self.min_p, low=0.0, high=1.0)
        _check_float("repetition_penalty", self.repetition_penalty, low=0.0, high=100.0, open_low=True)
        _check_float("presence_penalty", self.presence_penalty, low=-2.0, high=2.0)
        _check_float("frequency_penalty", self.frequency_penalty, low=-2.0, high=2.0)
        for token, bias in (self.logit_bias or {}).items():
            _check_int("logit_bias", token, low=0)
            _check_float(f"logit_bias of token {token}", bias, low=-100.0, high=100.0)
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise ValueError("allowed_token_ids is empty, at least 1 token must be allowed")
        for token in self.allowed_token_ids or ():
            _check_int("allowed_token_ids", token, low=0)
        if self.allowed_token_ids is not None and self.structured is not None:
            raise ValueError("allowed_token_ids cannot be combined with structured output")
        for token in self.stop_token_ids:
            _check_int("stop_token_ids", token, low=0)
        if len(self.stop_token_ids) > MAX_STOP_IDS:
            raise ValueError(
                f"stop_token_ids has {len(self.stop_token_ids)} ids, the limit is {MAX_STOP_IDS}"
            )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} exceeds max_tokens {self.max_tokens}")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request:
    """One sequence to continue, as it stands when it enters the engine. Equal by content.

    `prompt_token_ids` may be given as any sequence of ints, and becomes a read-only array; one that is
    read-only already is taken as it is, so that the samples of one prompt share it.

    `max_tokens` and `seed` are resolved (no None); `stop_ids` are all ids that end it, the model's
    end-of-sequence ids included unless they are ignored. n > 1 is n requests with distinct seeds, each
    with a `constraint` of its own, which the engine changes as it takes in tokens. Only requests of the same
    `cache_salt` find each other's prefixes in the cache.
    """

    request_id: str
    prompt_token_ids: Int32s
    max_tokens: int
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    rules: TokenRules | None = None
    constraint: TokenConstraint | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    cache_salt: str = ""
    arrived_s: float = 0.0

    def __post_init__(self) -> None:
        """Refuse a request that no engine could run."""
        prompt = token_array(f"request {self.request_id}: the prompt", self.prompt_token_ids)
        object.__setattr__(self, "prompt_token_ids", prompt)
        if not len(prompt):
            raise ValueError(f"request {self.request_id}: the prompt is empty, at least 1 token is needed")
        if self.max_tokens < 1:
            raise ValueError(f"request {self.request_id}: max_tokens {self.max_tokens} is below 1")
        if len(self.stop_ids) > MAX_STOP_IDS:
            raise ValueError(
                f"request {self.request_id}: {len(self.stop_ids)} stop ids, the limit is {MAX_STOP_IDS}"
            )

    def __eq__(self, other: object) -> bool:
        """Whether `other` is a request for the same, under the same id."""
        return isinstance(other, Request) and self._content() == other._content()

    def __hash__(self) -> int:
        """Hash of the content."""
        return hash(self._content())

    def _content(self) -> tuple[object, ...]:
        others = (each.name for each in fields(self) if each.name != "prompt_token_ids")
        values = operator.attrgetter(*others)(self)
        return self.prompt_token_ids.tobytes(), *values


class RequestScores(NamedTuple):
    """Scores that an output brings: of its token, and with the first token those of the prompt.

    `prompt` are the scores of the prompt's tokens from the second on, in pieces, if they were asked for;
    None with later tokens.
    """

    token: TokenScores
    prompt: tuple[TokenScores, ...] | None = None


class RequestOutput(NamedTuple):
    """What one step brought a request: at most one token, and the reason if it ended.

    The steps of one plan bring an output each, in their order.
    A named tuple, not a dataclass: a step of 512 rows makes 512 of them on the engine thread.
    `token_id` is None when the request ended without one (abort, error). `scores` come if the request
    asked for log probabilities. The first token brings how many tokens of the prompt were in the cache.
    """

    request_id: str
    token_id: int | None
    finish_reason: FinishReason | None
    scores: RequestScores | None = None
    cached_tokens: int = 0


def _strings(name: str, value: object) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else tuple(value)  # type: ignore[arg-type]
    for string in strings:
        if not isinstance(string, str) or not string:
            raise ValueError(f"{name} must hold non-empty strings, got {string!r}")
    return strings


def _check_int(name: str, value: object, *, low: int, high: int | None = None) -> None:
    if value is None and name in ("max_tokens", "seed", "logprobs", "prompt_logprobs"):
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if value < low or (high is not None and value > high):
        limit = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"{name} must be {limit}, got {value}")


def _check_float(name: str, value: object, *, low: float, high: float, open_low: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    if value < low or value > high or (open_low and value == low):
        interval = f"{'(' if open_low else '['}{low:g}, {high:g}]"
        raise ValueError(f"{name} must be in {interval}, got {value}")
