"""No output is lost and no request outlives its reader, in threads and in event loops."""

import asyncio
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from albireo_jax.core.errors import EngineDeadError
from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.token_sampling import MAX_SEED, TokenSampling
from albireo_jax.core.types import FinishReason, Request, SamplingParams
from albireo_jax.engine.choices import ChoiceDelta, Completion, collect
from albireo_jax.engine.frontend import Prompt
from tests.labs.engine_lab import LIMITS, Lab, tiny_tokenizer, tokens_alone
from tests.labs.service_lab import Build

PROMPTS = ("Once upon a time", "The quick brown fox", "x", "é" * 20)
FOREVER = SamplingParams(max_tokens=1500, ignore_eos=True, seed=3)


def _assert_nothing_left(engine: Lab) -> None:
    assert engine.service.drain(60)
    stats = engine.service.stats()
    assert (stats.pages_in_use, stats.waiting, stats.running) == (0, 0, 0)
    assert engine.frontend.num_readers == 0


@cache
def _alone(prompt: str, params: SamplingParams, *, seed: int) -> tuple[int, ...]:
    tokenizer = tiny_tokenizer()
    request = Request(
        request_id="alone",
        prompt_token_ids=tuple(tokenizer.encode(prompt)),
        max_tokens=params.max_tokens or 1,
        sampling=TokenSampling(temperature=params.temperature, seed=seed),
        stop_ids=() if params.ignore_eos else tokenizer.eos_token_ids,
    )
    return tuple(tokens_alone([request])["alone"])


def test_choices_are_in_order_and_their_seeds_count_up(lab: Build) -> None:
    params = SamplingParams(max_tokens=40, n=3, seed=MAX_SEED - 1)
    with lab() as engine:
        done = engine.frontend.generate(PROMPTS, params)
        _assert_nothing_left(engine)
    assert [completion.choice for completion in done] == list(range(len(PROMPTS) * 3))
    for completion in done:
        prompt, sample = divmod(completion.choice, 3)
        seed = (MAX_SEED - 1 + sample) % (MAX_SEED + 1)
        assert completion.token_ids == _alone(PROMPTS[prompt], params, seed=seed)


def test_texts_are_what_the_tokens_add_to_the_prompt(lab: Build) -> None:
    params = [SamplingParams(max_tokens=60, seed=i, n=1 + i % 2) for i in range(len(PROMPTS))]
    with lab() as engine:
        done = engine.frontend.generate(PROMPTS, params)
        prompts = [prompt for prompt, own in zip(PROMPTS, params, strict=True) for _ in range(own.n)]
        for prompt, completion in zip(prompts, done, strict=True):
            token_ids = completion.token_ids
            if completion.finish_reason is FinishReason.STOP:
                token_ids = token_ids[:-1]
            prompt_ids = engine.frontend.encode(prompt)
            whole = engine.tokenizer.decode((*prompt_ids, *token_ids))
            assert prompt + completion.text == whole


def test_a_text_its_ids_and_a_chat_are_the_same_prompt(lab: Build) -> None:
    params = SamplingParams(max_tokens=20, temperature=0)
    with lab() as engine:
        chat = [{"role": "user", "content": "hi"}]
        text = engine.tokenizer.apply_chat_template(chat)
        token_ids = engine.tokenizer.encode_chat(chat)
        done = engine.frontend.generate([chat, text, token_ids], params)
        assert len({completion.token_ids for completion in done}) == 1


def test_random_seeds_are_drawn_at_the_door(lab: Build) -> None:
    params = SamplingParams(max_tokens=30, n=4, ignore_eos=True)
    with lab() as engine:
        done = engine.frontend.generate(["same", "same"], params)
    assert len({completion.token_ids for completion in done}) == 8


def test_a_stop_string_ends_the_request_in_the_engine_too(lab: Build) -> None:
    params = SamplingParams(max_tokens=1500, ignore_eos=True, seed=1, stop=("e", "Q"))
    with lab() as engine:
        (completion,) = engine.frontend.generate(["stop"], params)
        _assert_nothing_left(engine)
        assert engine.service.stats().steps < 1500
    assert completion.finish_reason is FinishReason.STOP
    assert completion.stop_reason in ("e", "Q")
    assert not {"e", "Q"} & set(completion.text)
    assert completion.token_ids == _alone("stop", params, seed=1)[: len(completion.token_ids)]


