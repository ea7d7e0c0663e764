"""Second turns of chats: the part of the first that they find in the prefix cache, and their first tokens.

Two-turn questions, asked again with other seeds until there are enough turns. A second turn's prompt is made
of texts: of what the user said, what the model answered and what the user says next, by the model's chat
template or, where it has none, one text after the other. It is encoded again, so what is found of an answer
depends on the tokenizer too, which need not cut a text into the tokens that it came as.

The same model runs in two engines, one of which keeps no prefixes: every second turn is asked in both, one
after the other, so that their times compare. The aims: 90% of the full pages of first turns (prompt and
answer) found, and first tokens sooner accordingly.

    python -m benchmarks.chat_turns MODEL QUESTIONS.jsonl
"""

import json
import statistics
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

from albireo_jax.core.config import CacheConfig, EngineConfig, SchedulerConfig
from albireo_jax.core.types import SamplingParams
from albireo_jax.engine.frontend import Frontend
from albireo_jax.launch import Engine, launch
from albireo_jax.measure.records import Series, series_by_metric
from albireo_jax.text.tokenizer import Tokenizer
from benchmarks.lib.recording import Recording, script_parser

NOTE = (
    "One sample per second turn. Pages: full ones of the first turn's prompt and answer, found by the second "
    "turn's prompt, which is made of both as texts and the next question, encoded again. The key and value "
    "of an answer's last token are never computed, so an answer that fills its last page leaves it unfound. "
    "Times are from sending a prompt, alone, to its first token, in both engines in turns."
)


