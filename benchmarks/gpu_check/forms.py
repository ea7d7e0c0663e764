"""Forms of the step program on a model of two layers: what each costs to compile, to call first, and to run.

How the weights of layers lie, and who makes their products, changes nothing but times. The quickest form is
handed on to the runs that measure a whole model, with what XLA tuned and the texts of the programs.
"""

import gzip
import json
import math
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from albireo_jax.core.gpu_options import GpuConfig, LayerForm, ProductLibrary
from albireo_jax.nn.axes import has_layers
from albireo_jax.nn.decoder import DecoderWeights
from albireo_jax.runtime.batch import Bucket, layout
from albireo_jax.runtime.state import CacheState
from albireo_jax.runtime.step import ForwardOutput, LayerLoop, StepProgram, jit_forward
from benchmarks.gpu_check.attention_cases import step_attention
from benchmarks.gpu_check.carried import FORM, HLO
from benchmarks.gpu_check.check import LARGE, Check
from benchmarks.gpu_check.check_engines import free
from benchmarks.gpu_programs.compiled_programs import (
    DECODE,
    MAX_ROWS,
    PAGE_SIZE,
    ProgramCase,
    compile_program,
    mesh_of,
    state_of,
    step_program,
    weights_of,
)
from benchmarks.gpu_programs.program_figures import figures

_LAYERS = 2
_BUCKETS = (DECODE, Bucket(2, 2), Bucket(2048, MAX_ROWS))
_REPEATS, _CALLS = 3, (2, 50)
_ALIKE = 0.05
"""Step times of forms that differ by less are alike: then the one that compiles sooner is better."""

_STACKED_WEIGHS = 1.15
"""A step over stacked weights counts as so many times as long: each layer's products are tuned apart, so that
a whole model compiles for as much longer as it is deeper than two layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """A form of the step program, as `GpuConfig` names it."""

    layers: LayerForm
    products: ProductLibrary

    @property
    def name(self) -> str:
        """The form in a table."""
        return f"{self.layers}, {self.products}"

    @property
    def options(self) -> GpuConfig:
        """The form as an engine is configured to it."""
        return GpuConfig(layer_form=self.layers, product_library=self.products)


FORMS = (
    Form(layers=LayerForm.UNSTACKED, products=ProductLibrary.CUBLASLT),
    Form(layers=LayerForm.UNSTACKED, products=ProductLibrary.TRITON),
    Form(layers=LayerForm.STACKED, products=ProductLibrary.TRITON),
)
"""The forms that are compared, the engine's default first."""


class FormTimes(NamedTuple):
    """Seconds that a form takes."""

    form: Form
    compile_s: float
    step_s: float


def run_forms(check: Check) -> None:
    """Decode steps of many and of two rows, then a step with prompts; a small check only the first.

    Programs are compiled each time, as their times are wanted; what is tuned on the way is kept.
    """
    jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf)
    found: list[FormTimes] = []
    logits: dict[Bucket, Float[np.ndarray, "R V"]] = {}
    for bucket in _BUCKETS[: 1 if check.small else None]:
        for form in FORMS:
            what = f"{form.name}, {bucket.tokens} tokens"
            if not check.figures.has_time(what):
                continue
            with check.figures.attempt(what):
                times, logits_RV = _measure(check, form, bucket)
                if bucket == DECODE:
                    found.append(times)
                    _keep_best(check, found)
                expected_RV = logits.setdefault(bucket, logits_RV)
                _note_difference(check, form, bucket, logits_RV, expected_RV)
            free()


def best_form(found: Sequence[FormTimes]) -> Form:
    """The form with the quickest step; of those that are as good as that, the first compiled."""

    def weighed_s(each: FormTimes) -> float:
        return each.step_s * (_STACKED_WEIGHS if each.form.layers is LayerForm.STACKED else 1.0)

    quickest_s = min(map(weighed_s, found))
    alike = [each for each in found if weighed_s(each) <= (1 + _ALIKE) * quickest_s]
    return min(alike, key=lambda each: each.compile_s).form


