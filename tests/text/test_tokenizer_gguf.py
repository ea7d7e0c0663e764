"""Tokenizers rebuilt from GGUF metadata: the ids of llama.cpp, and of the tokenizer.json they came from."""

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from albireo_jax.core.errors import ModelError, UnknownModelError
from albireo_jax.core.gguf_metadata import MetadataValue, read_gguf_metadata
from albireo_jax.core.model_files import find_model
from albireo_jax.text.gguf_tokenizer import TokenType, load_gguf_tokenizer, parts_from_metadata
from albireo_jax.text.hf_tokenizer import load_hf_tokenizer
from albireo_jax.text.tokenizer import Tokenizer

VECTORS = json.loads((Path(__file__).parent / "data" / "llama_cpp_vectors.json").read_text())
SPM_SPACE = "▁"


@pytest.fixture(scope="module")
def smollm2_path() -> Path:
    try:
        return find_model("smollm2").path
    except UnknownModelError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def smollm2_metadata(smollm2_path: Path) -> dict[str, MetadataValue]:
    return read_gguf_metadata(smollm2_path)


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Tokenizer:
    return Tokenizer(load_gguf_tokenizer(smollm2_path))


def _write_gguf(path: Path, *, arrays: dict[str, list[Any]], scalars: dict[str, Any]) -> Path:
    """A GGUF file of metadata alone; `scalars` are texts, bools or unsigned numbers."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, array in arrays.items():
        writer.add_array(f"tokenizer.ggml.{name}", array)
    add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32}
    for name, scalar in scalars.items():
        add[type(scalar)](f"tokenizer.{name}" if "chat" in name else f"tokenizer.ggml.{name}", scalar)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def _tokens_by_id(document: dict[str, Any]) -> list[str]:
    ids = dict(document["model"]["vocab"])
    ids |= {token["content"]: token["id"] for token in document["added_tokens"]}
    return sorted(ids, key=ids.__getitem__)


def test_smollm2_encodes_as_llama_cpp(smollm2: Tokenizer) -> None:
    assert [smollm2.encode(text) for text in VECTORS["texts"]] == VECTORS["smollm2"]
    decoded = [smollm2.decode(ids, skip_special_tokens=False) for ids in VECTORS["smollm2"]]
    assert decoded == VECTORS["texts"]


@pytest.mark.parametrize("corpus", sorted(VECTORS["corpora"]))
def test_smollm2_encodes_whole_texts_as_llama_cpp(smollm2: Tokenizer, data_dir: Path, corpus: str) -> None:
    text = (data_dir / "text" / corpus).read_text(encoding="utf-8")
    ids = smollm2.encode(text)
    assert len(ids) == VECTORS["corpora"][corpus]["tokens"]
    assert hashlib.sha256(np.array(ids, "<i4").tobytes()).hexdigest() == VECTORS["corpora"][corpus]["sha256"]
    assert smollm2.decode(ids) == text


@pytest.mark.parametrize("name", sorted(VECTORS["pre_tokenizers"]))
def test_pre_tokenizers_cut_as_in_llama_cpp(smollm2_metadata: dict[str, MetadataValue], name: str) -> None:
    tokenizer = Tokenizer(parts_from_metadata(smollm2_metadata | {"tokenizer.ggml.pre": name}))
    cases = list(zip(VECTORS["texts"], VECTORS["pre_tokenizers"][name], strict=True))
    if name == "qwen2":  # composes characters first, as Qwen's own tokenizer does and llama.cpp does not
        cases = [case for case in cases if "\u0301" not in case[0]]
    assert len(cases) >= len(VECTORS["texts"]) - 1
    for text, ids in cases:
        assert tokenizer.encode(text, add_special_tokens=False) == ids


def test_smollm2_chats_with_the_golden_ids(smollm2: Tokenizer, data_dir: Path) -> None:
    golden = json.loads((data_dir / "golden" / "smollm2-135m-instruct-q4_1.json").read_text())["greedy"]
    for case in golden:
        messages = [{"role": "user", "content": case["prompt"]}]
        assert smollm2.encode_chat(messages) == case["input_ids"]
        assert smollm2.decode(case["output_ids"], skip_special_tokens=False) == case["text"]
    assert smollm2.bos_token_id == 1
    assert smollm2.eos_token_ids == (2, 0)  # <|im_end|>, then <|endoftext|>
    assert smollm2.vocab_size == 49_152


def test_sentencepiece_vocabulary_survives_gguf(data_dir: Path, tmp_path: Path) -> None:
    folder = data_dir / "models" / "stories260k"
    original = Tokenizer(load_hf_tokenizer(folder))
    tokens = _tokens_by_id(json.loads((folder / "tokenizer.json").read_text()))
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    kinds += [TokenType.BYTE] * 256 + [TokenType.NORMAL] * (len(tokens) - 259)
    path = _write_gguf(
        tmp_path / "stories.gguf",
        arrays={
            "tokens": tokens,
            "token_type": [int(kind) for kind in kinds],
            "scores": [0.0] * 259 + [-float(rank) for rank in range(len(tokens) - 259)],
        },
        scalars={"model": "llama", "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0},
    )
    rebuilt = Tokenizer(load_gguf_tokenizer(path))
    for corpus in ("tinyshakespeare.txt", "wikitext2_test.txt"):
        lines = (data_dir / "text" / corpus).read_text(encoding="utf-8").splitlines(keepends=True)
        for line in [*lines[:3000], "", "🙂 naïve", "  two", "a</s> b<s>"]:
            ids = rebuilt.encode(line)
            assert ids == original.encode(line)
            assert rebuilt.decode(ids) == original.decode(ids)
    assert (rebuilt.bos_token_id, rebuilt.eos_token_ids) == (1, (2,))


def test_byte_level_vocabulary_survives_gguf(data_dir: Path, tmp_path: Path) -> None:
    for packed in (data_dir / "tokenizers" / "qwen3").glob("*.gz"):
        (tmp_path / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))
    original = Tokenizer(load_hf_tokenizer(tmp_path))
    document = json.loads((tmp_path / "tokenizer.json").read_text())
    added = {token["id"]: token["special"] for token in document["added_tokens"]}
    tokens = _tokens_by_id(document)
    of_flag = {None: TokenType.NORMAL, True: TokenType.CONTROL, False: TokenType.USER_DEFINED}
    path = _write_gguf(
        tmp_path / "qwen3.gguf",
        arrays={
            "tokens": tokens,
            "token_type": [int(of_flag[added.get(i)]) for i in range(len(tokens))],
            "merges": [" ".join(pair) for pair in document["model"]["merges"]],
        },
        scalars={"model": "gpt2", "pre": "qwen2", "bos_token_id": 151_643, "eos_token_id": 151_645}
        | {"add_bos_token": False},
    )
    rebuilt = Tokenizer(load_gguf_tokenizer(path))
    text = (data_dir / "text" / "wikitext2_test.txt").read_text(encoding="utf-8")[:400_000]
    for sample in [text, "A\u0308pfel <|im_start|>x<think>y</think>\n\n<|im_end|>", *VECTORS["texts"]]:
        ids = rebuilt.encode(sample)
        assert ids == original.encode(sample)
        assert rebuilt.decode(ids) == original.decode(ids)
    assert rebuilt.eos_token_ids == (151_645, 151_643)


def _sentencepiece_metadata(**changes: MetadataValue) -> dict[str, MetadataValue]:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), SPM_SPACE, "a", "b"]
    tokens += ["ab", SPM_SPACE + "a", "<|im_end|>", "<pad>"]
    kinds = [2, 3, 3] + [6] * 256 + [1] * 5 + [3, 5]
    scores = [0.0] * 259 + [-10.0, -10.0, -10.0, -1.0, -2.0, 0.0, 0.0]
    metadata: dict[str, MetadataValue] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    return metadata | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}


def test_the_best_pair_merges_first() -> None:
    tokenizer = Tokenizer(parts_from_metadata(_sentencepiece_metadata()))
    texts = [tokenizer.token_text(token) for token in tokenizer.encode("ab a", add_special_tokens=False)]
    assert texts == [SPM_SPACE, "ab", SPM_SPACE + "a"]  # not ▁a b: ab has the higher score


@pytest.mark.parametrize(
    ("changes", "text", "expected"),
    [
        ({}, "b", ["<s>", SPM_SPACE, "b"]),
        ({"add_bos_token": False}, "b", [SPM_SPACE, "b"]),
        ({"add_eos_token": True}, "b", ["<s>", SPM_SPACE, "b", "</s>"]),
        ({"add_space_prefix": False}, "b", ["<s>", "b"]),
        ({"add_space_prefix": False}, " b", ["<s>", SPM_SPACE, "b"]),
        ({}, "é", ["<s>", SPM_SPACE, "<0xC3>", "<0xA9>"]),
        ({}, "b</s>b", ["<s>", SPM_SPACE, "b", "</s>", SPM_SPACE, "b"]),
        ({}, "<pad>"[:1], ["<s>", SPM_SPACE, "<0x3C>"]),
    ],
)
def test_keys_change_what_frames_a_text(
    changes: dict[str, MetadataValue], text: str, expected: list[str]
) -> None:
    tokenizer = Tokenizer(parts_from_metadata(_sentencepiece_metadata(**changes)))
    ids = tokenizer.encode(text)
    assert [tokenizer.token_text(token) for token in ids] == expected
    assert tokenizer.decode(ids) == text.replace("</s>b", " b")


def test_ends_are_what_the_keys_and_the_well_known_names_say() -> None:
    tokenizer = Tokenizer(parts_from_metadata(_sentencepiece_metadata()))
    end_of_turn = tokenizer.token_id("<|im_end|>")
    assert tokenizer.eos_token_ids == (2, end_of_turn)
    tokenizer = Tokenizer(parts_from_metadata(_sentencepiece_metadata(eot_token_id=1)))
    assert tokenizer.eos_token_ids == (2, 1, end_of_turn)


def test_templates_are_read_by_name() -> None:
    templates = {"tokenizer.chat_template": "A", "tokenizer.chat_template.tool_use": "T"}
    parts = parts_from_metadata(_sentencepiece_metadata() | templates)
    assert parts.chat_templates == {"default": "A", "tool_use": "T"}
    assert parts.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "t5"}, r"model 't5' is not supported.*gpt2.*llama"),
        ({"model": "gpt2", "merges": ["a b"], "pre": "superbpe"}, r"'superbpe' is not supported.*smollm"),
        ({"model": "gpt2"}, r"no tokenizer\.ggml\.merges"),
        ({"model": "gpt2", "merges": ["ab"]}, r"merge 'ab' is not a pair"),
        ({"model": "gpt2", "merges": ["a z"]}, r"do not fit together"),
        ({"model": 3}, r"model is not a text"),
        ({"tokens": "a"}, r"tokens is not a list of str"),
        ({"token_type": [1]}, r"266 tokens have 1 types"),
        ({"scores": [1, 2]}, r"scores is not a list of float"),
        ({"scores": [1.0, 2.0]}, r"266 tokens have 2 scores"),
        ({"bos_token_id": 266}, r"bos_token_id 266 is outside the vocabulary of 266"),
        ({"tokens": ["a\udce9"] * 266}, r"tokens\[0\] is no UTF-8: 'a\\udce9'"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, MetadataValue], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        parts_from_metadata(_sentencepiece_metadata(**changes))


def test_a_template_that_is_no_text_is_named() -> None:
    with pytest.raises(ModelError, match=r"chat_template\.tool_use is not a text: \['T'\]"):
        parts_from_metadata(_sentencepiece_metadata() | {"tokenizer.chat_template.tool_use": ["T"]})


@pytest.mark.parametrize("kind", [TokenType.NORMAL, TokenType.UNUSED])
def test_control_tokens_that_are_typed_as_text_are_recognised(
    kind: TokenType, caplog: pytest.LogCaptureFixture
) -> None:
    """The end of a turn by its name, beginning and end by the keys that name them; a word stays a word."""
    metadata = _sentencepiece_metadata(padding_token_id=262)
    typed = [int(kind) if i in (1, 2, 264) else old for i, old in enumerate(_kinds(metadata))]
    with caplog.at_level("WARNING"):
        tokenizer = Tokenizer(parts_from_metadata(metadata | {"tokenizer.ggml.token_type": typed}))
    assert "the file types <s>, </s>, <|im_end|> as text" in caplog.text
    as_typed_well = Tokenizer(parts_from_metadata(metadata))
    assert tokenizer.eos_token_ids == as_typed_well.eos_token_ids == (2, 264)
    for text in ("b<|im_end|>b", "<s>a</s>", "ab"):
        ids = tokenizer.encode(text)
        assert ids == as_typed_well.encode(text)
        assert tokenizer.decode(ids) == as_typed_well.decode(ids)


def test_a_token_that_is_there_twice_is_read_as_the_first_and_written_as_both(
    caplog: pytest.LogCaptureFixture,
) -> None:
    metadata = _sentencepiece_metadata()
    tokens = [*_list(metadata, "tokens"), "ab", "a"]
    longer = {"tokens": tokens, "token_type": [*_kinds(metadata), 1, 1]}
    longer["scores"] = [*_list(metadata, "scores"), -1.0, -1.0]
    with caplog.at_level("WARNING"):
        tokenizer = Tokenizer(
            parts_from_metadata(
                metadata | {f"tokenizer.ggml.{name}": value for name, value in longer.items()}
            )
        )
    assert "the vocabulary has tokens twice: ['ab', 'a']" in caplog.text
    first = tokens.index("ab")
    assert tokenizer.encode("ab", add_special_tokens=False)[-1] == first
    assert tokenizer.decode([first, 266, 267]) == "ababa"
    assert [tokenizer.token_text(token_id) for token_id in (266, 267)] == ["ab", "a"]
    assert tokenizer.vocab_size == len(tokens)


def _list(metadata: dict[str, MetadataValue], name: str) -> list[Any]:
    value = metadata[f"tokenizer.ggml.{name}"]
    assert isinstance(value, list)
    return value


def _kinds(metadata: dict[str, MetadataValue]) -> list[int]:
    return _list(metadata, "token_type")


def test_a_file_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    path = _write_gguf(tmp_path / "bare.gguf", arrays={}, scalars={"model": "llama"})
    with pytest.raises(ModelError, match=r"bare\.gguf: the metadata has no tokenizer\.ggml\.tokens"):
        load_gguf_tokenizer(path)
