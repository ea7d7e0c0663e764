"""Every field that another server knows is honoured, without effect on the answer, or refused by name."""

import asyncio
from typing import Any

import httpx
import openai.types.chat.completion_create_params as openai_chat
import openai.types.completion_create_params as openai_completion
import pytest

from albireo_jax.serving.app import create_app
from albireo_jax.serving.schemas.chat_bodies import ChatBody
from albireo_jax.serving.schemas.completion_bodies import CompletionBody
from albireo_jax.serving.schemas.foreign_fields import FOREIGN, INSTEAD
from albireo_jax.serving.schemas.strict_model import StrictModel
from tests.labs.engine_lab import Lab
from tests.labs.http_lab import in_process

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f"}}
BODIES: dict[str, tuple[type[StrictModel], dict[str, Any]]] = {
    COMPLETIONS: (CompletionBody, {"prompt": "x", "seed": 3, "max_tokens": 4}),
    CHAT: (ChatBody, {"messages": HELLO, "seed": 3, "max_tokens": 4}),
}
WITHOUT_EFFECT: dict[str, Any] = {
    "user": "me",
    "metadata": {"a": "b"},
    "store": True,
    "service_tier": "flex",
    "safety_identifier": "x",
    "prompt_cache_key": "x",
    "prompt_cache_retention": "24h",
    "prompt_cache_options": {"ttl": "5m"},
    "session_id": "x",
    "keep_alive": -1,
    "provider": {"order": ["a"]},
    "stream_interval": 4,
    "data_parallel_rank": 0,
    "routed_dp_rank": 0,
    "disagg_prefill_dp_rank": 0,
    "max_dynamic_patch": 4,
    "min_dynamic_patch": 1,
    "use_audio_in_video": True,
    "return_mm_kwargs": False,
    "custom_labels": {"a": "b"},
    "ngram_corpus_id": "x",
    "guided_decoding_backend": "auto",
    "usage": {"include": True},
    "id_slot": -1,
}
OPENAI = {
    COMPLETIONS: openai_completion.CompletionCreateParamsBase.__annotations__,
    CHAT: openai_chat.CompletionCreateParamsBase.__annotations__,
}
OTHER_SERVERS = """
    use_beam_search top_k min_p repetition_penalty watermarking length_penalty stop_token_ids
    include_stop_str_in_output ignore_eos min_tokens skip_special_tokens spaces_between_special_tokens
    truncate_prompt_tokens truncation_side prompt_logprobs logprob_token_ids allowed_token_ids bad_words echo
    add_generation_prompt continue_final_message add_special_tokens documents chat_template
    chat_template_kwargs media_io_kwargs mm_processor_kwargs structured_outputs priority request_id session_id
    return_tokens_as_token_ids return_token_ids routed_experts_prompt_start return_token_offsets
    return_prompt_text return_mm_kwargs cache_salt kv_transfer_params ec_transfer_params vllm_xargs
    repetition_detection stream_interval logits_processors guided_json guided_regex guided_choice
    guided_grammar guided_decoding_backend guided_whitespace_pattern structural_tag prompt_embeds suffix
    best_of thinking_token_budget include_reasoning reasoning_effort
    return_hidden_states return_routed_experts routed_experts_start_len return_cached_tokens_details
    return_prompt_token_ids return_meta_info task regex ebnf json_schema stop_regex no_stop_trim lora_path
    session_params separate_reasoning stream_reasoning max_dynamic_patch min_dynamic_patch
    use_audio_in_video images_config custom_logit_processor custom_params input_ids rid extra_key
    ngram_corpus_id bootstrap_host bootstrap_port bootstrap_room routed_dp_rank disagg_prefill_dp_rank
    data_parallel_rank custom_labels
    mirostat mirostat_tau mirostat_eta typical_p dry_multiplier dry_base dry_allowed_length
    dry_penalty_last_n dry_sequence_breakers xtc_probability xtc_threshold samplers n_predict cache_prompt
    top_n_sigma dynatemp_range dynatemp_exponent grammar n_probs n_keep repeat_penalty repeat_last_n
    options format num_ctx num_predict keep_alive think raw template context system
    max_new_tokens do_sample stop_sequences truncate details decoder_input_details adapter_id watermark
    max_output_tokens instructions input reasoning
""".split()  # noqa: SIM905
"""Names of vLLM, SGLang, llama.cpp, Ollama, TGI and OpenAI's newer API."""

