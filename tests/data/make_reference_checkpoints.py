"""Write tests/data/reference: tiny random checkpoints and the logits that transformers computes for them.

Needs torch and transformers, which the project itself does not, so run it in an environment of its own
(made with torch 2.13.0 and transformers 5.23.0): python tests/data/make_reference_checkpoints.py [FOLDER]
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

NUM_TOKENS = 24
SHAPE = {
    "vocab_size": 101,  # divisible by no tensor-parallel degree
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA31_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def models() -> dict[str, PreTrainedModel]:
    """One model per architecture and peculiarity."""
    eight = {**SHAPE, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
    return {
        "llama2": LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_key_value_heads": 4})),
        "llama31": LlamaForCausalLM(LlamaConfig(**SHAPE, head_dim=16, rope_parameters=LLAMA31_ROPE)),
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=True)),
        "qwen3": Qwen3ForCausalLM(Qwen3Config(**eight)),
        "mistral": MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=6)),
    }


def randomize(model: PreTrainedModel) -> None:
    """Random values for every parameter: freshly made biases are zeros and norms ones."""
    for name, parameter in model.named_parameters():
        scale = 0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
        around = 1.0 if "norm" in name else 0.0
        parameter.data = around + scale * torch.randn(parameter.shape)


def write(name: str, model: PreTrainedModel, folder: Path) -> None:
    """Save `model` and, as reference.npz, token ids and their logits."""
    randomize(model)
    model.eval()
    token_T = torch.randint(0, model.config.vocab_size, (NUM_TOKENS,))
    with torch.no_grad():
        logits_TV = model(token_T[None]).logits[0]
    model.save_pretrained(folder, max_shard_size="40KB" if name == "llama31" else "1MB")
    np.savez(folder / "reference.npz", tokens=token_T.numpy().astype(np.int32), logits=logits_TV.numpy())


def main() -> None:
    """Write every reference below the folder given, or below tests/data/reference."""
    default = Path(__file__).resolve().parent / "reference"
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else default
    torch.manual_seed(0)
    for name, model in models().items():
        write(name, model, root / name)
        print(name, sum(parameter.numel() for parameter in model.parameters()), "parameters")


if __name__ == "__main__":
    main()
