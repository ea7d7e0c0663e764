"""A grammar of single bytes for a JSON schema, and whether it allows a text."""

import json
from functools import cache
from typing import Any

import llguidance

from albireo_jax.text.grammar.json_schema import json_grammar
from albireo_jax.text.grammar.sandbox_process import Vocabulary, compile_grammar, next_mask

EOS = 256


@cache
def _trie() -> llguidance.LLTokenizer:
    tokens = [bytes([byte]) for byte in range(256)] + [b"</s>"]
    return Vocabulary(tokens, special_token_ids=[EOS], eos_token_ids=[EOS]).trie()


def matcher_of(schema: Any) -> llguidance.LLMatcher:
    lark = f'start: %json {json_grammar(schema)}\n%llguidance {{"no_forcing": true}}\n'
    matcher = compile_grammar(_trie(), json.dumps({"grammars": [{"lark_grammar": lark}]}))
    assert not matcher.is_error(), matcher.get_error()
    return matcher


def accepts(start: llguidance.LLMatcher, text: str) -> bool:
    matcher = start.deep_copy()
    for token_id in (*text.encode(), EOS):
        mask = next_mask(matcher, EOS + 1)
        if not int(mask[token_id // 32]) >> token_id % 32 & 1:
            return False
        matcher.consume_token(token_id)
    return True
