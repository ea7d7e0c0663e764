"""Makes the random-weight Llama that benchmarks run on, as Hugging Face folders in float32 and bfloat16.

    python -m benchmarks.peers.make_bench_model FOLDER  ->  FOLDER/llama60m-float32, FOLDER/llama60m-bfloat16

60 million parameters (hidden 512, 8 layers, 8 heads of 64, intermediate 1536, vocabulary 32,000, untied);
both folders hold the same weights. The tokenizer is byte-pair encoding trained on the sources of Python's
standard library, so that random ids decode to text of ordinary length. No download is needed.
"""

import argparse
import json
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SIZES = {
    "llama60m": {
        "hidden_size": 512,
        "layers": 8,
        "heads": 8,
        "intermediate_size": 1536,
        "vocab_size": 32_000,
    },
    "tiny": {"hidden_size": 64, "layers": 2, "heads": 2, "intermediate_size": 128, "vocab_size": 1_000},
}
HEAD_DIM = 64
WEIGHT_STD = 0.05
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="llama60m")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    config = model_config(options.size)
    tensors = random_weights(config, np.random.default_rng(options.seed))
    tokenizer = trained_tokenizer(config["vocab_size"])
    for name, dtype in (("float32", np.float32), ("bfloat16", ml_dtypes.bfloat16)):
        folder = options.folder / f"{options.size}-{name}"
        folder.mkdir(parents=True, exist_ok=True)
        cast = {key: tensor.astype(dtype) for key, tensor in tensors.items()}
        save_file(cast, folder / "model.safetensors", metadata={"format": "pt"})
        write_json(folder / "config.json", {**config, "dtype": name})
        write_json(
            folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}
        )
        write_json(folder / "tokenizer_config.json", tokenizer_config())
        tokenizer.save(str(folder / "tokenizer.json"))
        print(f"{folder}: {sum(tensor.size for tensor in tensors.values()) / 1e6:.1f} M parameters")


def model_config(size: str) -> dict[str, Any]:
    """config.json of a Llama of the named size."""
    shape = SIZES[size]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape["hidden_size"],
        "intermediate_size": shape["intermediate_size"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["heads"],
        "head_dim": HEAD_DIM,
        "vocab_size": shape["vocab_size"],
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def random_weights(config: Mapping[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """All tensors under their Hugging Face names, normal with WEIGHT_STD; norms are 1."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"] * HEAD_DIM
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{name}_proj.weight": (heads, hidden) for name in "qkv"}
        shapes |= {f"{prefix}.self_attn.o_proj.weight": (hidden, heads)}
        shapes |= {f"{prefix}.mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        shapes |= {f"{prefix}.mlp.down_proj.weight": (hidden, inner)}
        shapes |= {f"{prefix}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (config["vocab_size"], hidden)}
    return {
        name: rng.standard_normal(shape, np.float32) * np.float32(WEIGHT_STD)
        if len(shape) == 2
        else np.ones(shape, np.float32)
        for name, shape in shapes.items()
    }


def trained_tokenizer(vocab_size: int) -> Tokenizer:
    """A byte-level tokenizer with exactly `vocab_size` ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(library_sources(), trainer)
    tokenizer.add_tokens([f"<extra_{i}>" for i in range(vocab_size - tokenizer.get_vocab_size())])
    return tokenizer


def library_sources() -> Iterator[str]:
    """The beginnings of the source files of Python's standard library."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))[:3000]:
        if "site-packages" not in path.parts:
            yield path.read_text(errors="ignore")[:20_000]


def tokenizer_config() -> dict[str, Any]:
    """tokenizer_config.json: special tokens and the chat template."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[0],
        "pad_token": SPECIAL_TOKENS[0],
        "eos_token": SPECIAL_TOKENS[2],
        "model_max_length": 4096,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
