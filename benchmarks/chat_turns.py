"""How much of their first turns second turns find in the prefix cache, and how soon they begin, recorded.

Two-turn questions, asked again with other seeds until there are enough turns, by the model's chat template
or, where it has none, as one text. The same model runs in two engines, one of which keeps no prefixes: every
second turn is asked in both, one after the other, so that their times compare. The aims: 90% of the full
pages of first turns (prompt and answer) found, and first tokens sooner accordingly.

    python benchmarks/chat_turns.py ../shared/data/models/stories260k \\
        ../shared/data/prompts/mt_bench_question.jsonl
"""

import argparse
import os
import statistics
from pathlib import Path

from albireo_jax.core.config import CacheConfig, EngineConfig, SchedulerConfig
from albireo_jax.launch import Engine, launch
from albireo_jax.measure.records import Record, Series, cpu_device, write_record
from benchmarks.lib.second_turns import (
    ChatEngines,
    ChatLengths,
    Question,
    SecondTurn,
    bench_turns,
    first_token_ratio,
    page_share,
    read_questions,
)

ROOT = Path(__file__).resolve().parents[1]
NOTE = (
    "One sample per second turn. Pages: full ones of the first turn's prompt and answer, found by the second "
    "turn's prompt, which is made of both as texts and the next question, encoded again. The key and value "
    "of an answer's last token are never computed, so an answer that fills its last page leaves it unfound. "
    "Times are from sending a prompt, alone, to its first token, in both engines in turns."
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a built-in name, folder or GGUF file")
    parser.add_argument("questions", type=Path, help="JSON lines with two turns each")
    parser.add_argument("--turns", type=int, default=1000)
    parser.add_argument("--users", type=int, default=8, help="first turns at once")
    parser.add_argument("--context", type=int, default=512, help="tokens of a conversation at most")
    parser.add_argument("--first-prompt", type=int, default=224, help="tokens of what is said first, at most")
    parser.add_argument("--answer", type=int, default=64, help="tokens of an answer at most")
    parser.add_argument("--max-step-tokens", type=int, default=128)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args()


def launched(options: argparse.Namespace, *, prefix_caching: bool) -> Engine:
    config = EngineConfig(
        model=options.model,
        max_model_len=options.context,
        max_logprobs=0,
        cache=CacheConfig(prefix_caching=prefix_caching),
        scheduler=SchedulerConfig(max_rows=options.users, max_step_tokens=options.max_step_tokens),
    )
    return launch(config)


def converse(caching: Engine, plain: Engine, *, options: argparse.Namespace) -> list[SecondTurn]:
    """The second turns of as many conversations as `--turns` asks for."""
    questions = read_questions(options.questions)
    lengths = ChatLengths(
        first_prompt=options.first_prompt, answer=options.answer, conversation=options.context
    )
    engines = ChatEngines(caching.frontend, plain.frontend, caching.tokenizer)

    def ask(asked: list[Question], seed: int) -> list[SecondTurn]:
        return bench_turns(engines, asked, lengths=lengths, users=options.users, seed=seed)

    ask(questions[: options.users], 0)  # warms up; its seed is not used again
    turns: list[SecondTurn] = []
    seed = 0
    while 2 * len(turns) < options.turns:
        seed += 1
        turns += ask(questions[: -(-options.turns // 2) - len(turns)], seed)
        print(f"{2 * len(turns)} turns")
    return turns


def series(turns: list[SecondTurn], *, page_size: int) -> list[Series]:
    columns = {
        ("caching", "first turn's pages found", "pages"): [turn.found_pages(page_size) for turn in turns],
        ("caching", "first turn's pages", "pages"): [turn.first_tokens // page_size for turn in turns],
        ("caching", "second prompt", "tokens"): [turn.prompt_tokens for turn in turns],
        ("caching", "second prompt, cached", "tokens"): [turn.cached_tokens for turn in turns],
        ("caching", "time to first token", "s"): [turn.caching_s for turn in turns],
        ("plain", "time to first token", "s"): [turn.plain_s for turn in turns],
    }
    return [
        Series(subject=subject, case="second turns", metric=metric, unit=unit, samples=tuple(samples))
        for (subject, metric, unit), samples in columns.items()
    ]


def render(turns: list[SecondTurn], *, page_size: int) -> str:
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
    options = arguments()
    load_before = os.getloadavg()[0]
    caching = launched(options, prefix_caching=True)
    plain = launched(options, prefix_caching=False)
    page_size = caching.limits.page_size
    try:
        turns = converse(caching, plain, options=options)
    finally:
        caching.close()
        plain.close()
    print(render(turns, page_size=page_size))
    settings = {name: value for name, value in vars(options).items() if name != "output"}
    record = Record(
        name=f"turns-{caching.served_name}",
        device=cpu_device(),
        settings={
            **settings,
            "model": caching.served_name,
            "questions": options.questions.name,
            "pages": caching.limits.num_pages,
        },
        series=series(turns, page_size=page_size),
        note=NOTE,
        load_before=load_before,
    )
    print(write_record(record, options.output))


if __name__ == "__main__":
    main()