def _keep_best(check: Check, found: Sequence[FormTimes]) -> None:
    best = best_form(found)
    (check.carried / FORM).write_text(json.dumps(asdict(best.options)))
    print(f"best form so far: {best.name}", flush=True)


def _measure(check: Check, form: Form, bucket: Bucket) -> tuple[FormTimes, Any]:
    """Compile and run a step in this form, and keep what it took; its times and its logits."""
    case = ProgramCase(model=LARGE, tp=1, layers=_LAYERS)
    program = _program(check, case, form)
    began_s = time.perf_counter()
    lowered = _lower(program, bucket)
    traced_s = time.perf_counter()
    compiled = lowered.compile()
    compile_s = time.perf_counter() - traced_s
    step = _Step(program, compiled, bucket)
    called_s = time.perf_counter()
    logits_RV = step.run()
    first_s = time.perf_counter() - called_s
    times_s = step.times_s(_CALLS[not check.small])
    label = f"{bucket.tokens} tokens, {form.name}"
    taken = (
        ("trace", "s", [traced_s - began_s]),
        ("compile", "s", [compile_s]),
        ("first call", "s", [first_s]),
        ("step", "ms", [1e3 * seconds for seconds in times_s]),
    )
    for metric, unit, samples in taken:
        check.figures.add(case.model, label, metric=metric, unit=unit, samples=samples)
    if not check.small:
        _note_program(check, case, lowered, label)
    return FormTimes(form, compile_s, statistics.median(times_s)), logits_RV


def _program(check: Check, case: ProgramCase, form: Form) -> StepProgram:
    program = step_program(case, mesh_of(jax.devices(), 1))
    return replace(
        program,
        model=replace(check.shape(case.model), num_layers=case.layers),
        layers=LayerLoop.UNSTACKED if form.layers is LayerForm.UNSTACKED else LayerLoop.UNROLLED,
        products=form.products,
        attention=step_attention(check),
    )


def _lower(program: StepProgram, bucket: Bucket) -> jax.stages.Lowered:
    weights, shape = weights_of(program), layout(bucket, PAGE_SIZE)
    return jit_forward(program, shape, weights).lower(
        weights, state_of(program).cache, program.ints(MAX_ROWS + 1), program.ints(shape.num_words)
    )


class _Step:
    """A compiled step with weights, an empty cache and rows of one random token each."""

    def __init__(self, program: StepProgram, compiled: jax.stages.Compiled, bucket: Bucket) -> None:
        self._compiled = compiled
        self._weights = _random_weights(program)
        self._cache: CacheState = jax.tree.map(_zeros, state_of(program).cache)
        self._last_token_Z = jax.device_put(np.zeros(MAX_ROWS + 1, np.int32), program.ints(1).sharding)
        self._buffer = _buffer(bucket)

    def run(self) -> Float[np.ndarray, "R V"]:
        """One step to its end."""
        return np.asarray(self._call().logits_RV)

    def times_s(self, calls: int) -> list[float]:
        """Seconds of a step among others that are queued, a mean per repeat; the first warm up."""
        times_s: list[float] = []
        for _ in range(_REPEATS + 1):
            began_s = time.perf_counter()
            for _ in range(calls - 1):
                self._call()
            self._call().logits_RV.block_until_ready()
            times_s.append((time.perf_counter() - began_s) / calls)
        return times_s[1:]

    def _call(self) -> ForwardOutput:
        done: ForwardOutput = self._compiled(
            self._weights, self._cache, self._last_token_Z, self._buffer.copy()
        )
        self._cache = done.cache
        return done


