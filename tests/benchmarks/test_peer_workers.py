"""What other engines are given in the GPU check: a GGUF file that is the model, and requests that all run."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from albireo_jax.core.config import Dtype
from albireo_jax.core.hf_config import model_config_to_hf
from albireo_jax.core.model_config import LinearRopeScaling
from albireo_jax.core.model_files import find_model
from albireo_jax.measure.worker_process import WorkerEndedError
from albireo_jax.models.registry import load_model, model_config
from albireo_jax.nn.sharding import make_mesh
from benchmarks.gpu_check.check import Check
from benchmarks.gpu_check.part_settings import PartSettings
from benchmarks.lib.compare import PeerCommand, PeerWorker
from benchmarks.peers.workers import random_gguf

ROOT = Path(__file__).parents[2]
SETTINGS = PartSettings(
    small=True, on_cpu=True, data=None, output="/nowhere", record="/nowhere", carried="/nowhere", peers={}
)
CHECK = Check(settings=SETTINGS, figures=None)  # type: ignore[arg-type]
SERVER = """#!{python}
import json, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
if "--version" in sys.argv:
    print("version: 7 (abc)", file=sys.stderr)
    raise SystemExit
options = dict(zip(sys.argv[1:], sys.argv[2:]))
open(options["--model"], "rb").close()
if {is_broken}:
    raise SystemExit("no kernels for this device")
together = threading.Barrier(int(options["--parallel"]))
class Handler(BaseHTTPRequestHandler):
    def send(self, content):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        self.send({{"status": "ok"}})
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        together.wait(30)
        assert body["ignore_eos"] and all(isinstance(token, int) for token in body["prompt"])
        self.send({{"tokens_predicted": body["n_predict"]}})
    def log_message(self, *words): pass
ThreadingHTTPServer((options["--host"], int(options["--port"])), Handler).serve_forever()
"""


@pytest.mark.parametrize(
    ("model", "dtype"),
    [
        ("qwen2.5-32b", Dtype.BFLOAT16),
        ("qwen3-0.6b", Dtype.FLOAT32),
        ("qwen3-8b", Dtype.BFLOAT16),
        ("llama-3.1-8b", Dtype.BFLOAT16),
    ],
)
def test_a_random_file_is_a_model_of_the_shape(model: str, dtype: Dtype, tmp_path: Path) -> None:
    shape, path = CHECK.shape(model), tmp_path / "random.gguf"
    random_gguf.write_random_gguf(shape, path, dtype=dtype)
    files = find_model(str(path))
    config = model_config(files)
    assert config.rms_norm_eps == pytest.approx(shape.rms_norm_eps)
    same = ("architecture", "num_layers", "num_kv_heads", "head_dim", "vocab_size", "tie_word_embeddings")
    assert [getattr(config, name) for name in same] == [getattr(shape, name) for name in same]
    weights = load_model(files, config=config, dtype=dtype, mesh=make_mesh(1)).weights()
    embed = np.asarray(weights.embed_VD, np.float32)
    drawn = np.random.default_rng(0).standard_normal(embed.size, np.float32).reshape(embed.shape)
    np.testing.assert_allclose(embed, 0.02 * drawn, rtol=2**-8)


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    shape = CHECK.shape("llama-3.1-8b")
    scaled = replace(shape, rope_scaling=LinearRopeScaling(factor=2.0))
    with pytest.raises(ValueError, match="LinearRopeScaling"):
        random_gguf.write_random_gguf(scaled, tmp_path / "x.gguf", dtype=Dtype.FLOAT32)


def command(folder: Path, *, is_broken: bool) -> PeerCommand:
    server, config = folder / "llama-server", folder / "config.json"
    server.write_text(SERVER.format(python=sys.executable, is_broken=is_broken))
    server.chmod(0o755)
    config.write_text(json.dumps(model_config_to_hf(CHECK.shape("qwen3-0.6b"))))
    return PeerCommand(
        name="llama.cpp",
        command=[
            *(sys.executable, "-m", "benchmarks.peers.workers.llama_cpp_worker", "--model", str(folder)),
            *("--dtype", "float32", "--device", "cpu", "--max-model-len", "32", "--max-requests", "3"),
            *("--max-tokens", "96", "--server", str(server)),
        ],
        log=folder / "log",
        environment={"PYTHONPATH": str(ROOT)},
    )


def test_llama_cpp_is_asked_for_all_at_once(tmp_path: Path) -> None:
    with PeerWorker(command(tmp_path, is_broken=False)) as worker:
        assert worker.hello == {"versions": {"llama.cpp": "7 (abc)"}}
        answer = worker.ask({"prompts": [[1, 2], [3], [4]], "max_tokens": [5, 7, 9]})
    assert answer["tokens"] == 21


def test_a_server_that_ends_is_told(tmp_path: Path) -> None:
    with pytest.raises(WorkerEndedError, match="ended with status 1 before it was ready"):
        PeerWorker(command(tmp_path, is_broken=True))
