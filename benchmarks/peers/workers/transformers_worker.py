"""Generates with transformers' `generate`, one static batch, in its own virtual environment."""

from protocol import Channel, generation_arguments, installed

CHANNEL = Channel()  # before transformers is imported: its progress bars go to stdout

from time import perf_counter  # noqa: E402

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, GenerationConfig  # noqa: E402


def main() -> None:
    options = generation_arguments()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    model.eval()

    def answer(question: dict) -> dict:
        prompts, max_tokens = question["prompts"], question["max_tokens"]
        greedy = GenerationConfig(
            max_new_tokens=max_tokens, min_new_tokens=max_tokens, do_sample=False, pad_token_id=0
        )
        begin = perf_counter()
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy)
        seconds = perf_counter() - begin
        return {"seconds": seconds, "token_ids": output[:, ids.shape[1] :].tolist()}

    versions = installed("transformers", "torch")
    CHANNEL.serve({"versions": versions, "threads": torch.get_num_threads()}, answer)


if __name__ == "__main__":
    main()
