"""JaxExecutor: packs plans, dispatches compiled steps, and reads sampled ids back one step late."""

import time
from collections import deque

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from albireo_jax.core.plan import SampledTokens, StepPlan
from albireo_jax.nn.decoder import DecoderWeights
from albireo_jax.runtime.batch import Bucket, choose_bucket, layout, pack
from albireo_jax.runtime.compile import Progress, compile_buckets
from albireo_jax.runtime.sample_stage import SamplingTimes, measure_sampling
from albireo_jax.runtime.state import DeviceState
from albireo_jax.runtime.step import StepOutput, StepProgram, jit_step


class JaxStepHandle:
    """A step on the device. Its end is known exactly if the host waited for it.

    If it ended while the host was busy, the end is taken as the last moment at which it was seen
    running (the executor looks at each dispatch and wait): exposed time is never understated.
    """

    def __init__(self, ids: jax.Array, num_rows: int, *, sample_s: float) -> None:
        self._ids = ids
        self._num_rows = num_rows
        self._sample_s = sample_s
        self._seen_running_s = time.perf_counter()
        self._ended = False
        ids.copy_to_host_async()

    def look(self) -> bool:
        """Note whether the step still runs; True once it has ended."""
        if not self._ended:
            self._ended = self._ids.is_ready()  # pyright: ignore[reportAttributeAccessIssue]  # on every array
            if not self._ended:
                self._seen_running_s = time.perf_counter()
        return self._ended

    def wait(self) -> SampledTokens:
        """Block until the ids are on the host."""
        ended_before = self.look()
        ids = np.asarray(self._ids)[: self._num_rows]
        finished_s = self._seen_running_s if ended_before else time.perf_counter()
        return SampledTokens(ids=ids, finished_s=finished_s, sample_s=self._sample_s)


class JaxExecutor:
    """Runs plans on the devices of a mesh, in order; one thread calls it.

    Holds the weights and the donated state. All buckets are compiled in `__init__`, so `dispatch`
    never compiles: an AOT executable refuses what it was not compiled for.
    """

    def __init__(
        self,
        program: StepProgram,
        weights: DecoderWeights,
        state: DeviceState,
        *,
        buckets: tuple[Bucket, ...],
        progress: Progress | None = None,
    ) -> None:
        self.program = program
        self._state = state
        self._buckets = buckets
        self.replace_weights(weights)
        self._padding_slot = state.last_token_Z.shape[0] - 1
        self._replicated = NamedSharding(program.mesh, PartitionSpec())
        self._in_flight: deque[JaxStepHandle] = deque()
        self._sampling: dict[int, SamplingTimes] = {}
        self._is_drawn = np.zeros(self._padding_slot + 1, np.bool_)
        self._compiled = compile_buckets(self.lower, buckets, progress=progress)

    def lower(self, bucket: Bucket) -> jax.stages.Lowered:
        """The step program of a bucket, lowered for this engine's shapes and devices."""
        shape = layout(bucket, self.program.page_size)
        buffer = jax.ShapeDtypeStruct((shape.num_words,), np.int32, sharding=self._replicated)
        weights = self._weights[bucket]
        return jit_step(self.program, shape, weights).lower(weights, self._state, buffer)

    def compiled(self, bucket: Bucket) -> jax.stages.Compiled:
        """The executable that serves `bucket`."""
        return self._compiled[bucket]

    def dispatch(self, plan: StepPlan) -> JaxStepHandle:
        """Queue a step on the devices; returns before it has run."""
        self._look()
        bucket = choose_bucket(plan, self._buckets)
        buffer = pack(plan, layout(bucket, self.program.page_size), padding_slot=self._padding_slot)
        # The call itself transfers the buffer: a device_put before it costs 40 µs more, and its array takes
        # a slower way into the executable.
        output: StepOutput = self._compiled[bucket](self._weights[bucket], self._state, buffer)
        self._state = output.state
        handle = JaxStepHandle(output.id_R, plan.num_rows, sample_s=self._sampling_s(plan, bucket))
        self._look()
        self._in_flight.append(handle)
        return handle

    def replace_weights(self, weights: DecoderWeights) -> None:
        """Compute all later steps with other arrays of the same shapes, dtypes and shardings."""
        arranged = {
            loop: self.program.arrange(weights, bucket)
            for loop, bucket in {self.program.layer_loop(bucket): bucket for bucket in self._buckets}.items()
        }
        self._weights = {bucket: arranged[self.program.layer_loop(bucket)] for bucket in self._buckets}

    def measure_sampling(self) -> None:
        """Time the sampling stage alone, so that later results tell it from the forward pass."""
        self._sampling = measure_sampling(self.program, sorted({bucket.rows for bucket in self._buckets}))

    def _sampling_s(self, plan: StepPlan, bucket: Bucket) -> float:
        for params in plan.new_slots:
            self._is_drawn[params.slot] = params.temperature > 0
        if bucket.rows not in self._sampling:
            return 0.0
        times = self._sampling[bucket.rows]
        return times.drawn_s if self._is_drawn[plan.slots].any() else times.greedy_s

    def _look(self) -> None:
        while self._in_flight and self._in_flight[0].look():
            self._in_flight.popleft()
        for handle in self._in_flight:
            handle.look()
