"""Other engines beside ours on the same requests of the trace, random weights of the same shapes.

Each engine, ours too, has a process of its own, which ends before the next takes the device's memory; this
process takes none. All requests are handed over at once, none ends before its length, and starting and
compiling are not counted.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from albireo_jax.core.config import Dtype
from albireo_jax.core.hf_config import model_config_to_hf
from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.model_config import ModelConfig
from albireo_jax.core.types import Request
from albireo_jax.measure.worker_process import WorkerEndedError
from benchmarks.gpu_check.check import LARGE_QWEN, SMALL_QWEN, Check, Sizes
from benchmarks.gpu_check.check_parts import LLAMA_CPP, PEERS, TRANSFORMERS, VLLM
from benchmarks.gpu_check.trace_part import at_once, trace_requests
from benchmarks.lib.compare import PeerCommand, PeerWorker, vllm_environment

_REQUESTS: Mapping[str, int] = {SMALL_QWEN: 64, LARGE_QWEN: 32}
_TAKES_S: Mapping[str, float] = {SMALL_QWEN: 0.0, LARGE_QWEN: 60.0}
"""Seconds until the first figure of a model, for the second one's decision."""

_MODULES: Mapping[str, Sequence[str]] = {
    TRANSFORMERS: ("transformers", "torch"),
    VLLM: ("vllm",),
    LLAMA_CPP: (),
}
"""Python modules that the worker of an engine needs, of the program that is given for it."""

_SMALL_REQUESTS = 3
_WARM_UP = 4
_OURS = "albireo"


def run_peers(check: Check) -> None:
    """Ours, then every peer that is here; what is not here is said."""
    data = check.data_folder()
    present = [name for name in PEERS if _is_present(check, name)]
    for model in (SMALL_QWEN, LARGE_QWEN):
        if check.figures.has_time(f"peers with {model}", takes_s=_TAKES_S[model]):
            with check.figures.attempt(f"peers with {model}"):
                _compare(check, model, present, data=data)


def _is_present(check: Check, name: str) -> bool:
    program = check.peers.get(name)
    if program is None:
        why = "no program is given for it"
    elif lacking := [module for module in _MODULES[name] if not _imports(program, module)]:
        why = f"{Path(program).name} has no {', '.join(lacking)}"
    else:
        return True
    check.figures.leave_out(name, why)
    return False


def _compare(check: Check, model: str, peers: Sequence[str], *, data: Path) -> None:
    shape = check.shape(model)
    limits = EngineLimits(  # there is no engine here to tell them
        max_model_len=Sizes.of(small=check.small).max_model_len,
        vocab_size=shape.vocab_size,
        num_pages=2**20,
        page_size=16,
    )
    count = _SMALL_REQUESTS if check.small else _REQUESTS[model]
    requests = at_once(trace_requests(data, count=count, limits=limits, small=check.small))
    ours = _tokens_per_second(check, _OURS, shape, requests)
    case = f"{{}}, {count} requests of the trace"
    check.figures.add(model, case.format(_OURS), metric="output", unit="tokens/s", samples=[ours])
    for name in peers:
        what = f"{name} with {model}"
        if not check.figures.has_time(what):
            continue
        try:
            theirs = _tokens_per_second(check, name, shape, requests)
        except WorkerEndedError as error:
            check.figures.leave_out(what, str(error))
            continue
        check.figures.add(model, case.format(name), metric="output", unit="tokens/s", samples=[theirs])
        ratio = [ours / theirs]
        check.figures.add(model, case.format(name), metric="ours over it", unit="1", samples=ratio)


def _tokens_per_second(check: Check, name: str, shape: ModelConfig, requests: Sequence[Request]) -> float:
    """The engine's rate, warmed up; WorkerEndedError if it fails, or gives another number of tokens."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(model_config_to_hf(shape)))
        with PeerWorker(_command(check, name, requests, folder=Path(folder))) as worker:
            if name != _OURS:
                check.figures.add_peer(name, _versions(worker.hello))
            worker.ask(_question(requests[:_WARM_UP]))
            answer = worker.ask(_question(requests))
    wanted = sum(request.max_tokens for request in requests)
    if answer["tokens"] != wanted:
        raise WorkerEndedError(f"it gave {answer['tokens']} of {wanted} tokens")
    return wanted / float(str(answer["seconds"]))


def _command(check: Check, name: str, requests: Sequence[Request], *, folder: Path) -> PeerCommand:
    """Command of an engine's worker, which is told how much memory these requests take at most."""
    program = check.peers.get(name, sys.executable)
    python, worker, more = {
        _OURS: (
            sys.executable,
            "albireo_worker",
            ["--carried", str(check.carried), *(["--small"] if check.small else [])],
        ),
        TRANSFORMERS: (program, "transformers_worker", []),
        VLLM: (program, "vllm_worker", []),
        LLAMA_CPP: (sys.executable, "llama_cpp_worker", ["--server", program]),
    }[name]
    ends = [len(request.prompt_token_ids) + request.max_tokens for request in requests]
    dtype, device = (Dtype.FLOAT32, "cpu") if check.on_cpu else (Dtype.BFLOAT16, "cuda")
    environment = {"HF_HUB_OFFLINE": "1"}
    if name == VLLM and check.on_cpu:
        environment |= vllm_environment(None)
    return PeerCommand(
        name=name,
        command=[
            *(python, "-m", f"benchmarks.peers.workers.{worker}", "--random", "--model", str(folder)),
            *("--dtype", dtype.value, "--device", device, "--max-model-len", str(max(ends))),
            *("--max-requests", str(len(requests)), "--max-tokens", str(sum(ends)), *more),
        ],
        log=folder / "log",
        environment=environment,
    )


def _question(requests: Sequence[Request]) -> dict[str, object]:
    return {
        "prompts": [request.prompt_token_ids.tolist() for request in requests],
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
