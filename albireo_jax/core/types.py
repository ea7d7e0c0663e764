"""The types of the engine's interface: requests, sampling parameters, outputs."""

import operator
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from functools import partial
from typing import NamedTuple, cast

from albireo_jax.core import checks
from albireo_jax.core.config import MAX_LOGPROBS
from albireo_jax.core.errors import Refusal
from albireo_jax.core.logit_rules import MAX_WORDS, LogitRules
from albireo_jax.core.plan import Int32s, LogprobArrays
from albireo_jax.core.token_ids import token_array
from albireo_jax.core.token_sampling import GREEDY, TokenSampling

MAX_STOP_IDS = 32
"""Stop ids that a row can hold on the device, where they are held back until `min_tokens`."""

MIN_REPETITION_PENALTY = 1e-6

MAX_CACHE_SALT = 1024
"""Characters of a request's cache salt, the hash of its API key included."""

ALL_LOGPROBS = -1
"""Asks for the log probability of every token of the vocabulary."""

MAX_SAMPLES = 128
"""Answers to one prompt that a call can ask for."""


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
    ARGUMENTS = "arguments"
    COMPOSED = "composed"


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutput:
    """A constraint that a whole output must match.

    `text` is the schema as JSON, the regular expression (matched from end to end), or the grammar in Lark's
    notation; empty for JSON_OBJECT, and for CHOICE, which has `choices` instead. ARGUMENTS are those of a
    function: an object, as the schema describes it. COMPOSED is a grammar of our own around `parts`, each of
    which means there what it means alone (see `text.grammar.notation`).
    """

    kind: StructureKind
    text: str = ""
    choices: tuple[str, ...] = ()
    parts: tuple["StructuredOutput", ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams(TokenSampling):
    """The choice of a request's tokens, and its end.

    The penalties, `logit_bias` (token id to what is added to its logit), `allowed_token_ids` and `bad_words`
    are those of `core.logit_rules`. `max_tokens` None generates until the model's length limit.
    `logprobs` and `prompt_logprobs` ask for log probabilities of the answer's and the prompt's tokens, and of
    so many of the likeliest in the place of each, -1 for all of the vocabulary; None asks for none.
    `shown_tokens` are special tokens whose text is given although `skip_special_tokens` hides the others.
    Raises ValueError naming the value and the limit.
    """

    max_tokens: int | None = 16
    min_tokens: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
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
        super(SamplingParams, self).__post_init__()  # the class of a bare `super()` is the one without slots
        for name, value in self._checked().items():
            object.__setattr__(self, name, value)
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise ValueError("allowed_token_ids is empty, at least 1 token must be allowed")
        if self.allowed_token_ids is not None and self.structured is not None:
            raise ValueError("allowed_token_ids cannot be combined with structured output")
        if len(self.stop_token_ids) > MAX_STOP_IDS:
            raise ValueError(
                f"stop_token_ids has {len(self.stop_token_ids)} ids, the limit is {MAX_STOP_IDS}"
            )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} exceeds max_tokens {self.max_tokens}")

    def _checked(self) -> dict[str, object]:
        """Its own fields in Python's types: NumPy's scalars and arrays as what they hold, lists as tuples."""
        penalty = partial(checks.number, low=-2.0, high=2.0)
        allowed = self.allowed_token_ids
        return {
            "max_tokens": _optional("max_tokens", self.max_tokens, low=1, high=checks.MAX_INT),
            "min_tokens": checks.integer("min_tokens", self.min_tokens, low=0),
            "repetition_penalty": _repetition_penalty(self.repetition_penalty),
            "presence_penalty": penalty("presence_penalty", self.presence_penalty),
            "frequency_penalty": penalty("frequency_penalty", self.frequency_penalty),
            "logit_bias": _biases(self.logit_bias),
            "allowed_token_ids": None if allowed is None else checks.token_ids("allowed_token_ids", allowed),
            "bad_words": _words(self.bad_words),
            "logprobs": _optional("logprobs", self.logprobs, low=ALL_LOGPROBS, high=MAX_LOGPROBS),
            "prompt_logprobs": _optional(
                "prompt_logprobs", self.prompt_logprobs, low=ALL_LOGPROBS, high=MAX_LOGPROBS
            ),
            "stop": checks.strings("stop", self.stop),
            "stop_token_ids": _token_ids("stop_token_ids", self.stop_token_ids),
            "include_stop_str_in_output": checks.flag(
                "include_stop_str_in_output", self.include_stop_str_in_output
            ),
            "ignore_eos": checks.flag("ignore_eos", self.ignore_eos),
            "skip_special_tokens": checks.flag("skip_special_tokens", self.skip_special_tokens),
            "shown_tokens": checks.strings("shown_tokens", self.shown_tokens),
            "structured": _structured(self.structured),
            "n": checks.integer("n", self.n, low=1, high=MAX_SAMPLES),
        }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request:
    """One sequence to continue, as it stands when it enters the engine. Equal by content.

    `prompt_token_ids` may be given as any sequence of ints, and becomes a read-only array; one that is
    read-only already is taken as it is, so that the samples of one prompt share it.

    `max_tokens` and the seed of `sampling` are resolved (no None); `stop_ids` are all ids that end it, the
    model's end-of-sequence ids included unless they are ignored. n > 1 is n requests with distinct seeds.
    `structured` is compiled in the engine; with `ignore_eos` it never allows an end-of-sequence id. Only
    requests of the same `cache_salt` find each other's prefixes in the cache. The policy `priority` serves
    the lowest `priority` first. `page_digests` are those of the prompt's full pages from
    `sched.prefix_tree.packed_digests`; without them the scheduler makes them when it needs them.
    """

    request_id: str
    prompt_token_ids: Int32s
    max_tokens: int
    min_tokens: int = 0
    sampling: TokenSampling = GREEDY
    stop_ids: tuple[int, ...] = ()
    rules: LogitRules | None = None
    structured: StructuredOutput | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    cache_salt: str = ""
    priority: int = 0
    page_digests: bytes = b""
    arrived_s: float = 0.0

    def __post_init__(self) -> None:
        """Refuse a request that no engine could run."""
        prompt = token_array(f"request {self.request_id}: the prompt", self.prompt_token_ids)
        object.__setattr__(self, "prompt_token_ids", prompt)
        if not len(prompt):
            raise ValueError(f"request {self.request_id}: the prompt is empty, at least 1 token is needed")
        self._check_ranges()
        if self.sampling.seed is None:
            raise ValueError(f"request {self.request_id}: its sampling has no seed")
        if len(self.stop_ids) > MAX_STOP_IDS:
            raise ValueError(
                f"request {self.request_id}: {len(self.stop_ids)} stop ids, the limit is {MAX_STOP_IDS}"
            )

    def _check_ranges(self) -> None:
        """Refuse what the device's 32-bit words cannot hold."""
        if self.max_tokens < 1:
            raise ValueError(f"request {self.request_id}: max_tokens {self.max_tokens} is below 1")
        for name, value in (("max_tokens", self.max_tokens), ("min_tokens", self.min_tokens)):
            if not 0 <= value <= checks.MAX_INT:
                raise ValueError(
                    f"request {self.request_id}: {name} must be between 0 and {checks.MAX_INT}, got {value}"
                )
        if abs(self.priority) > checks.MAX_INT:
            raise ValueError(
                f"request {self.request_id}: priority must be between {-checks.MAX_INT} and "
                f"{checks.MAX_INT}, got {self.priority}"
            )
        if len(self.cache_salt) > MAX_CACHE_SALT:
            raise ValueError(
                f"request {self.request_id}: the cache salt has {len(self.cache_salt)} characters, "
                f"the limit is {MAX_CACHE_SALT}"
            )
        checks.check_characters("cache_salt", self.cache_salt)

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