class ChatQuestion(NamedTuple):
    """The first and the second message of a user."""

    first: str
    second: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatLengths:
    """Tokens at most: of what is said first, of an answer, and of all that a conversation comes to."""

    first_prompt: int
    answer: int
    conversation: int

    def __post_init__(self) -> None:
        """Refuse lengths with which a second turn could say nothing."""
        if self.first_prompt + 2 * self.answer >= self.conversation:
            raise ValueError(
                f"first prompts of {self.first_prompt} tokens and two answers of {self.answer} leave nothing "
                f"for the second turn in {self.conversation}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SecondTurn:
    """A second turn in an engine that keeps prefixes and in one that does not.

    The first turn's prompt and answer have `first_tokens`; of the second's `prompt_tokens`, `cached_tokens`
    were found. Seconds are from sending the prompt to its first token.
    """

    first_tokens: int
    prompt_tokens: int
    cached_tokens: int
    caching_s: float
    plain_s: float

    def found_pages(self, page_size: int) -> int:
        """Of the first turn's full pages, those that were found."""
        return min(self.first_tokens, self.cached_tokens) // page_size


class ChatEngines(NamedTuple):
    """Two engines of one model, one with a prefix cache and one without, and the model's tokenizer."""

    caching: Frontend
    plain: Frontend
    tokenizer: Tokenizer


class _Asking(NamedTuple):
    """How a group of users ask, and whose prefixes they may find."""

    params: SamplingParams
    salt: str


class _FirstTurn(NamedTuple):
    """The tokens of a first prompt and its answer, and the second turn's prompt."""

    token_ids: tuple[int, ...]
    next_prompt: tuple[int, ...]


class _Timed(NamedTuple):
    """Seconds to the first token, and the prompt tokens that were found."""

    first_s: float
    cached_tokens: int


def read_questions(path: Path) -> list[ChatQuestion]:
    """The first two turns of each line of a JSON-lines file, which has them under `turns`."""
    with path.open(encoding="utf-8") as file:
        return [ChatQuestion(*json.loads(line)["turns"][:2]) for line in file]


def bench_turns(
    engines: ChatEngines,
    questions: Sequence[ChatQuestion],
    *,
    lengths: ChatLengths,
    users: int,
    seed: int = 0,
) -> list[SecondTurn]:
    """The second turn of each question, in order.

    So many `users` at once have their first turns; then each has its second one alone, in both engines, which
    take turns to be the first. Groups of users find nothing of each other, nor of calls with another `seed`,
    which also makes other answers. Raises ValueError if the plain engine finds anything.
    """
    params = SamplingParams(max_tokens=lengths.answer, temperature=0.8, seed=seed)
    turns: list[SecondTurn] = []
    for begin in range(0, len(questions), users):
        asking = _Asking(params, f"{seed}/{begin}")
        group = questions[begin : begin + users]
        for first in _first_turns(engines, group, lengths=lengths, asking=asking):
            prompt = first.next_prompt[: lengths.conversation - lengths.answer]
            if len(turns) % 2:
                caching = _second_turn(engines.caching, prompt, asking=asking)
                plain = _second_turn(engines.plain, prompt, asking=asking)
            else:
                plain = _second_turn(engines.plain, prompt, asking=asking)
                caching = _second_turn(engines.caching, prompt, asking=asking)
            if plain.cached_tokens:
                raise ValueError(
                    f"the plain engine had {plain.cached_tokens} tokens of a prompt in its cache"
                )
            turns.append(
                SecondTurn(
                    first_tokens=len(first.token_ids),
                    prompt_tokens=len(prompt),
                    cached_tokens=caching.cached_tokens,
                    caching_s=caching.first_s,
                    plain_s=plain.first_s,
                )
            )
    return turns


def page_share(turns: Sequence[SecondTurn], *, page_size: int) -> float:
    """Of all first turns' full pages, the part that the second turns found."""
    found = sum(turn.found_pages(page_size) for turn in turns)
    return found / sum(turn.first_tokens // page_size for turn in turns)


def first_token_ratio(turns: Sequence[SecondTurn]) -> float:
    """Median time to the first token where prefixes are kept, over that where they are not."""
    caching_s = statistics.median(turn.caching_s for turn in turns)
    return caching_s / statistics.median(turn.plain_s for turn in turns)


def _first_turns(
    engines: ChatEngines, questions: Sequence[ChatQuestion], *, lengths: ChatLengths, asking: _Asking
) -> list[_FirstTurn]:
    """The first turns of some users at once, in the engine that keeps prefixes."""
    firsts = [_cut(question.first, lengths.first_prompt, engines.tokenizer) for question in questions]
    prompts = [_prompt(engines, (first,)) for first in firsts]
    answers = engines.caching.generate(prompts, asking.params, cache_salt=asking.salt)
    return [
        _FirstTurn(
            token_ids=(*prompt, *answer.token_ids),
            next_prompt=_prompt(engines, (first, answer.text, question.second)),
        )
        for question, first, prompt, answer in zip(questions, firsts, prompts, answers, strict=True)
    ]


def _cut(text: str, num_tokens: int, tokenizer: Tokenizer) -> str:
    """The text, or as much of it as so many tokens come to."""
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    return text if len(token_ids) <= num_tokens else tokenizer.decode(token_ids[:num_tokens])


def _prompt(engines: ChatEngines, said: tuple[str, ...]) -> tuple[int, ...]:
    """The prompt of the user's latest turn, from the messages of user and model."""
    if engines.tokenizer.has_chat_template:
        roles = cycle(("user", "assistant"))
        return engines.caching.encode(
            [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]
        )
    return engines.caching.encode("\n".join(("".join(said[:2]), *said[2:])))


def _second_turn(frontend: Frontend, prompt: tuple[int, ...], *, asking: _Asking) -> _Timed:
    """One prompt alone, answered to the end."""
    begin_s = time.perf_counter()
    with frontend.stream([prompt], asking.params, cache_salt=asking.salt) as turn:
        deltas = [(delta, time.perf_counter() - begin_s) for batch in turn for delta in batch]
    return _Timed(
        first_s=deltas[0][1],
        cached_tokens=sum(delta.cached_tokens for delta, _ in deltas),
    )


def parser() -> ArgumentParser:
    made = script_parser(__doc__)
    made.add_argument("model", help="a built-in name, folder or GGUF file")
    made.add_argument("questions", type=Path, help="JSON lines with two turns each")
    made.add_argument("--turns", type=int, default=1000)
    made.add_argument("--users", type=int, default=8, help="first turns at once")
    made.add_argument("--context", type=int, default=512, help="tokens of a conversation at most")
    made.add_argument("--first-prompt", type=int, default=224, help="tokens of what is said first, at most")
    made.add_argument("--answer", type=int, default=64, help="tokens of an answer at most")
    made.add_argument("--max-step-tokens", type=int, default=128)
    return made


def launched(options: Namespace, *, prefix_caching: bool) -> Engine:
    config = EngineConfig(
        model=options.model,
        max_model_len=options.context,
        max_logprobs=0,
        cache=CacheConfig(prefix_caching=prefix_caching),
        scheduler=SchedulerConfig(max_rows=options.users, max_step_tokens=options.max_step_tokens),
    )
    return launch(config)


def converse(engines: ChatEngines, *, options: Namespace) -> list[SecondTurn]:
    """The second turns of as many conversations as `--turns` asks for."""
    questions = read_questions(options.questions)
    lengths = ChatLengths(
        first_prompt=options.first_prompt, answer=options.answer, conversation=options.context
    )

    def ask(asked: list[ChatQuestion], seed: int) -> list[SecondTurn]:
        return bench_turns(engines, asked, lengths=lengths, users=options.users, seed=seed)

    ask(questions[: options.users], 0)  # warms up; its seed is not used again
    turns: list[SecondTurn] = []
    seed = 0
    while 2 * len(turns) < options.turns:
        seed += 1
        turns += ask(questions[: -(-options.turns // 2) - len(turns)], seed)
        print(f"{2 * len(turns)} turns")
    return turns


def series_of(turns: Sequence[SecondTurn], *, page_size: int) -> list[Series]:
    caching = {
        ("first turn's pages found", "pages"): [turn.found_pages(page_size) for turn in turns],
        ("first turn's pages", "pages"): [turn.first_tokens // page_size for turn in turns],
        ("second prompt", "tokens"): [turn.prompt_tokens for turn in turns],
        ("second prompt, cached", "tokens"): [turn.cached_tokens for turn in turns],
        ("time to first token", "s"): [turn.caching_s for turn in turns],
    }
    plain = {("time to first token", "s"): [turn.plain_s for turn in turns]}
    case = "second turns"
    return [*series_by_metric("caching", case, caching), *series_by_metric("plain", case, plain)]


def render(turns: Sequence[SecondTurn], *, page_size: int) -> str:
    caching_s, plain_s = [turn.caching_s for turn in turns], [turn.plain_s for turn in turns]
    cached = sum(turn.cached_tokens for turn in turns) / sum(turn.prompt_tokens for turn in turns)
    return "\n".join(
        (
            f"{2 * len(turns)} turns",
            f"{page_share(turns, page_size=page_size):9.4f} of the first turns' full pages were found",
            f"{cached:9.4f} of the tokens of second prompts were found",
            f"{1e3 * statistics.median(caching_s):9.2f} ms to a second turn's first token, median",
            f"{1e3 * statistics.median(plain_s):9.2f} ms without prefix caching",
            f"{first_token_ratio(turns):9.4f} of that time",
        )
    )


def main() -> None:
    recording = Recording.begin(parser())
    options = recording.options
    with (
        closing(launched(options, prefix_caching=True)) as caching,
        closing(launched(options, prefix_caching=False)) as plain,
    ):
        name, limits = caching.served_name, caching.limits
        engines = ChatEngines(caching.frontend, plain.frontend, caching.tokenizer)
        turns = converse(engines, options=options)
    print(render(turns, page_size=limits.page_size))
    recording.write(
        f"turns-{name}",
        series_of(turns, page_size=limits.page_size),
        note=NOTE,
        settings={"model": name, "pages": limits.num_pages},
    )


if __name__ == "__main__":
    main()