def _buffer(bucket: Bucket) -> Any:
    """A packed step: all rows compute the first tokens of their sequences, as many each as fit."""
    shape, random = layout(bucket, PAGE_SIZE), np.random.default_rng(0)
    count = bucket.tokens // bucket.rows
    pages = -(-count // PAGE_SIZE)
    buffer = np.zeros(shape.num_words, np.int32)
    buffer[: bucket.tokens] = random.integers(0, 256, bucket.tokens)
    fields = buffer[shape.rows_at : shape.updates_at].reshape(3, bucket.rows)
    fields[0], fields[2] = np.arange(bucket.rows), count
    updates = buffer[shape.updates_at :].reshape(3, shape.num_updates)
    updates[0] = MAX_ROWS  # the slot that padding writes to
    updates[:, : bucket.rows * pages] = (
        np.repeat(np.arange(bucket.rows), pages),
        np.tile(np.arange(pages), bucket.rows),
        1 + np.arange(bucket.rows * pages),
    )
    return buffer


def _random_weights(program: StepProgram) -> DecoderWeights:
    """Weights that keep the scale of activations, equal in all forms."""
    scale = program.model.hidden_size**-0.5

    def draw(name: str, like: Any, key: tuple[int, int]) -> Array:
        if "norm" in name:
            return jnp.ones(like.shape, like.dtype, device=like.sharding)
        return jax.device_put(_uniform(like.shape, like.dtype, key, scale), like.sharding)

    def fill(name: str, number: int, like: Any) -> Any:
        if like is None:
            return None
        if isinstance(like, tuple):
            return tuple(draw(name, each, (number, layer)) for layer, each in enumerate(like))
        if not has_layers(name):
            return draw(name, like, (number, 0))
        one = jax.ShapeDtypeStruct(like.shape[1:], like.dtype)
        layers = [draw(name, one, (number, layer)) for layer in range(like.shape[0])]
        return jax.device_put(jnp.stack(layers), like.sharding)

    likes = weights_of(program)._asdict()
    return DecoderWeights(**{name: fill(name, number, likes[name]) for number, name in enumerate(likes)})


@partial(jax.jit, static_argnums=(0, 1))
def _uniform(shape: tuple[int, ...], dtype: Any, key: tuple[Array, Array], scale: Array) -> Array:
    number, layer = key
    drawn = jax.random.uniform(
        jax.random.fold_in(jax.random.key(number), layer), shape, dtype, minval=-1.0, maxval=1.0
    )
    return drawn * jnp.asarray(scale, dtype)


def _zeros(like: jax.ShapeDtypeStruct) -> Array:
    return jnp.zeros(like.shape, like.dtype, device=like.sharding)


def _note_difference(check: Check, form: Form, bucket: Bucket, got_RV: Any, expected_RV: Any) -> None:
    """The largest difference of logits to those of the first form, as a share of the largest; NaN is one."""
    error = float(np.max(np.abs(got_RV - expected_RV)) / np.max(np.abs(expected_RV)))
    label = f"{bucket.tokens} tokens, {form.name}"
    check.figures.add(LARGE, label, metric="largest difference", unit="1", samples=[error])


def _note_program(check: Check, case: ProgramCase, lowered: jax.stages.Lowered, label: str) -> None:
    """Keep the program's text as this device's compiler made it, and what stands in it."""
    compiled = compile_program(lowered)
    file = check.carried / HLO / f"{re.sub('[^a-z0-9]+', '-', label)}.txt.gz"
    file.write_bytes(gzip.compress(compiled.text.encode(), mtime=0))
    found = figures(case, compiled)
    numbers: dict[str, float] = {
        "weight copies": found.weight_copies,
        "pool copies": found.pool_copies,
        "arguments": found.num_arguments,
    }
    if found.lone_launches is not None and found.command_buffers is not None:
        numbers["graphs"] = found.command_buffers
        numbers["launches outside of graphs"] = sum(found.lone_launches.values())
    for metric, number in numbers.items():
        check.figures.add(case.model, label, metric=metric, unit="1", samples=[number])
