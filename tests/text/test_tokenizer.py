"""Tokenizers of Hugging Face folders: golden ids, llama.cpp's vectors, configuration, errors."""

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from albireo_jax.core.errors import ModelError
from albireo_jax.core.model_files import find_model
from albireo_jax.text.hf_tokenizer import load_hf_tokenizer
from albireo_jax.text.tokenizer import Tokenizer

SMALL_MODELS = ("stories260k", "babyllama105")


@pytest.fixture(scope="module")
def qwen3_folder(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3")
    for packed in (data_dir / "tokenizers" / "qwen3").glob("*.gz"):
        (folder / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))
    return folder


@pytest.fixture(scope="module")
def qwen3(qwen3_folder: Path) -> Tokenizer:
    return Tokenizer(load_hf_tokenizer(qwen3_folder))


@pytest.fixture(scope="module")
def qwen3_backend(qwen3_folder: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(qwen3_folder / "tokenizer.json"))


@pytest.fixture
def stories_folder(data_dir: Path, tmp_path: Path) -> Path:
    """A copy of the stories260k tokenizer to change."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(data_dir / "models" / "stories260k" / name, tmp_path / name)
        (tmp_path / name).chmod(0o644)
    return tmp_path


def _configure(folder: Path, **changes: Any) -> Path:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize("model", SMALL_MODELS)
def test_golden_prompts_have_their_ids(data_dir: Path, model: str) -> None:
    tokenizer = Tokenizer.from_files(find_model(str(data_dir / "models" / model)))
    golden = json.loads((data_dir / "golden" / f"{model}.json").read_text())["greedy"]
    assert [tokenizer.encode(case["prompt"]) for case in golden] == [case["input_ids"] for case in golden]
    assert [tokenizer.decode(case["output_ids"]) for case in golden] == [case["text"] for case in golden]
    assert tokenizer.bos_token_id == 1
    assert tokenizer.eos_token_ids == (2,)


def test_qwen2_vectors_of_llama_cpp_hold_for_qwen3(data_dir: Path, qwen3: Tokenizer) -> None:
    # Qwen3 kept Qwen2's vocabulary and merges; it only added special tokens.
    vectors = data_dir / "tokenizer_vectors" / "ggml-vocab-qwen2.gguf"
    texts = vectors.with_suffix(".gguf.inp").read_text().split("\n__ggml_vocab_test__\n")
    rows = vectors.with_suffix(".gguf.out").read_text().split("\n")
    assert len(texts) == len(rows) == 47
    expected = [[int(token) for token in row.split()] for row in rows]
    assert [qwen3.encode(text) for text in texts] == expected
    assert [qwen3.decode(ids) for ids in expected] == texts


def test_looks_tokens_up_both_ways(qwen3: Tokenizer) -> None:
    assert qwen3.vocab_size == 151_669
    assert qwen3.token_text(151_645) == "<|im_end|>"
    assert qwen3.token_id("<|im_end|>") == 151_645
    assert [qwen3.token_text(token) for token in (151_669, 2**40, -1)] == [None, None, None]
    assert qwen3.token_id("no such token") is None
    assert qwen3.bos_token_id is None
    assert qwen3.eos_token_ids == (151_645,)


@settings(deadline=None, derandomize=True)
@given(ids=st.lists(st.integers(0, 151_668), max_size=12), skip=st.booleans())
def test_decodes_any_ids_as_the_tokenizers_package(
    qwen3: Tokenizer, qwen3_backend: tokenizers.Tokenizer, ids: list[int], skip: bool
) -> None:
    assert qwen3.decode(ids, skip_special_tokens=skip) == qwen3_backend.decode(ids, skip_special_tokens=skip)


@settings(deadline=None, derandomize=True)
@given(text=st.text(), skip=st.booleans())
def test_text_in_bytes_decodes_as_the_tokenizers_package(data_dir: Path, text: str, skip: bool) -> None:
    # The vocabulary of stories260k is small, so most characters become byte tokens.
    folder = data_dir / "models" / "stories260k"
    tokenizer = Tokenizer(load_hf_tokenizer(folder))
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode(text)
    assert ids == backend.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=skip) == backend.decode(ids, skip_special_tokens=skip)
    if "▁" not in text:
        assert tokenizer.decode(ids) == text


def test_unknown_ids_decode_to_nothing(qwen3: Tokenizer) -> None:
    [hello] = qwen3.encode("Hello")
    assert qwen3.decode([hello, 151_700, 2**40, -1, hello]) == "HelloHello"


@pytest.mark.parametrize("text", ["a\ud83db", "\udc00"])
def test_half_a_surrogate_pair_is_refused(qwen3: Tokenizer, text: str) -> None:
    with pytest.raises(ValueError, match="does not consist of characters"):
        qwen3.encode(text)


def test_special_tokens_are_hidden_or_shown(qwen3: Tokenizer) -> None:
    ids = qwen3.encode("<|im_start|>Hi<tool_call><|im_end|>")
    assert len(ids) == 4
    assert qwen3.decode(ids) == "Hi<tool_call>"  # declared as not special
    assert qwen3.decode(ids, skip_special_tokens=False) == "<|im_start|>Hi<tool_call><|im_end|>"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, [1, 270, 417]),
        ({"add_bos_token": True, "add_eos_token": False}, [1, 270, 417]),
        ({"add_bos_token": False}, [270, 417]),
        ({"add_eos_token": True}, [1, 270, 417, 2]),
        ({"add_bos_token": False, "add_eos_token": True}, [270, 417, 2]),
    ],
)
def test_configuration_says_which_tokens_frame_a_text(
    stories_folder: Path, flags: dict[str, bool], expected: list[int]
) -> None:
    tokenizer = Tokenizer(load_hf_tokenizer(_configure(stories_folder, **flags)))
    assert tokenizer.encode("hi") == expected
    assert tokenizer.encode("hi", add_special_tokens=False) == [270, 417]


def test_tokens_may_be_written_as_dicts(stories_folder: Path) -> None:
    end = {"__type": "AddedToken", "content": "</s>", "lstrip": False, "normalized": False}
    parts = load_hf_tokenizer(_configure(stories_folder, eos_token=end, pad_token=None))
    assert parts.eos_token_ids == (2,)
    assert parts.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def test_tokens_declared_only_in_the_configuration_are_added(stories_folder: Path) -> None:
    declared = {
        "513": {"content": "<|im_end|>", "special": True, "normalized": False},
        "512": {"content": "<think>", "special": False, "normalized": False},
        "1": {"content": "<s>", "special": True},
    }
    tokenizer = Tokenizer(load_hf_tokenizer(_configure(stories_folder, added_tokens_decoder=declared)))
    assert tokenizer.encode("<think><|im_end|>", add_special_tokens=False) == [512, 513]
    assert tokenizer.decode([512, 513]) == "<think>"
    misplaced = {"600": {"content": "<|im_end|>", "special": True}}
    with pytest.raises(ModelError, match=r"<\|im_end\|>.*600.*512"):
        load_hf_tokenizer(_configure(stories_folder, added_tokens_decoder=misplaced))


def test_chat_templates_are_found_in_all_their_places(stories_folder: Path) -> None:
    assert not Tokenizer(load_hf_tokenizer(stories_folder)).has_chat_template
    named = [{"name": "default", "template": "A"}, {"name": "rag", "template": "R"}]
    assert load_hf_tokenizer(_configure(stories_folder, chat_template="A")).chat_templates == {"default": "A"}
    parts = load_hf_tokenizer(_configure(stories_folder, chat_template=named))
    assert parts.chat_templates == {"default": "A", "rag": "R"}
    (stories_folder / "chat_template.jinja").write_text("B")
    (stories_folder / "additional_chat_templates").mkdir()
    (stories_folder / "additional_chat_templates" / "tool_use.jinja").write_text("T")
    parts = load_hf_tokenizer(stories_folder)
    assert parts.chat_templates == {"default": "B", "rag": "R", "tool_use": "T"}


def test_conversation_becomes_ids_without_a_second_beginning(stories_folder: Path) -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer = Tokenizer(load_hf_tokenizer(_configure(stories_folder, chat_template=template)))
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(messages) == "<s>hi</s>"
    assert tokenizer.encode_chat(messages) == [1, 270, 417, 2]


def test_what_cannot_be_read_is_named(stories_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"eos_token '</end>' is not in the vocabulary"):
        load_hf_tokenizer(_configure(stories_folder, eos_token="</end>"))
    with pytest.raises(ModelError, match=r"tokenizer_config\.json is malformed"):
        load_hf_tokenizer(_configure(stories_folder, eos_token="</s>", added_tokens_decoder={"x": 1}))
    (stories_folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json does not hold a JSON object"):
        load_hf_tokenizer(stories_folder)
    (stories_folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json is not JSON"):
        load_hf_tokenizer(stories_folder)
    (stories_folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json is not a tokenizer"):
        load_hf_tokenizer(stories_folder)
    (stories_folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer\.json"):
        load_hf_tokenizer(stories_folder)


def test_an_unknown_decoder_is_refused(stories_folder: Path) -> None:
    path = stories_folder / "tokenizer.json"
    document = json.loads(path.read_text())
    path.write_text(
        json.dumps(document | {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}})
    )
    with pytest.raises(ModelError, match=r"WordPiece.*ByteLevel"):
        Tokenizer(load_hf_tokenizer(stories_folder))
