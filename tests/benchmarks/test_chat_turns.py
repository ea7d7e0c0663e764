"""Second turns find the pages of their first ones, and the figures say how many."""

import json
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.chat_turns import (
    ChatEngines,
    ChatLengths,
    ChatQuestion,
    SecondTurn,
    bench_turns,
    first_token_ratio,
    page_share,
    read_questions,
)
from tests.labs.engine_lab import lab

LENGTHS = ChatLengths(first_prompt=70, answer=20, conversation=250)
QUESTIONS = [
    ChatQuestion(
        f"{nth} " + "How does one count sheep at night? " * (1 + nth % 3), "And by day? " * (1 + nth)
    )
    for nth in range(7)
]


@contextmanager
def engines(*, plain_shares: bool = False) -> Generator[ChatEngines, None, None]:
    with lab() as caching, lab(shares_prefixes=plain_shares) as plain:
        yield ChatEngines(caching.frontend, plain.frontend, caching.tokenizer)


def test_second_turns_find_their_first_prompts() -> None:
    with engines() as pair:
        turns = bench_turns(pair, QUESTIONS, lengths=LENGTHS, users=3)
        prompts = [
            pair.caching.encode([{"role": "user", "content": question.first[:70]}]) for question in QUESTIONS
        ]
    for turn, prompt in zip(turns, prompts, strict=True):
        assert 1 <= turn.first_tokens - len(prompt) <= 20
        # Random answers hold special tokens, which are no text: behind one, a second prompt is another.
        assert len(prompt) // 16 <= turn.found_pages(16) <= turn.first_tokens // 16
        assert turn.cached_tokens < turn.prompt_tokens <= 230
        assert min(turn.caching_s, turn.plain_s) > 0
    assert any(turn.found_pages(16) > len(prompt) // 16 for turn, prompt in zip(turns, prompts, strict=True))


def test_only_conversations_with_the_same_seed_find_each_other() -> None:
    with engines(plain_shares=True) as pair:
        for seed in (1, 2):
            bench_turns(pair, QUESTIONS[:2], lengths=LENGTHS, users=1, seed=seed)
        with pytest.raises(ValueError, match="the plain engine had"):
            bench_turns(pair, QUESTIONS[:2], lengths=LENGTHS, users=1, seed=1)


def test_the_share_is_of_full_pages_and_the_ratio_of_medians() -> None:
    def turn(first_tokens: int, cached_tokens: int, caching_s: float) -> SecondTurn:
        return SecondTurn(
            first_tokens=first_tokens,
            prompt_tokens=200,
            cached_tokens=cached_tokens,
            caching_s=caching_s,
            plain_s=0.5,
        )

    turns = [turn(47, 32, 0.1), turn(64, 80, 0.2), turn(48, 16, 9.0)]
    assert [each.found_pages(16) for each in turns] == [2, 4, 1]
    assert page_share(turns, page_size=16) == 7 / 9
    assert first_token_ratio(turns) == 0.4


def test_lengths_leave_room_for_a_second_turn() -> None:
    with pytest.raises(ValueError, match="nothing for the second turn in 110"):
        ChatLengths(first_prompt=70, answer=20, conversation=110)


def test_questions_are_read(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"question_id": 1, "turns": ["a", "b"]}) + "\n")
    assert read_questions(path) == [ChatQuestion("a", "b")]
