"""From a prompt's token ids and sampling parameters to the requests that the engine takes."""

import itertools
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from albireo_jax.core.errors import ContextLengthError
from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.logit_rules import MAX_BAD_WORD_TOKENS, NO_RULES, LogitRules
from albireo_jax.core.plan import Int32s
from albireo_jax.core.token_ids import token_array
from albireo_jax.core.token_sampling import MAX_SEED
from albireo_jax.core.types import Request, SamplingParams, StructuredOutput
from albireo_jax.sched.prefix_tree import packed_digests
from albireo_jax.text.bounded_cache import BoundedCache
from albireo_jax.text.grammar.notation import size_of
from albireo_jax.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptFree:
    """The part of requests that follows from the sampling parameters alone, made once for all prompts."""

    stop_ids: tuple[int, ...]
    rules: LogitRules | None


_MAX_MASKS = 256
_MAX_MASK_BYTES = 2**24  # of the masks and of the texts that they belong to


class RequestWriter:
    """Writes requests under ids of their own; any thread may call it. `clock` gives their arrivals.

    `compile_first` has a constraint compiled in the engine, and gives the mask of an answer's first token.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        limits: EngineLimits,
        *,
        eos_token_ids: Sequence[int],
        clock: Callable[[], float],
        compile_first: "Callable[[StructuredOutput], Future[Int32s]]",
    ) -> None:
        self._tokenizer = tokenizer
        self._limits = limits
        # A tokenizer may know more tokens than the model, which then never samples them.
        self._eos_token_ids = tuple(token_id for token_id in eos_token_ids if token_id < limits.vocab_size)
        self._clock = clock
        self._next_id = itertools.count()
        self._compile_first = compile_first
        self._lock = threading.Lock()  # guards the next
        self._first_masks = BoundedCache[StructuredOutput, Int32s](_MAX_MASKS, max_bytes=_MAX_MASK_BYTES)

    def prepare(self, structured: StructuredOutput) -> "Future[Int32s]":
        """Have a constraint compiled, so that `write` need not wait for it; may take seconds.

        The future, or the call, raises as `EngineService.first_mask` does.
        """
        future = self._compile_first(structured)
        future.add_done_callback(lambda done: self._keep_mask(structured, done))
        return future

    def prompt_free(self, params: SamplingParams) -> PromptFree:
        """The part of the requests that is the same for every prompt. Raises ValueError."""
        stop_ids = params.stop_token_ids
        if not params.ignore_eos:
            stop_ids = (*self._eos_token_ids, *stop_ids)
        rules = self._rules(params)
        self._check_first_token(params, stop_ids, rules=rules or NO_RULES)
        return PromptFree(stop_ids=tuple(dict.fromkeys(stop_ids)), rules=rules)

    def write(
        self,
        token_ids: tuple[int, ...],
        params: SamplingParams,
        *,
        cache_salt: str = "",
        priority: int = 0,
        prompt_free: PromptFree | None = None,
    ) -> list[Request]:
        """The n requests of a prompt, their seeds one after the other. Raises ValueError.

        `prompt_free` is that of the same `params`, made now if it is not given.
        """
        max_tokens = self._limits.resolve_max_tokens(len(token_ids), params.max_tokens)
        if params.min_tokens > max_tokens:
            raise ValueError(
                f"min_tokens {params.min_tokens} exceeds the {max_tokens} tokens left beside the prompt"
            )
        seed = random.randint(0, MAX_SEED) if params.seed is None else params.seed
        arrived_s = self._clock()
        prompt = token_array("the prompt", token_ids)  # one for all samples
        digests = packed_digests(prompt, salt=cache_salt, page_size=self._limits.page_size)
        same = self.prompt_free(params) if prompt_free is None else prompt_free
        logprobs = self._limits.resolve_logprobs("logprobs", params.logprobs)
        prompt_logprobs = self._limits.resolve_logprobs("prompt_logprobs", params.prompt_logprobs)
        return [
            Request(
                request_id=f"r{next(self._next_id)}",
                prompt_token_ids=prompt,
                max_tokens=max_tokens,
                min_tokens=params.min_tokens,
                sampling=params.with_seed((seed + sample) % (MAX_SEED + 1)),
                stop_ids=same.stop_ids,
                rules=same.rules,
                structured=params.structured,
                ignore_eos=params.ignore_eos,
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
                cache_salt=cache_salt,
                priority=priority,
                page_digests=digests,
                arrived_s=arrived_s,
            )
            for sample in range(params.n)
        ]

    def _first_token_ids(self, structured: StructuredOutput, *, ignore_eos: bool) -> Int32s:
        """The tokens that an answer may begin with; waits until they are known. Raises as `prepare`."""
        with self._lock:
            mask = self._first_masks.get(structured)
        if mask is None:
            mask = self.prepare(structured).result()
        token_ids = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).astype(np.int32)
        return token_ids[~np.isin(token_ids, self._eos_token_ids)] if ignore_eos else token_ids

    def _keep_mask(self, structured: StructuredOutput, done: "Future[Int32s]") -> None:
        if done.cancelled() or done.exception() is not None:
            return
        mask = done.result()
        with self._lock:
            self._first_masks.put(structured, mask, num_bytes=size_of(structured) + mask.nbytes)

    def _rules(self, params: SamplingParams) -> LogitRules | None:
        """The rules of `params` in token ids; None if they change nothing."""
        words = (ids for word in params.bad_words for ids in self._spellings(word))
        rules = LogitRules(
            repetition_penalty=float(params.repetition_penalty),
            presence_penalty=float(params.presence_penalty),
            frequency_penalty=float(params.frequency_penalty),
            logit_bias=tuple((token_id, float(bias)) for token_id, bias in (params.logit_bias or {}).items()),
            allowed_token_ids=token_array("allowed_token_ids", params.allowed_token_ids or ()),
            bad_words=tuple(dict.fromkeys(words)),
        )
        return None if rules == NO_RULES else rules

    def _check_first_token(
        self,
        params: SamplingParams,
        stop_ids: Sequence[int],
        *,
        rules: LogitRules,
    ) -> None:
        """Raise ValueError if the rules of a request leave no token that its answer could begin with."""
        banned = [word[0] for word in rules.bad_words if len(word) == 1]
        banned += stop_ids if params.min_tokens else ()
        if len(rules.allowed_token_ids):
            name, allowed = "allowed_token_ids", rules.allowed_token_ids
        elif params.structured is not None:
            name = "structured output"
            allowed = self._first_token_ids(params.structured, ignore_eos=params.ignore_eos)
        elif len(banned) >= self._limits.vocab_size:
            name, allowed = "bad_words", np.arange(self._limits.vocab_size, dtype=np.int32)
        else:
            return
        if np.isin(allowed, banned).all():
            raise ValueError(
                f"{name} leaves no token to begin an answer with: the {len(allowed)} that are allowed are "
                f"banned by bad_words, or end it before min_tokens {params.min_tokens}"
            )

    def _spellings(self, word: str) -> list[tuple[int, ...]]:
        """Token ids of a word at the beginning of a text, and behind a space."""
        bare = word.lstrip(" ")
        if not bare:
            raise ValueError(f"bad_words holds {word!r}, which is nothing but spaces")
        return [self._spelling(text, word=word) for text in (bare, f" {bare}")]

    def _spelling(self, text: str, *, word: str) -> tuple[int, ...]:
        try:
            token_ids = self._tokenizer.encode(
                text, add_special_tokens=False, context_len=MAX_BAD_WORD_TOKENS + 1
            )
        except ContextLengthError as error:
            raise ValueError(
                f"bad_words holds {word!r:.80}, a word of {len(word)} characters; "
                f"the limit is {MAX_BAD_WORD_TOKENS} tokens"
            ) from error
        return tuple(token_ids)
