"""Make llama_cpp_vectors.json: what llama.cpp's own tokenizer says of SmolLM2's vocabulary.

Run with an interpreter that has `xllamacpp` (prebuilt llama.cpp), `gguf` and the smollm2 weights:

    python make_llama_cpp_vectors.py SmolLM2-135M-Instruct.Q4_1.gguf FOLDER_OF_TEXTS

"smollm2" are the token ids of "texts", "corpora" the number of ids and their SHA-256 (as little-endian
int32) for each text file, "pre_tokenizers" the ids of "texts" when the same vocabulary names another
pre-tokenizer. Not among those: deepseek-llm, deepseek-coder, tekken and gpt-4o, for whose patterns
llama.cpp has approximations (no combining marks, no wide spaces).
"""

# ruff: noqa: RUF001

import hashlib
import json
import sys
import tempfile
import urllib.request
from pathlib import Path

import gguf
import numpy as np
import xllamacpp

TEXTS = [
    "",
    " ",
    "   ",
    "\t\n \r\n\n",
    "Hello world",
    " Hello World!",
    "Hello, y'all! How are you 😁 ?我想在apple工作1314151天～",
    "ied 4 ½ months",
    "w048 7tuijk dsdfhu",
    "нещо на Български",
    "កាន់តែពិសេសអាចខលចេញ",
    "🚀 (normal) 😶‍🌫️ (multiple emojis concatenated) ✅ (only emoji that has its own token)",
    "3\n33\n333\n3333\n33333 3.3 3..3 3...3 ٣٣ Ⅷ ½",
    "I'll don't WE'VE 'Tis we'd\n'\n''''''```````\"\"\"\"......!!!!!!??????",
    "discards   spaces    at  the end   ",
    "x = {'a': [1, 2.50, -3e10]}  # $+<=>^~|`\n\tif x != 12345678:\r\n\t\treturn a/b/c//d",
    "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_end|> <|endoftext|>x<|unknown|><repo_name>",
    "ﬁ ＡＢＣ ａ１ ǅ ʰ Ω K e\u0301 한국어 ภาษาไทย हिन्दी",
    "fooBarBAZ fooBAR ΑΒγδ HTTPServer iPhone 2ndPlace",
]
PRE_TOKENIZERS = (
    *("default", "gpt-2", "llama-bpe", "dbrx", "qwen2", "smollm", "deepseek-v3", "seed-coder"),
    *("refact", "mellum", "midm-2.0", "trillion", "viking", "exaone"),
    *("falcon", "poro-chat", "bailingmoe", "stablelm2", "command-r", "glm4"),
)


def serve(path: str) -> xllamacpp.Server:
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = 256
    params.warmup = False
    return xllamacpp.Server(params)


def tokenize(server: xllamacpp.Server, text: str) -> list[int]:
    body = json.dumps({"content": text, "add_special": False, "parse_special": True}).encode()
    headers = {"content-type": "application/json"}
    with urllib.request.urlopen(
        urllib.request.Request(server.listening_address + "/tokenize", body, headers)
    ) as answer:
        return json.load(answer)["tokens"]


def write_tiny_model(path: str, vocabulary: dict[str, list], pre_tokenizer: str) -> None:
    """A Llama of one layer and width 32 whose weights are zero: llama.cpp loads no vocabulary alone."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(vocabulary["tokens"])
    writer.add_token_types(vocabulary["token_type"])
    writer.add_token_merges(vocabulary["merges"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_tensor("token_embd.weight", np.zeros((len(vocabulary["tokens"]), 32), np.float16))
    writer.add_tensor("output_norm.weight", np.zeros(32, np.float32))
    for name in ("attn_norm", "ffn_norm"):
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros(32, np.float32))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros((32, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main(model: str, folder: str) -> None:
    fields = gguf.GGUFReader(model).fields
    vocabulary = {
        name: fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type", "merges")
    }
    server = serve(model)
    vectors = {"texts": TEXTS, "smollm2": [tokenize(server, text) for text in TEXTS], "corpora": {}}
    for path in sorted(Path(folder).glob("*.txt")):
        ids = tokenize(server, path.read_text(encoding="utf-8"))
        digest = hashlib.sha256(np.array(ids, "<i4").tobytes()).hexdigest()
        vectors["corpora"][path.name] = {"tokens": len(ids), "sha256": digest}
    vectors["pre_tokenizers"] = {}
    for name in PRE_TOKENIZERS:
        with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
            write_tiny_model(file.name, vocabulary, name)
            server = serve(file.name)
            vectors["pre_tokenizers"][name] = [tokenize(server, text) for text in TEXTS]
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in vectors.items()]
    output = Path(__file__).with_name("llama_cpp_vectors.json")
    output.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
