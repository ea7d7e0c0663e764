"""The engines that parts measure, in the form that suits the device best, and what their start took."""

import gc
import json
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import jax

from albireo_jax.core.config import EngineConfig, Quantization
from albireo_jax.core.gpu_options import GpuConfig
from albireo_jax.launch import Prepared, prepare_random
from albireo_jax.runtime.batch import Bucket
from benchmarks.gpu_check.carried import FORM
from benchmarks.gpu_check.check import LARGE, Check, Sizes

_HITS, _WRITTEN = "/jax/compilation_cache/cache_hits", "/jax/compilation_cache/cache_misses"


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """An engine, seconds until it was ready, and its programs.

    `found` programs came from the persistent cache, `compiled` ones did not.
    """

    ready: Prepared
    seconds: float
    found: int
    compiled: int


def step_buckets(check: Check) -> tuple[Bucket, ...]:
    """The sizes of steps that parts share: a few of rows that decode, and one of prompts."""
    sizes = Sizes.of(small=check.small)
    decode, prompts = ((4,), 4) if check.small else ((2, 64, 256), 8)
    return (*(Bucket(rows, rows) for rows in decode), Bucket(sizes.max_step_tokens, prompts))


def shared_engine(
    check: Check, model: str, buckets: tuple[Bucket, ...], *, quantization: Quantization | None = None
) -> Started:
    """The engine of all parts, with random weights of this shape, for steps of these sizes only."""
    config = Sizes.of(small=check.small).config(quantization=quantization)
    return start_engine(check, model, config, buckets=buckets)


def start_engine(
    check: Check, model: str, config: EngineConfig, *, buckets: tuple[Bucket, ...] | None = None
) -> Started:
    """An engine for steps of these sizes, or of all that its configuration may need.

    It fills the device's memory: no other engine may be held when it is made.
    """
    free()
    events = Counter[str]()

    def count(event: str, **_: str | int) -> None:
        events[event] += 1

    jax.monitoring.register_event_listener(count)
    began_s = time.perf_counter()
    config = replace(config, gpu=carried_form(check.carried, config.quantization))
    ready = prepare_random(config, check.shape(model), buckets=buckets)
    seconds = time.perf_counter() - began_s
    jax.monitoring.unregister_event_listener(count)
    return Started(ready=ready, seconds=seconds, found=events[_HITS], compiled=events[_WRITTEN])


def carried_form(folder: Path, quantization: Quantization | None) -> GpuConfig:
    """The form of the step that an earlier run found best, the engine's default where there was none.

    Codes keep the products that suit them: the forms were compared without.
    """
    path = folder / FORM
    form = GpuConfig(**json.loads(path.read_text())) if path.is_file() else GpuConfig()
    return form if quantization is None else replace(form, product_library=None)


def free() -> None:
    """Give back the memory of engines that nothing holds but cycles."""
    gc.collect()


def note_start(check: Check, case: str, started: Started) -> None:
    """Keep what a start of the large model took."""
    figures = check.figures
    figures.add(LARGE, case, metric="start", unit="s", samples=[started.seconds])
    figures.add(LARGE, case, metric="programs found", unit="1", samples=[started.found])
    figures.add(LARGE, case, metric="programs compiled", unit="1", samples=[started.compiled])