def test_a_stop_id_ends_the_request(lab: Build) -> None:
    with lab() as engine:
        free = engine.frontend.generate(["go"], SamplingParams(max_tokens=50, seed=1, ignore_eos=True))[0]
        stop_id = free.token_ids[20]
        params = SamplingParams(max_tokens=50, seed=1, ignore_eos=True, stop_token_ids=(stop_id,))
        (stopped,) = engine.frontend.generate(["go"], params)
    first = free.token_ids.index(stop_id)
    assert stopped.token_ids == free.token_ids[: first + 1]
    assert (stopped.finish_reason, stopped.stop_reason) == (FinishReason.STOP, stop_id)


def test_leaving_a_stream_aborts_it(lab: Build) -> None:
    with lab() as engine:
        with engine.frontend.stream(PROMPTS, FOREVER) as turn:
            for deltas in turn:
                assert deltas
                break
            assert engine.frontend.num_readers == 1
        assert list(turn) == []
        _assert_nothing_left(engine)
        assert engine.service.stats().steps < 1500
        finished = engine.frontend.metrics.snapshot().finished
        assert finished[FinishReason.ABORT] == len(PROMPTS)


async def _read(engine: Lab, prompt: str, *, steps: int | None, seed: int) -> list[ChoiceDelta]:
    """The deltas of `steps` lists, then hang up; None reads to the end."""
    seen: list[ChoiceDelta] = []
    params = SamplingParams(max_tokens=30, seed=seed, n=2, ignore_eos=True)
    with engine.frontend.stream_async([prompt], params) as turn:
        count = 0
        async for deltas in turn:
            seen += deltas
            count += 1
            if steps is not None and count >= steps:
                break
    return seen


def test_readers_that_hang_up_at_random_leave_nothing_and_disturb_nobody(lab: Build) -> None:
    rng = random.Random(7)
    plans = [(rng.choice(PROMPTS), rng.choice((None, 0, 1, 5)), rng.randrange(10)) for _ in range(200)]
    limits = EngineLimits(max_model_len=128, vocab_size=LIMITS.vocab_size, num_pages=40, page_size=4)

    async def main(engine: Lab) -> list[list[ChoiceDelta]]:
        return await asyncio.gather(
            *(_read(engine, prompt, steps=steps, seed=seed) for prompt, steps, seed in plans)
        )

    with lab(limits) as engine:
        results = asyncio.run(main(engine))
        _assert_nothing_left(engine)
        assert engine.service.stats().preemptions > 0
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    for (prompt, steps, seed), deltas in zip(plans, results, strict=True):
        done = collect(deltas)
        if steps is None:
            assert [completion.finish_reason for completion in done] == [FinishReason.LENGTH] * 2
        for completion in done:
            alone = _alone(prompt, params, seed=seed + completion.choice)
            assert completion.token_ids == alone[: len(completion.token_ids)]