NESTED: list[tuple[str, dict[str, Any], str]] = [
    # path, fields, the name in the message
    (COMPLETIONS, {"response_format": {"type": "json_object", "schema": {"type": "object"}}}, "schema"),
    (COMPLETIONS, {"response_format": {"type": "json_schema", "schema": {}}}, "schema"),
    (COMPLETIONS, {"response_format": {"type": "text", "pattern": "a"}}, "pattern"),
    (COMPLETIONS, {"response_format": {"type": "json_object", "json_schema": {"schema": {}}}}, "json_schema"),
    (
        COMPLETIONS,
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "root": "x"}}},
        "root",
    ),
    (COMPLETIONS, {"structured_outputs": {"ebnf": "x"}}, "ebnf"),
    (COMPLETIONS, {"structured_outputs": {"regexp": "x"}}, "regexp"),
    (COMPLETIONS, {"structured_outputs": {"structural_tag": "x"}}, "structural_tag"),
    (COMPLETIONS, {"stream": True, "stream_options": {"chunk_size": 4}}, "chunk_size"),
    (CHAT, {"tools": [{"type": "function", "function": {"name": "f", "input_schema": {}}}]}, "input_schema"),
    (CHAT, {"tools": [{**TOOL, "defer_loading": True}]}, "defer_loading"),
    (CHAT, {"tools": [TOOL], "tool_choice": {**TOOL, "strict": True}}, "tool_choice"),
    (CHAT, {"messages": [{**HELLO[0], "audio": {"id": "x"}}]}, "audio"),
    (CHAT, {"messages": [{**HELLO[0], "function_call": {"name": "f"}}]}, "function_call"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "text parts"),
]


def _post_all(engine: Lab, bodies: list[tuple[str, dict[str, Any]]]) -> list[httpx.Response]:
    async def main() -> list[httpx.Response]:
        async with in_process(create_app(engine)) as client:
            return [await client.post(path, json=body) for path, body in bodies]

    return asyncio.run(main())


def _wrong_value(name: str) -> Any:
    """A value that asks for something: none of those that are as good as an absent field."""
    candidates: list[Any] = [0.77, "aaa", True, False, {"x": 1}]
    neutral = FOREIGN.get(name, ())
    kinds = [type(value) for value in neutral]
    for value in candidates:
        if any(kind in (int, float) for kind in kinds) and not isinstance(value, float):
            continue
        if value not in neutral and (not kinds or isinstance(value, (*kinds, float))):
            return value
    return {"x": 1}


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_fields_of_other_servers_are_refused_with_the_name_to_use(engine: Lab, path: str) -> None:
    schema, body = BODIES[path]
    names = list(schema.refused)
    answers = _post_all(engine, [(path, {**body, name: _wrong_value(name)}) for name in names])
    for name, answer in zip(names, answers, strict=True):
        error = answer.json()["error"]
        assert answer.status_code == httpx.codes.BAD_REQUEST, name
        assert error["message"].startswith(f"{name} is not supported"), error
        assert error["param"] == name
        assert name not in INSTEAD or error["message"].endswith(f"; use {INSTEAD[name]}")


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_values_that_ask_for_nothing_and_fields_without_effect_change_nothing(engine: Lab, path: str) -> None:
    schema, body = BODIES[path]
    neutral = [{name: value} for name, values in schema.refused.items() for value in (None, *values)]
    fields = [{}, *neutral, *({name: value} for name, value in WITHOUT_EFFECT.items())]
    first, *others = [
        answer.json() for answer in _post_all(engine, [(path, {**body, **each}) for each in fields])
    ]
    for each, other in zip(fields[1:], others, strict=True):
        assert other.get("choices") == first["choices"], (each, other)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_no_field_of_openais_client_and_of_other_servers_is_forgotten(path: str) -> None:
    schema, _ = BODIES[path]
    classified = {*schema.model_fields, *schema.refused, *WITHOUT_EFFECT}
    assert {*OPENAI[path], *OTHER_SERVERS} - classified == set()


def test_inner_fields_are_refused_by_name(engine: Lab) -> None:
    answers = _post_all(engine, [(path, BODIES[path][1] | fields) for path, fields, _ in NESTED])
    for (_, fields, name), answer in zip(NESTED, answers, strict=True):
        assert answer.status_code == httpx.codes.BAD_REQUEST, fields
        assert name in answer.json()["error"]["message"], (fields, answer.text)


WHOLE = {"max_tokens": 5, "min_tokens": 2, "n": 2, "top_k": 7, "seed": 3, "stop_token_ids": [4]}


def test_integral_floats_are_integers(engine: Lab) -> None:
    def as_floats(value: Any) -> Any:
        return [float(item) for item in value] if isinstance(value, list) else float(value)

    floats = {name: as_floats(value) for name, value in WHOLE.items()}
    for path, (_, body) in BODIES.items():
        given, written = _post_all(engine, [(path, body | WHOLE), (path, body | floats)])
        assert written.status_code == httpx.codes.OK, written.text
        assert written.json()["choices"] == given.json()["choices"]


@pytest.mark.parametrize("stop", ["", [], None])
def test_an_empty_stop_asks_for_nothing(engine: Lab, stop: Any) -> None:
    for path, (_, body) in BODIES.items():
        plain, other = _post_all(engine, [(path, body), (path, {**body, "stop": stop})])
        assert other.json()["choices"] == plain.json()["choices"]
