"""The simulator beside the engine that it was calibrated on: the same requests, predicted and measured.

At each degree an engine of a random model is calibrated on this machine (`albireo_jax/measure/step_terms.py`
says how), with five loads run between the rounds of its measurement, for the machine drifts. Then the
simulator, whose terms have seen none of these loads, predicts them: two batches, a Poisson process, the Azure
trace, and the Mooncake trace with its shared prefixes. On a CPU, t virtual devices share the machine's cores.

    python -m benchmarks.validate_simulator MODEL_FOLDER --traces TRACE_FOLDER --tp 1 2 4
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from albireo_jax.core.config import EngineConfig, ParallelConfig, SchedulerConfig
from albireo_jax.core.hf_config import read_hf_config
from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.plan import Executor
from albireo_jax.core.types import Request
from albireo_jax.engine.loop import EngineLoop
from albireo_jax.engine.timeline import Timeline
from albireo_jax.launch import prepare_random, use_virtual_devices
from albireo_jax.measure.load_generator import run_load
from albireo_jax.measure.records import Series, cpu_device, series_by_metric
from albireo_jax.measure.step_terms import measure_shard
from albireo_jax.sched.scheduler import Scheduler
from albireo_jax.sim.clocked import clocked_engine
from albireo_jax.sim.outcome import Outcome, outcome
from albireo_jax.sim.planning.calibration import Shard
from albireo_jax.sim.workload import (
    Arrival,
    make_requests,
    poisson_arrivals,
    read_trace,
    replay,
    scale_lengths,
)
from benchmarks.lib.recording import Recording, script_parser

LIMIT = 0.15


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedLoad:
    """Requests under a name; `shares_prefixes` where their prompts begin alike."""

    name: str
    requests: tuple[Request, ...]
    shares_prefixes: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictedLoad:
    """A load as it was predicted and as it was measured, several times."""

    load: str
    tp: int
    depth: int
    predicted: Outcome
    measured: tuple[Outcome, ...]

    @property
    def measured_tokens_per_s(self) -> float:
        """Median over the runs."""
        return median(run.output_tokens_per_s for run in self.measured)

    @property
    def measured_tpot_s(self) -> float:
        """Median over the runs of their requests' median time per output token."""
        return median(run.tpot_p50_s for run in self.measured)

    @property
    def measured_ttft_s(self) -> float:
        """Median over the runs of their requests' median time to the first token."""
        return median(run.ttft_p50_s for run in self.measured)

    @property
    def throughput_error(self) -> float:
        """Predicted over measured tokens per second, less 1."""
        return self.predicted.output_tokens_per_s / self.measured_tokens_per_s - 1

    @property
    def tpot_error(self) -> float:
        """Predicted over measured time per output token, less 1."""
        return self.predicted.tpot_p50_s / self.measured_tpot_s - 1

    @property
    def ttft_error(self) -> float:
        """Predicted over measured time to the first token, less 1."""
        return self.predicted.ttft_p50_s / self.measured_ttft_s - 1


def predict(shard: Shard, load: NamedLoad, *, config: SchedulerConfig, limits: EngineLimits) -> Outcome:
    """The load on the shipped scheduler and loop, on a clock, with the terms that were measured."""
    terms = shard.at_depth(config.depth)
    engine = clocked_engine(
        config,
        limits,
        cost=terms.steps.forward_s,
        sampling=shard.sampling.cost(greedy=True),
        host=terms.host,
        shares_prefixes=load.shares_prefixes,
    )
    return outcome(load.requests, replay(engine.loop, load.requests, clock=engine.clock))


def measure(executor: Executor, load: NamedLoad, *, config: SchedulerConfig, limits: EngineLimits) -> Outcome:
    """The load on a real engine, by a scheduler of its own, so that nothing of earlier loads is cached."""
    scheduler = Scheduler(config, limits, shares_prefixes=load.shares_prefixes)
    loop = EngineLoop(scheduler, executor, depth=config.depth, timeline=Timeline())
    return run_load(loop, limits, load.requests)