class RequestLogprobs(NamedTuple):
    """Scores that an output brings: of its token, and with the first token those of the prompt.

    `prompt` are the scores of the prompt's tokens from the second on, in pieces, if they were asked for;
    None with later tokens.
    """

    token: LogprobArrays
    prompt: tuple[LogprobArrays, ...] | None = None


class RequestOutput(NamedTuple):
    """A request's output of one step: at most one token, and the reason if the request ended.

    The steps of one plan bring an output each, in their order.
    A named tuple, not a dataclass: a step of 512 rows makes 512 of them on the engine thread.
    `token_id` is None when the request ended without one (abort, error). `scores` come if the request
    asked for log probabilities. The first token brings how many tokens of the prompt were in the cache, and
    the time `started_s` at which the step was planned that began to compute the request.
    `is_text` is False for a token that only ended the request, one of its stop ids. A `refusal` comes with
    the error that ends a request whose constraint cannot be compiled.
    """

    request_id: str
    token_id: int | None
    finish_reason: FinishReason | None
    scores: RequestLogprobs | None = None
    cached_tokens: int = 0
    is_text: bool = True
    refusal: Refusal | None = None
    started_s: float | None = None


def _optional(name: str, value: object, *, low: int, high: int) -> int | None:
    return None if value is None else checks.integer(name, value, low=low, high=high)


def _structured(value: object) -> StructuredOutput | None:
    if not isinstance(value, StructuredOutput | None):
        raise ValueError(f"structured must be a StructuredOutput, got {value!r:.200}")
    if value is not None:
        for text in (value.text, *value.choices):
            checks.check_characters("structured", text)
    return value


def _repetition_penalty(value: object) -> float:
    """A logit divided by a smaller one could exceed what the device can hold."""
    penalty = checks.number("repetition_penalty", value, low=0.0, high=100.0, open_low=True)
    if penalty < MIN_REPETITION_PENALTY:
        raise ValueError(f"repetition_penalty must be at least {MIN_REPETITION_PENALTY:g}, got {value}")
    return penalty


def _words(values: object) -> tuple[str, ...]:
    """Each word once, counted before any is tokenized."""
    words = tuple(dict.fromkeys(checks.strings("bad_words", values)))
    if len(words) > MAX_WORDS:
        raise ValueError(f"bad_words has {len(words)} words, the limit is {MAX_WORDS}")
    return words


def _token_ids(name: str, values: object) -> tuple[int, ...]:
    return () if values is None else checks.token_ids(name, values)


def _biases(biases: object) -> dict[int, float] | None:
    if biases is None:
        return None
    if not isinstance(biases, Mapping):
        raise ValueError(f"logit_bias must map token ids to numbers, got {biases!r:.200}")
    return {
        checks.integer("logit_bias", token, low=0): checks.number(
            f"logit_bias of token {token}", bias, low=-100.0, high=100.0
        )
        for token, bias in cast("Mapping[object, object]", biases).items()
    }
