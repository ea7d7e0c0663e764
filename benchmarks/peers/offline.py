"""Offline throughput beside transformers `generate` and vLLM for CPU, in one run.

Each engine is a process of its own, all loaded at once and asked in turns (the others are suspended), float32
and then bfloat16. Every case takes fresh random prompts, the same for all engines, greedy, end-of-sequence
ignored, and is run twice: for one token, which is the prompts' cost, and for all of them. Output tokens/s is
all tokens over the second time; decode tokens/s the others over the difference of both.

    python -m benchmarks.peers.make_bench_model MODELS
    python -m benchmarks.peers.offline --models MODELS --peer-python transformers=VENV/bin/python \
        --peer-python vllm=VENV/bin/python
"""

import random
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from contextlib import ExitStack
from pathlib import Path

from albireo_jax.measure.records import Series
from benchmarks.lib.compare import (
    PeerCommand,
    PeerWorker,
    comparison_table,
    measure_in_turns,
    parse_peers,
    peer_parser,
    peer_settings,
    vllm_environment,
)
from benchmarks.lib.recording import Recording

PEERS = ("transformers", "vllm")
UNITS = {"decode": "tokens/s", "output": "tokens/s", "prompt": "s", "agreement": "share"}
NOTE = (
    "decode = (output_len - 1) tokens over (time for output_len tokens - time for one); output = all tokens "
    "over all time; agreement = part of the tokens before the first that differs from ours. transformers: "
    "one static batch; vLLM without detokenization and prefix caching, both cores bound."
)


def parser() -> ArgumentParser:
    made = peer_parser(__doc__)
    made.add_argument("--requests", type=int, nargs="+", default=[1, 16, 32])
    made.add_argument("--seed", type=int, default=0)
    return made


def commands(options: Namespace, peers: dict[str, str], dtype: str, logs: Path) -> list[PeerCommand]:
    """How to start every engine that is there, for one dtype."""
    shared = ["--model", str(options.models / f"{options.size}-{dtype}"), "--dtype", dtype]
    shared += ["--max-model-len", str(options.input_len + options.output_len + 16)]
    environments = {"vllm": vllm_environment(options.vllm_preload)}
    return [
        PeerCommand(
            name=name,
            command=[python, "-m", f"benchmarks.peers.workers.{name}_worker", *shared],
            log=logs / f"{name}-{dtype}.log",
            environment=environments.get(name, {"HF_HUB_OFFLINE": "1"}),
        )
        for name, python in {"albireo": sys.executable, **peers}.items()
    ]


class EnginesOfOneDtype:
    """The engines of one dtype, what they are asked, and what they answered."""

    def __init__(self, workers: list[PeerWorker], dtype: str, options: Namespace) -> None:
        self._workers = {worker.name: worker for worker in workers}
        self._options = options
        self._cases = {f"{dtype} {count} requests": count for count in options.requests}
        self._answers: dict[tuple[str, str, int], list[list[int]]] = {}

    def measure(self) -> list[Series]:
        """All cases in turns, after a warm-up of each; how far the answers agree comes last."""
        for name in self._workers:
            for count in self._cases.values():
                self._generate(name, self._prompts(count, "warm-up"), self._options.output_len)
        series = measure_in_turns(
            list(self._workers),
            self._cases,
            repeats=self._options.repeats,
            units=UNITS,
            measure=self._throughput,
        )
        return [*series, *self._agreement()]

    def _throughput(self, name: str, case: str, repeat: int) -> dict[str, float]:
        count, output_len = self._cases[case], self._options.output_len
        first_s, _ = self._generate(name, self._prompts(count, f"{repeat} first"), 1)
        all_s, answers = self._generate(name, self._prompts(count, f"{repeat}"), output_len)
        self._answers[name, case, repeat] = answers
        decode = count * (output_len - 1) / (all_s - first_s)
        print(f"repeat {repeat}: {case}: {name} {decode:.0f} decode tokens/s", flush=True)
        return {"decode": decode, "output": count * output_len / all_s, "prompt": first_s}

    def _generate(
        self, name: str, prompts: list[list[int]], max_tokens: int
    ) -> tuple[float, list[list[int]]]:
        answer = self._workers[name].ask({"prompts": prompts, "max_tokens": [max_tokens] * len(prompts)})
        lengths = {len(ids) for ids in answer["token_ids"]}
        if lengths != {max_tokens} or len(answer["token_ids"]) != len(prompts):
            raise SystemExit(f"{name} gave {len(answer['token_ids'])} answers of {lengths} tokens")
        return answer["seconds"], answer["token_ids"]

    def _prompts(self, count: int, seed: str) -> list[list[int]]:
        """Random ids that every size of the model has; no special tokens, no common prefixes."""
        rng = random.Random(f"{self._options.seed} {count} {seed}")
        return [[rng.randrange(3, 1_000) for _ in range(self._options.input_len)] for _ in range(count)]

    def _agreement(self) -> list[Series]:
        """For each peer, the part of each repeat's tokens before the first that differs from ours."""
        return [
            Series(
                subject=name,
                case=case,
                metric="agreement",
                unit=UNITS["agreement"],
                samples=tuple(
                    agreement(self._answers["albireo", case, repeat], self._answers[name, case, repeat])
                    for repeat in range(self._options.repeats)
                ),
            )
            for name in self._workers
            if name != "albireo"
            for case in self._cases
        ]


def agreement(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """The part of all tokens that comes before each answer's first difference."""
    same = 0
    for mine, other in zip(ours, theirs, strict=True):
        pairs = list(zip(mine, other, strict=True))
        same += next((index for index, (a, b) in enumerate(pairs) if a != b), len(pairs))
    return same / sum(map(len, ours))


def main() -> None:
    recording = Recording.begin(parser())
    options = recording.options
    peers = parse_peers(options.peer_python, known=PEERS)
    for name in PEERS:
        if name not in peers:
            print(f"{name} is skipped: no --peer-python {name}=PATH")
    logs = Path(tempfile.mkdtemp(prefix="bench-peers-"))
    print(f"logs of the engines: {logs}")
    series: list[Series] = []
    versions: dict[str, dict[str, str]] = {}
    for dtype in options.dtypes:
        with ExitStack() as stack:
            workers = [
                stack.enter_context(PeerWorker(command)) for command in commands(options, peers, dtype, logs)
            ]
            versions |= {worker.name: worker.hello["versions"] for worker in workers}
            series += EnginesOfOneDtype(workers, dtype, options).measure()
    for metric in ("decode", "output", "agreement"):
        print(comparison_table(series, metric=metric, ours="albireo"), end="\n\n")
    settings = peer_settings(options)
    recording.write("peers-offline", series, note=NOTE, settings=settings, peer_versions=versions)


if __name__ == "__main__":
    main()
