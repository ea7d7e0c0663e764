"""The tokenizer of a Hugging Face folder: tokenizer.json, its configuration, its chat templates."""

import json
from pathlib import Path
from typing import Any

import tokenizers

from albireo_jax.core.errors import ModelError
from albireo_jax.text.tokenizer_parts import TokenizerParts, set_affixes

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_Json = dict[str, Any]


def load_hf_tokenizer(folder: Path) -> TokenizerParts:
    """Read `tokenizer.json`, and what `tokenizer_config.json` adds to it.

    A beginning or end token that the configuration asks for or forbids (`add_bos_token`, `add_eos_token`)
    overrides the post-processor of tokenizer.json. Raises ModelError, naming the file.
    """
    backend = _read_backend(folder / "tokenizer.json")
    config = _read_json(folder / "special_tokens_map.json") | _read_json(folder / "tokenizer_config.json")
    try:
        return _configured(backend, config, folder)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ModelError(f"{folder}: tokenizer_config.json is malformed: {error!r}") from error


def _configured(backend: tokenizers.Tokenizer, config: _Json, folder: Path) -> TokenizerParts:
    named = {name: text for name in _NAMED_TOKENS if (text := _token_text(config.get(name))) is not None}
    _add_declared_tokens(backend, config, folder)
    _mark_special(
        backend, [*named.values(), *map(_token_text, config.get("additional_special_tokens") or [])]
    )
    for name in ("bos_token", "eos_token"):
        if name in named and backend.token_to_id(named[name]) is None:
            raise ModelError(f"{folder}: {name} {named[name]!r} is not in the vocabulary")
    _apply_affix_flags(backend, config, named)
    eos = backend.token_to_id(named["eos_token"]) if "eos_token" in named else None
    return TokenizerParts(
        backend=backend,
        bos_token_id=backend.token_to_id(named["bos_token"]) if "bos_token" in named else None,
        eos_token_ids=() if eos is None else (eos,),
        special_tokens=named,
        chat_templates=_read_templates(folder, config),
    )


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise ModelError(f"{path.parent} has no tokenizer.json, the one form of tokenizer that is read")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises nothing narrower
        raise ModelError(f"{path} is not a tokenizer: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _read_json(path: Path) -> _Json:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} does not hold a JSON object")
    return value


def _token_text(token: str | _Json | None) -> str | None:
    """Text of a token written as a string, or as a dict with its `content`."""
    return token.get("content") if isinstance(token, dict) else token


def _add_declared_tokens(backend: tokenizers.Tokenizer, config: _Json, folder: Path) -> None:
    """Add tokens that only tokenizer_config.json declares, at the ids that it gives them."""
    known = backend.get_added_tokens_decoder()
    declared: dict[str, _Json] = config.get("added_tokens_decoder") or {}
    for key in sorted(declared, key=int):
        flags = {name: value for name, value in declared[key].items() if name in _TOKEN_FLAGS}
        token = tokenizers.AddedToken(declared[key]["content"], **flags)
        if int(key) in known:
            continue
        backend.add_tokens([token])
        if backend.token_to_id(token.content) != int(key):
            raise ModelError(
                f"{folder}: tokenizer_config.json declares {token.content!r} as id {key}, "
                f"tokenizer.json makes it {backend.token_to_id(token.content)}"
            )


def _mark_special(backend: tokenizers.Tokenizer, texts: list[str | None]) -> None:
    """Make special those of `texts` that are in the vocabulary: never split, hidden where asked."""
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    for text in texts:
        if text is not None and text not in special and backend.token_to_id(text) is not None:
            backend.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False)])


def _apply_affix_flags(backend: tokenizers.Tokenizer, config: _Json, named: dict[str, str]) -> None:
    bare = backend.encode("a", add_special_tokens=False).tokens
    full = backend.encode("a", add_special_tokens=True).tokens
    bos, eos = named.get("bos_token"), named.get("eos_token")
    has = {
        "add_bos_token": full[:1] == [bos] and bare[:1] != [bos],
        "add_eos_token": full[-1:] == [eos] and bare[-1:] != [eos],
    }
    wanted = has | {name: config[name] for name in has if isinstance(config.get(name), bool)}
    if wanted != has:
        set_affixes(
            backend,
            bos=bos if wanted["add_bos_token"] else None,
            eos=eos if wanted["add_eos_token"] else None,
        )


def _read_templates(folder: Path, config: _Json) -> dict[str, str]:
    """Templates by name; files of their own go before the entry in tokenizer_config.json."""
    entry = config.get("chat_template")
    templates: dict[str, str] = {}
    if isinstance(entry, str):
        templates["default"] = entry
    elif isinstance(entry, list):
        templates |= {item["name"]: item["template"] for item in entry}
    named = folder / "additional_chat_templates"
    files = {path.stem: path for path in sorted(named.glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    return templates | {name: path.read_text(encoding="utf-8") for name, path in files.items()}