def trace_load(
    name: str,
    arrivals: Sequence[Arrival],
    *,
    factor: float,
    rate_per_s: float,
    limits: EngineLimits,
    seed: int = 0,
) -> NamedLoad:
    """A trace's requests in its rhythm, but `factor` times as long and at this mean rate.

    A prompt, and then an answer, that would still be longer than the engine takes is cut.
    """
    first_s = arrivals[0].arrived_s
    span_s = arrivals[-1].arrived_s - first_s
    stretch = (len(arrivals) - 1) / rate_per_s / span_s if span_s else 0.0
    longest = limits.max_sequence_len
    scaled = [
        replace(
            arrival,
            arrived_s=(arrival.arrived_s - first_s) * stretch,
            input_tokens=min(arrival.input_tokens, longest // 2),
            output_tokens=min(arrival.output_tokens, longest // 2),
        )
        for arrival in scale_lengths(arrivals, factor)
    ]
    return NamedLoad(
        name=name,
        requests=tuple(make_requests(scaled, vocab_size=limits.vocab_size, seed=seed)),
        shares_prefixes=any(arrival.block_ids for arrival in arrivals),
    )


def poisson_load(
    name: str,
    lengths: Sequence[Arrival],
    *,
    factor: float,
    rate_per_s: float,
    count: int,
    limits: EngineLimits,
    seed: int = 0,
) -> NamedLoad:
    """A Poisson process of requests, each `factor` times as long as one of `lengths`."""
    plain = [replace(arrival, block_size=0, block_ids=()) for arrival in lengths]
    arrivals = poisson_arrivals(plain, rate_per_s=rate_per_s, count=count, seed=seed)
    rate = (count - 1) / (arrivals[-1].arrived_s - arrivals[0].arrived_s)
    return trace_load(name, arrivals, factor=factor, rate_per_s=rate, limits=limits, seed=seed)


def batch_load(name: str, *, count: int, input_len: int, output_len: int, vocab_size: int) -> NamedLoad:
    """`count` requests of the same lengths, all at once."""
    arrivals = [Arrival(arrived_s=0.0, input_tokens=input_len, output_tokens=output_len)] * count
    return NamedLoad(name=name, requests=tuple(make_requests(arrivals, vocab_size=vocab_size, seed=0)))


def parser() -> ArgumentParser:
    made = script_parser(__doc__)
    made.add_argument("model", type=Path, help="a folder with a config.json; weights are random")
    made.add_argument("--traces", type=Path, required=True, help="a folder with the two traces")
    made.add_argument("--tp", type=int, nargs="+", default=[1, 2, 4])
    made.add_argument("--depths", type=int, nargs="+", default=[1, 2])
    made.add_argument("--max-rows", type=int, default=16)
    made.add_argument("--max-step-tokens", type=int, default=256)
    made.add_argument("--max-model-len", type=int, default=512)
    made.add_argument("--rate", type=float, default=4.0, help="requests per second of the arriving loads")
    made.add_argument("--requests", type=int, default=40, help="requests of each load")
    made.add_argument("--repeats", type=int, default=2)
    return made


def loads(options: Namespace, limits: EngineLimits) -> list[NamedLoad]:
    """The five loads."""
    count, rate = options.requests, options.rate
    longest, vocab = limits.max_sequence_len, limits.vocab_size
    azure = read_trace(options.traces / "azure_conv_2023_first300.csv")[:count]
    mooncake = read_trace(options.traces / "mooncake_conversation_first300.csv")[:count]
    return [
        batch_load("batch", count=count, input_len=longest // 10, output_len=longest // 20, vocab_size=vocab),
        batch_load("long prompts", count=count // 4, input_len=longest // 2, output_len=8, vocab_size=vocab),
        poisson_load(
            "poisson", azure, factor=longest / 10_000, rate_per_s=rate, count=count, limits=limits, seed=1
        ),
        trace_load("azure", azure, factor=longest / 10_000, rate_per_s=rate, limits=limits),
        trace_load("mooncake", mooncake, factor=longest / 40_000, rate_per_s=rate, limits=limits),
    ]


def compared(options: Namespace, tp: int) -> list[PredictedLoad]:
    """All loads at one degree, for each depth."""
    model = read_hf_config(options.model)
    base = EngineConfig(
        model=str(options.model),
        max_model_len=options.max_model_len,
        max_logprobs=0,
        parallel=ParallelConfig(tp=tp),
        scheduler=SchedulerConfig(max_rows=options.max_rows, max_step_tokens=options.max_step_tokens),
    )
    ready = prepare_random(base, model, measure_sampling=True)
    everything = loads(options, ready.limits)
    configs = [
        SchedulerConfig(max_rows=options.max_rows, max_step_tokens=options.max_step_tokens, depth=depth)
        for depth in options.depths
    ]
    measured: dict[tuple[str, int], list[Outcome]] = {}

    def run_all() -> None:
        for load in everything:
            for config in configs:
                seen = measure(ready.executor, load, config=config, limits=ready.limits)
                measured.setdefault((load.name, config.depth), []).append(seen)

    shard = measure_shard(
        ready, depths=options.depths, repeats=options.repeats + 1, source="measured", between=run_all
    )
    return [
        PredictedLoad(
            load=load.name,
            tp=tp,
            depth=config.depth,
            predicted=predict(shard, load, config=config, limits=ready.limits),
            measured=tuple(measured[load.name, config.depth]),
        )
        for load in everything
        for config in configs
    ]


def series_of(comparison: PredictedLoad) -> list[Series]:
    """The figures of one load at one degree and depth."""
    case = f"{comparison.load}, t = {comparison.tp}, depth {comparison.depth}"
    return [
        series
        for subject, runs in (("predicted", (comparison.predicted,)), ("measured", comparison.measured))
        for series in series_by_metric(
            subject,
            case,
            {
                ("output tokens", "1/s"): [run.output_tokens_per_s for run in runs],
                ("time per output token, p50", "s"): [run.tpot_p50_s for run in runs],
                ("time to first token, p50", "s"): [run.ttft_p50_s for run in runs],
            },
        )
    ]


def render(comparisons: Sequence[PredictedLoad]) -> str:
    """The error table as text."""
    head = f"{'load':<14}{'t':>3}{'depth':>6}{'tokens/s':>11}{'error':>8}{'TPOT ms':>9}{'error':>8}"
    lines = [f"{head}{'TTFT ms':>9}{'error':>8}"]
    lines += [
        f"{each.load:<14}{each.tp:>3}{each.depth:>6}"
        f"{each.measured_tokens_per_s:>11.1f}{each.throughput_error:>+8.1%}"
        f"{1e3 * each.measured_tpot_s:>9.2f}{each.tpot_error:>+8.1%}"
        f"{1e3 * each.measured_ttft_s:>9.1f}{each.ttft_error:>+8.1%}"
        for each in comparisons
    ]
    outside = [each for each in comparisons if max(abs(each.throughput_error), abs(each.tpot_error)) > LIMIT]
    lines.append(f"{len(comparisons) - len(outside)} of {len(comparisons)} within {LIMIT:.0%}")
    return "\n".join(lines)


def main() -> None:
    recording = Recording.begin(parser())
    degrees = recording.options.tp
    use_virtual_devices(max(degrees))
    comparisons = [each for tp in degrees for each in compared(recording.options, tp)]
    print(render(comparisons))
    recording.write(
        "validate-simulator",
        [series for each in comparisons for series in series_of(each)],
        note=render(comparisons),
        device=cpu_device(virtual_devices=max(degrees)),
    )


if __name__ == "__main__":
    main()
