"""Splits a text before merging as byte-level vocabularies do, by llama.cpp's name of the rule.

A GGUF file names its pre-tokenizer in `tokenizer.ggml.pre`. Each is a sequence of patterns: what a pattern
matches becomes a piece of its own, and the next pattern looks inside the pieces. The patterns are those of
the models' own tokenizer.json files, the names those of llama.cpp (src/llama-vocab.cpp).
"""

from dataclasses import dataclass

from tokenizers import Regex, normalizers, pre_tokenizers

from albireo_jax.core.errors import ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class PreTokenizer:
    """The patterns in order, and what goes with them.

    `ignores_merges`: a piece that is a token is taken whole. `adds_bos`: where the file does not say.
    `normalizes`: composed characters first (Unicode NFC), as the model's own tokenizer does.
    """

    patterns: tuple[str, ...]
    ignores_merges: bool = False
    adds_bos: bool = False
    normalizes: bool = False

    def splitter(self) -> pre_tokenizers.PreTokenizer:
        """The `tokenizers` form, which ends by spelling the pieces in GPT-2's byte alphabet."""
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in self.patterns]
        spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([*splits, spell])

    def normalizer(self) -> normalizers.Normalizer | None:
        """The `tokenizers` form of what is done to a text before it is cut."""
        return normalizers.NFC() if self.normalizes else None


def find_pre_tokenizer(name: str) -> PreTokenizer:
    """The pre-tokenizer that GGUF files call `name`. Raises ModelError, listing those known."""
    if name not in _KNOWN:
        raise ModelError(f"the pre-tokenizer {name!r} is not supported; those known are {sorted(_KNOWN)}")
    return _KNOWN[name]


_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = _SUFFIX + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _TAIL
_QWEN2 = _SUFFIX + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _TAIL
_SEED_CODER = _SUFFIX + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|" + _TAIL

_QWEN35 = _SUFFIX + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + _TAIL
_BAILING = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")

_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|"
) + _TAIL
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SUFFIX}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SUFFIX}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|"
) + _TAIL

_DEEPSEEK_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f"
    "\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5"
    "\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15"
    "\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4"
    "\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134"
    "\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3"
    "\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17"
    "\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb"
    "\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)

_DEEPSEEK_SIGNS = "!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002"
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{_DEEPSEEK_LETTERS}]+",
    rf"\s?[{_DEEPSEEK_SIGNS}]+",
    r"\s+$",
    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
    r"\p{N}+",
)
_DEEPSEEK_CODER = (
    r"[\r\n]",
    r"\s?\p{L}+",
    r"\s?\p{P}+",
    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
    r"\p{N}",
)
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|" + _TAIL,
)

_LLAMA3_SPLIT = PreTokenizer(patterns=(_LLAMA3,), ignores_merges=True, adds_bos=True)
_LLAMA3_BARE = PreTokenizer(patterns=(_LLAMA3,))
_QWEN2_SPLIT = PreTokenizer(patterns=(_QWEN2,), normalizes=True)
_DIGITS_SPLIT = PreTokenizer(patterns=(r"\p{N}", _GPT2))
_GPT4O_SPLIT = PreTokenizer(patterns=(_GPT4O,))
_GPT2_SPLIT = PreTokenizer(patterns=(_GPT2,))
_DEEPSEEK_V3_SPLIT = PreTokenizer(patterns=_DEEPSEEK_V3)
_BLOOM_SPLIT = PreTokenizer(patterns=(_BLOOM,))
_BAILING_SPLIT = PreTokenizer(patterns=(_BAILING,))

_BY_NAMES = {
    ("default",): PreTokenizer(patterns=(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    (
        *("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "gigachat", "a.x-4.0"),
        *("mellum", "exaone4", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "modern-bert"),
    ): _GPT2_SPLIT,
    (
        *("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        "jina-v5-nano",
    ): _LLAMA3_SPLIT,
    ("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"): _LLAMA3_BARE,
    ("qwen2", "deepseek-r1-qwen", "megrez", "kormo", "f2llmv2"): _QWEN2_SPLIT,
    ("stablelm2", "hunyuan", "solar-open", "grok-2"): PreTokenizer(patterns=(_QWEN2,)),
    ("qwen35",): PreTokenizer(patterns=(_QWEN35,), normalizes=True),
    (
        *("smollm", "starcoder", "minerva-7b", "refact", "command-r", "codeshell", "exaone", "mellum2"),
    ): _DIGITS_SPLIT,
    ("deepseek-llm",): PreTokenizer(patterns=_DEEPSEEK_LLM),
    ("deepseek-coder",): PreTokenizer(patterns=_DEEPSEEK_CODER),
    ("deepseek-v3", "hunyuan-dense", "joyai-llm"): _DEEPSEEK_V3_SPLIT,
    ("tekken",): PreTokenizer(patterns=(_TEKKEN,), ignores_merges=True, adds_bos=True),
    ("gpt-4o", "llama4", "kanana2", "minimax-m2"): _GPT4O_SPLIT,
    ("seed-coder",): PreTokenizer(patterns=(_SEED_CODER,)),
    ("falcon",): PreTokenizer(patterns=_FALCON),
    ("bloom", "gpt3-finnish", "poro-chat"): _BLOOM_SPLIT,
    ("viking",): PreTokenizer(patterns=(_BLOOM, r"\p{N}")),
    ("bailingmoe", "bailingmoe2", "llada-moe"): _BAILING_SPLIT,
}
_KNOWN = {name: known for names, known in _BY_NAMES.items() for name in names}