def test_threads_and_event_loops_share_an_engine(lab: Build) -> None:
    results: dict[int, Any] = {}

    def sync_caller(engine: Lab, key: int) -> None:
        results[key] = engine.frontend.generate(PROMPTS, SamplingParams(max_tokens=25, seed=key))

    def async_caller(engine: Lab, key: int) -> None:
        async def main() -> list[Completion]:
            return await engine.frontend.stream_async(
                PROMPTS, SamplingParams(max_tokens=25, seed=key)
            ).completions()

        results[key] = asyncio.run(main())

    with lab() as engine:
        callers: list[Callable[[Lab, int], None]] = [sync_caller, async_caller] * 4
        threads = [threading.Thread(target=caller, args=(engine, key)) for key, caller in enumerate(callers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        _assert_nothing_left(engine)
    for key in range(len(callers)):
        for prompt, completion in zip(PROMPTS, results[key], strict=True):
            params = SamplingParams(max_tokens=25)
            assert completion.token_ids == _alone(prompt, params, seed=key)


class _CountingLoop(asyncio.SelectorEventLoop):
    wake_ups = 0

    def call_soon_threadsafe(self, *args: Any, **options: Any) -> asyncio.Handle:
        self.wake_ups += 1
        return super().call_soon_threadsafe(*args, **options)


def test_a_step_wakes_an_event_loop_once_however_many_requests_it_has(lab: Build) -> None:
    async def main(engine: Lab) -> None:
        params = SamplingParams(max_tokens=50, ignore_eos=True, seed=1, n=8)
        await asyncio.gather(
            *(engine.frontend.stream_async(["busy"], params).completions() for _ in range(4))
        )

    with lab(max_rows=32) as engine, asyncio.Runner(loop_factory=_CountingLoop) as runner:
        runner.run(main(engine))
        event_loop = runner.get_loop()
        assert isinstance(event_loop, _CountingLoop)
        assert 0 < event_loop.wake_ups <= engine.service.stats().steps + 1


def test_an_event_loop_that_is_closed_takes_its_requests_along(lab: Build) -> None:
    async def abandon(engine: Lab) -> None:
        engine.frontend.stream_async(PROMPTS, FOREVER)
        engine.frontend.stream_async(PROMPTS, FOREVER)

    with lab() as engine:
        event_loop = asyncio.new_event_loop()
        event_loop.run_until_complete(abandon(engine))
        event_loop.close()
        _assert_nothing_left(engine)


def test_closing_a_turn_ends_the_wait_of_its_reader(lab: Build) -> None:
    async def main(engine: Lab) -> tuple[list[Completion], list[ChoiceDelta]]:
        whole = engine.frontend.stream_async(["a"], FOREVER)
        parts = engine.frontend.stream_async(["b"], FOREVER)

        async def read() -> list[ChoiceDelta]:
            return [delta async for deltas in parts for delta in deltas]

        readers = asyncio.gather(whole.completions(), read())
        await asyncio.sleep(0)  # lets the readers begin to wait
        whole.close()
        parts.close()
        parts.close()
        return await readers

    with lab() as engine:
        completions, deltas = asyncio.run(main(engine))
        assert completions == []
        assert len(deltas) < 1500
        _assert_nothing_left(engine)


def test_a_dead_engine_raises_in_every_reader(lab: Build) -> None:
    async def main(engine: Lab) -> list[BaseException | list[Completion]]:
        turns = [engine.frontend.stream_async([prompt], FOREVER) for prompt in PROMPTS]
        return await asyncio.gather(*(turn.completions() for turn in turns), return_exceptions=True)

    with lab(fail_at=20) as engine:
        outcomes = asyncio.run(main(engine))
        assert [type(outcome) for outcome in outcomes] == [EngineDeadError] * len(PROMPTS)
        assert engine.frontend.num_readers == 0
        with pytest.raises(EngineDeadError, match="stopped on an internal error"):
            engine.frontend.generate(["more"], FOREVER)
        assert engine.frontend.num_readers == 0


def test_a_synchronous_reader_gets_what_came_before_the_engine_died(lab: Build) -> None:
    seen: list[ChoiceDelta] = []
    with lab(fail_at=20) as engine:
        turn = engine.frontend.stream(["x"], FOREVER)
        with pytest.raises(EngineDeadError, match="stopped on an internal error"):
            seen.extend(delta for deltas in turn for delta in deltas)
    assert 0 < len(seen) < 20
    assert engine.frontend.num_readers == 0


class _TornTable:
    """Token bytes of which one token's are missing."""

    def __init__(self, whole: Sequence[bytes], torn: int) -> None:
        self._whole = whole
        self._torn = torn

    def __getitem__(self, token_id: int) -> bytes:
        if token_id == self._torn:
            raise LookupError(f"token {token_id} is torn out")
        return self._whole[token_id]


def test_a_text_that_cannot_be_read_fails_alone(lab: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(max_tokens=200, ignore_eos=True)
    good, bad = (_alone("x", params, seed=seed) for seed in (1, 2))
    torn = next(token_id for token_id in bad if token_id not in good)
    with lab() as engine:
        whole = engine.tokenizer.token_bytes()
        monkeypatch.setattr(engine.tokenizer, "token_bytes", lambda **_: _TornTable(whole, torn))

        async def main() -> list[Any]:
            turns = [engine.frontend.stream_async(["x"], replace(params, seed=seed)) for seed in (1, 2)]
            return await asyncio.gather(*(turn.completions() for turn in turns), return_exceptions=True)

        (completion,), error = asyncio.run(main())
        _assert_nothing_left(engine)
    assert completion.token_ids == good
    assert isinstance(error, LookupError)


def test_closing_the_engine_ends_open_turns_as_aborted(lab: Build) -> None:
    with lab() as engine:
        turn = engine.frontend.stream(["x"], FOREVER)
        engine.frontend.close()
        (completion,) = collect(delta for deltas in turn for delta in deltas)
    assert completion.finish_reason is FinishReason.ABORT
    assert engine.frontend.num_readers == 0


BAD: list[tuple[Prompt, SamplingParams, str]] = [
    ("", SamplingParams(), "the prompt is empty"),
    ([], SamplingParams(), "the prompt is empty"),
    ([1.5, 2], SamplingParams(), "a prompt is a text, token ids or chat messages"),  # type: ignore[list-item]
    ([10**6], SamplingParams(), "outside the vocabulary"),
    ([-1], SamplingParams(), "outside the vocabulary"),
    ("x" * 3000, SamplingParams(), "the prompt has 3000 tokens, the limit is 2047"),
    ("x", SamplingParams(max_tokens=5000), "exceed the model's limit of 2048"),
    ("x" * 2000, SamplingParams(max_tokens=None, min_tokens=100), "min_tokens 100 exceeds the 48 tokens"),
    ("x", SamplingParams(stop_token_ids=(99999,)), "outside the vocabulary"),
    ([{"role": "user", "content": "x"}, {"content": "x"}], SamplingParams(), r"messages\[1\]"),
    ("\ud800", SamplingParams(), "does not consist of characters"),
]


@pytest.mark.parametrize(("prompt", "params", "message"), BAD)
def test_a_bad_prompt_is_refused_and_opens_nothing(
    lab: Build, prompt: Prompt, params: SamplingParams, message: str
) -> None:
    with lab() as engine:
        with pytest.raises(ValueError, match=message):
            engine.frontend.generate(["good", prompt], params)
        _assert_nothing_left(engine)
        assert engine.service.stats().steps == 0


def test_parameters_are_one_for_all_or_one_for_each(lab: Build) -> None:
    with lab() as engine:
        assert engine.frontend.generate([], SamplingParams()) == []
        with pytest.raises(ValueError, match="2 prompts but 1 sampling parameters"):
            engine.frontend.generate(["a", "b"], [SamplingParams()])
        _assert_nothing_left(engine)


def test_metrics_count_every_token_and_request(lab: Build) -> None:
    params = SamplingParams(max_tokens=20, n=2, seed=1)
    with lab() as engine:
        done = engine.frontend.generate(PROMPTS, params)
        snapshot = engine.frontend.metrics.snapshot()
        num_prompt_tokens = sum(len(engine.frontend.encode(prompt)) for prompt in PROMPTS)
    num_generated = sum(len(completion.token_ids) for completion in done)
    assert snapshot.generated_tokens == num_generated
    assert snapshot.prompt_tokens == 2 * num_prompt_tokens
    assert snapshot.first_token_s.count == snapshot.request_s.count == len(done)
    assert snapshot.inter_token_s.count == num_generated - len(done)
    assert sum(snapshot.finished.values()) == len(done)


def test_only_calls_of_the_same_salt_find_each_others_prefixes(lab: Build) -> None:
    params = SamplingParams(max_tokens=5, ignore_eos=True, seed=1)
    prompt = "twice told tales, " * 4
    found = (len(prompt) - 1) // LIMITS.page_size * LIMITS.page_size

    with lab() as engine:
        frontend = engine.frontend

        async def ask(salt: str) -> list[Completion]:
            return await frontend.stream_async([prompt], params, cache_salt=salt).completions()

        salts = ("", "a", "a", "ü", "", "b", "ü")
        done = [frontend.generate([prompt], params, cache_salt=salt)[0] for salt in salts]
        assert [completion.cached_tokens for completion in done] == [0, 0, found, 0, found, 0, found]
        assert len({completion.token_ids for completion in done}) == 1
        assert [asyncio.run(ask(salt))[0].cached_tokens for salt in ("b", "c", "c")] == [found, 0, found]
        with pytest.raises(ValueError, match="cache_salt"):
            frontend.generate([prompt], params, cache_salt="\ud800")
        with frontend.stream([prompt], params, cache_salt="a") as turn:
            deltas = [delta for deltas in turn for delta in deltas]
        assert [delta.cached_tokens for delta in deltas] == [found, 0, 0, 0, 0]


def test_samples_of_a_prompt_are_told_of_hits_one_by_one(lab: Build) -> None:
    params = SamplingParams(max_tokens=3, n=2)
    prompts = ["a" * 40, "b" * 20, "c" * 16]
    with lab() as engine:
        engine.frontend.generate(prompts, params)
        done = engine.frontend.generate(prompts, params)
    assert [completion.cached_tokens for completion in done] == [32, 32, 16, 16, 0, 0]
