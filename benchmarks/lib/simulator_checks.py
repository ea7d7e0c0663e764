"""The simulator beside the engine that it was calibrated on: the same requests, predicted and measured."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

from albireo_jax.core.config import SchedulerConfig
from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.plan import Executor
from albireo_jax.core.types import Request
from albireo_jax.engine.loop import EngineLoop
from albireo_jax.engine.timeline import Timeline
from albireo_jax.measure.load_generator import offer
from albireo_jax.sched.scheduler import Scheduler
from albireo_jax.sim.clocked import clocked_engine
from albireo_jax.sim.outcome import Outcome, outcome
from albireo_jax.sim.planning.calibration import Shard
from albireo_jax.sim.workload import Arrival, make_requests, poisson_arrivals, replay, scale_lengths


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Requests under a name; `shares_prefixes` where their prompts begin alike."""

    name: str
    requests: tuple[Request, ...]
    shares_prefixes: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
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


def predict(shard: Shard, load: Load, *, config: SchedulerConfig, limits: EngineLimits) -> Outcome:
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


def measure(executor: Executor, load: Load, *, config: SchedulerConfig, limits: EngineLimits) -> Outcome:
    """The load on a real engine, by a scheduler of its own, so that nothing of earlier loads is cached."""
    scheduler = Scheduler(config, limits, shares_prefixes=load.shares_prefixes)
    loop = EngineLoop(scheduler, executor, depth=config.depth, timeline=Timeline())
    return offer(loop, limits, load.requests)


def trace_load(
    name: str,
    arrivals: Sequence[Arrival],
    *,
    factor: float,
    rate_per_s: float,
    limits: EngineLimits,
    seed: int = 0,
) -> Load:
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
    return Load(
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
) -> Load:
    """A Poisson process of requests, each `factor` times as long as one of `lengths`."""
    plain = [replace(arrival, block_size=0, block_ids=()) for arrival in lengths]
    arrivals = poisson_arrivals(plain, rate_per_s=rate_per_s, count=count, seed=seed)
    rate = (count - 1) / (arrivals[-1].arrived_s - arrivals[0].arrived_s)
    return trace_load(name, arrivals, factor=factor, rate_per_s=rate, limits=limits, seed=seed)


def batch_load(name: str, *, count: int, input_len: int, output_len: int, vocab_size: int) -> Load:
    """`count` requests of the same lengths, all at once."""
    arrivals = [Arrival(arrived_s=0.0, input_tokens=input_len, output_tokens=output_len)] * count
    return Load(name=name, requests=tuple(make_requests(arrivals, vocab_size=vocab_size, seed=0)))
