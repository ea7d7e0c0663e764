"""Offsets of tokens are true of the text that is given, and special tokens can be stop strings."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from albireo_jax.core.types import FinishReason, SamplingParams
from albireo_jax.serving.openai_logprobs import CompletionLogprobsWriter
from albireo_jax.text.detokenizer import Detokenizer, TextDelta, TextOffsets
from albireo_jax.text.tokenizer import Tokenizer
from tests.labs.tokenizer_lab import TOKENIZERS

IDS = st.lists(st.integers(0, 400), max_size=10)


def _known(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    return [token_id % tokenizer.vocab_size for token_id in ids]


@given(st.sampled_from(sorted(TOKENIZERS)), IDS, IDS, st.booleans())
def test_an_offset_is_the_length_of_the_text_before(
    name: str, prompt: list[int], answer: list[int], skip: bool
) -> None:
    tokenizer = TOKENIZERS[name]
    prompt, answer = _known(tokenizer, prompt), _known(tokenizer, answer)
    params = SamplingParams(skip_special_tokens=skip)
    detokenizer = Detokenizer(tokenizer, params, prompt_token_ids=prompt)
    echo = tokenizer.decode(prompt, skip_special_tokens=False)
    alone = TextOffsets(tokenizer, params, prompt_token_ids=prompt)
    echoed = TextOffsets(tokenizer, params, prompt_token_ids=prompt, echo=echo)
    of_prompt = [echoed.next(token_id) for token_id in prompt]
    assert of_prompt == sorted(of_prompt)
    length = 0
    for token_id in answer:
        assert (alone.next(token_id), echoed.next(token_id) - len(echo)) == (
            length,
            length,
        )
        length += len(detokenizer.push([token_id]).text)


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_a_text_begins_where_its_token_says(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    eos = tokenizer.eos_token_ids[0]
    text = "a你🙂 the abc"
    prompt = tokenizer.encode(text)  # the beginning token is not in the text
    answer = [
        *tokenizer.encode("é", add_special_tokens=False),
        eos,
        *tokenizer.encode("ab🙂", add_special_tokens=False),
    ]
    params = SamplingParams()
    given = (
        text + Detokenizer(tokenizer, params, prompt_token_ids=prompt).push(answer, FinishReason.LENGTH).text
    )
    for as_ids in (False, True):
        offsets = TextOffsets(tokenizer, params, prompt_token_ids=prompt, echo=text)
        writer = CompletionLogprobsWriter(tokenizer, num_top=0, as_ids=as_ids, offsets=offsets)
        pieces = [writer.write([token_id], [None]) for token_id in (*prompt, *answer)]
        for token_id, piece in zip((*prompt, *answer), pieces, strict=True):
            spelled = tokenizer.token_bytes(skip_special_tokens=True)[token_id].decode("utf-8", "replace")
            (offset,) = piece["text_offset"]
            assert "\ufffd" in spelled or given[offset:].startswith(
                spelled.removeprefix(" " if offset == 0 else "")
            )
            assert piece["tokens"][0].startswith("token_id:") == as_ids


def _special() -> tuple[Tokenizer, int, list[int]]:
    tokenizer = TOKENIZERS["byte_level"]
    return tokenizer, tokenizer.eos_token_ids[0], tokenizer.encode("Fine.", add_special_tokens=False)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("stop", ["<|im_end|>", "<|im_end|>user", ".<|im_end|>u", "e.<|im_end|>"])
@pytest.mark.parametrize("one_by_one", [True, False])
def test_a_special_token_can_be_in_a_stop_string(
    skip: bool, include: bool, stop: str, one_by_one: bool
) -> None:
    tokenizer, eos, fine = _special()
    ids = [*fine, eos, *tokenizer.encode("user\nAnd?", add_special_tokens=False)]
    params = SamplingParams(
        stop=(stop,), skip_special_tokens=skip, include_stop_str_in_output=include, ignore_eos=True
    )
    detokenizer = Detokenizer(tokenizer, params)
    portions = [[token_id] for token_id in ids] if one_by_one else [ids]
    deltas = [detokenizer.push(portion) for portion in portions]
    whole = "Fine.<|im_end|>user\nAnd?"
    expected = whole[: whole.index(stop) + len(stop) * include]
    # Special tokens that are only before the stop string stay hidden; in it they are shown with it.
    assert "".join(delta.text for delta in deltas) == expected
    ended = next(delta for delta in deltas if delta.finish_reason is not None)
    assert (ended.finish_reason, ended.stop_reason) == (FinishReason.STOP, stop)


@pytest.mark.parametrize("skip", [True, False])
def test_the_end_of_sequence_can_be_a_stop_string(skip: bool) -> None:
    tokenizer, eos, fine = _special()

    def end(**options: object) -> TextDelta:
        params = SamplingParams(skip_special_tokens=skip, **options)  # type: ignore[arg-type]
        return Detokenizer(tokenizer, params).push([*fine, eos], FinishReason.STOP)

    assert end(stop="<|im_end|>")[::2] == ("Fine.", FinishReason.STOP)
    assert end(stop="<|im_end|>").stop_reason == "<|im_end|>"
    assert end(stop=".<|im_end|>").text == "Fine"
    assert end(stop="<|im_end|>", include_stop_str_in_output=True).text == "Fine.<|im_end|>"
    assert end(stop="<|im_end|>!").text == "Fine."
    assert end(stop="<|im_end|>!").stop_reason is None


def test_a_hidden_token_is_given_to_nobody() -> None:
    tokenizer, eos, fine = _special()
    params = SamplingParams(stop=("<|im_end|>user",), ignore_eos=True)
    detokenizer = Detokenizer(tokenizer, params)
    deltas = [detokenizer.push([token_id]) for token_id in (eos, *fine, eos, *fine, eos)]
    deltas.append(detokenizer.push([], FinishReason.LENGTH))
    assert "".join(delta.text for delta in deltas) == "Fine.Fine."
