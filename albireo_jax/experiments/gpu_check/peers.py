"""Other engines on the same requests of the trace, random weights of the same shapes, one after the other.

A peer has a process of its own, which ends before ours takes the device's memory. All requests are handed
over at once, none ends before its length, and starting and compiling are not counted.
"""

import importlib.util
import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from albireo_jax.core.config import Dtype, ModelConfig
from albireo_jax.core.hf_config import model_config_to_hf
from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.types import Request
from albireo_jax.experiments.compare import Worker, WorkerCommand, WorkerError
from albireo_jax.experiments.gpu_check.check import LARGE_QWEN, SMALL_QWEN, Check, Sizes, prepared
from albireo_jax.experiments.gpu_check.trace import at_once, trace_buckets, trace_requests
from albireo_jax.experiments.sweep.engines import VariantEngines
from albireo_jax.experiments.sweep.settings import Variant

_WORKER = Path(__file__).resolve().parents[3] / "scripts" / "peers" / "transformers_batch_worker.py"
_REQUESTS: Mapping[str, int] = {SMALL_QWEN: 64, LARGE_QWEN: 32}
_SMALL_REQUESTS = 3
_OTHERS = {"vllm": "vllm", "llama.cpp": "llama_cpp"}
_WARM_UP = 4


def run_peers(check: Check) -> None:
    """Continuous batching of transformers beside ours; what else is not here is said."""
    data = check.data_folder()
    for name, module in _OTHERS.items():
        here = importlib.util.find_spec(module) is not None
        check.notebook.leave_out(
            name,
            "it is installed, but this check has no worker for it"
            if here
            else f"no module {module} is installed",
        )
    for model in (SMALL_QWEN, LARGE_QWEN):
        if check.notebook.has_time(f"peers with {model}"):
            _compare(check, model, data=data)


def _compare(check: Check, model: str, *, data: Path) -> None:
    shape, sizes = check.shape(model), Sizes.of(check)
    limits = EngineLimits(  # the peer goes first, when there is no engine yet to tell them
        max_model_len=sizes.max_model_len, vocab_size=shape.vocab_size, num_pages=2**20, page_size=16
    )
    count = _SMALL_REQUESTS if check.small else _REQUESTS[model]
    requests = at_once(trace_requests(data, count=count, limits=limits, small=check.small))
    theirs = _transformers(check, model, shape, requests)
    ready = prepared(check, model, trace_buckets(sizes))
    engines = VariantEngines((Variant.OVERLAPPED,), lambda _: ready, tp=1)
    engines.run(Variant.OVERLAPPED, requests[:_WARM_UP])
    run = engines.run(Variant.OVERLAPPED, requests)
    ours = run.num_tokens / run.seconds
    case = f"{count} requests of the trace"
    check.notebook.add(model, f"albireo, {case}", metric="output", unit="tokens/s", samples=[ours])
    if theirs is not None:
        name = f"transformers, {case}"
        check.notebook.add(model, name, metric="output", unit="tokens/s", samples=[theirs])
        check.notebook.add(model, name, metric="ours over it", unit="1", samples=[ours / theirs])


def _transformers(check: Check, model: str, shape: ModelConfig, requests: Sequence[Request]) -> float | None:
    """Its tokens per second; None where it is not installed or fails, which is noted."""
    what = f"transformers with {model}"
    if not _imports(check.peer_python, "transformers"):
        check.notebook.leave_out(what, f"{Path(check.peer_python).name} has no transformers")
        return None
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.json"
        config.write_text(json.dumps(model_config_to_hf(shape)))
        dtype, device = (Dtype.FLOAT32, "cpu") if check.on_cpu else (Dtype.BFLOAT16, "cuda")
        command = WorkerCommand(
            name="transformers",
            command=[
                *(check.peer_python, str(_WORKER), "--config", str(config)),
                *("--dtype", dtype.value, "--device", device),
            ],
            log=Path(folder) / "log",
            environment={"HF_HUB_OFFLINE": "1"},
        )
        try:
            with Worker(command) as worker:
                check.notebook.add_peer("transformers", _versions(worker.hello))
                worker.ask(_question(requests[:_WARM_UP]))
                answer = worker.ask(_question(requests))
        except WorkerError as error:
            check.notebook.leave_out(what, str(error))
            return None
    wanted = sum(request.max_tokens for request in requests)
    if answer["tokens"] != wanted:
        check.notebook.leave_out(what, f"it gave {answer['tokens']} of {wanted} tokens")
        return None
    return wanted / float(str(answer["seconds"]))


def _question(requests: Sequence[Request]) -> dict[str, object]:
    return {
        "prompts": [request.prompt_token_ids for request in requests],
        "max_tokens": [request.max_tokens for request in requests],
    }


def _versions(hello: Mapping[str, object]) -> dict[str, str]:
    versions = hello["versions"]
    return (
        {str(name): str(version) for name, version in versions.items()} if isinstance(versions, dict) else {}
    )


def _imports(python: str, module: str) -> bool:
    """Whether the interpreter finds the module; it is not imported."""
    program = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([python, "-c", program], check=False, capture_output=True).returncode == 0
