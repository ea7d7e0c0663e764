"""Compile the engine's programs for H100s without one, hold them to their gates, and print them as a table.

`make gpu-check` runs this with JAX's CUDA plugin on the path: that compiles for GPUs where there is none. No
time is measured here, and no matrix product is tuned, so that a real GPU may choose other kernels. Exits with
1 if a gate is broken, with 2 where nothing can be compiled for CUDA.
"""

import argparse
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import jax

from albireo_jax.core.config import Quantization
from albireo_jax.experiments.gpu_gates import Figures, breaches, depth_breaches, figures
from albireo_jax.experiments.gpu_programs import (
    DECODE,
    MIXED,
    MODELS,
    Case,
    Name,
    compile_program,
    h100s,
    mesh_of,
    programs,
    step_program,
)
from albireo_jax.experiments.records import Device, Record, Series, write_record
from albireo_jax.runtime.batch import Bucket
from albireo_jax.runtime.executor import Sampling

ROOT = Path(__file__).resolve().parents[1]
SHALLOW, DEEP = 2, 4
SMALLEST = "llama-3.1-8b"
NOTE = (
    "Compiled without a GPU for eight H100s as tests/data/h100.textproto describes them; nothing was run or "
    "timed, and matrix products were not tuned. Attention is that of ops/attention.py, which was written for "
    "CPUs: a loop over blocks of the context in every layer, which no command buffer holds as a whole."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One program to compile."""

    case: Case
    name: Name


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a job gave; `seconds` are those of tracing and compiling."""

    job: Job
    figures: Figures
    broken: list[str]
    seconds: float


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="all models at all degrees, and one at full depth")
    parser.add_argument("--model", choices=MODELS, help="only this model")
    parser.add_argument("--tp", type=int, help="only this degree")
    parser.add_argument("--target", type=Path, default=ROOT / "tests/data/h100.textproto")
    parser.add_argument("--output", type=Path, help="folder for a record of the table")
    parser.add_argument("--minutes", type=float, help="begin no program after so many minutes")
    return parser.parse_args()


def jobs(options: argparse.Namespace, devices: tuple[object, ...]) -> list[Job]:
    """The most telling first: forward passes at two depths, then what samples, admits and copies."""
    degrees, models = ((1, 2, 4, 8), tuple(MODELS)) if options.all else ((8, 1), (SMALLEST,))
    cases = [
        Case(model=model, tp=tp, layers=SHALLOW)
        for model in models
        for tp in degrees
        if options.model in (None, model) and options.tp in (None, tp)
    ]
    chosen = [Job(case=case, name=DECODE) for case in cases]
    chosen += [
        Job(case=replace(case, quantization=kind), name=name)
        for case in cases
        if case.model == SMALLEST
        for kind in Quantization
        for name in (DECODE, MIXED)
    ]
    deepened = cases if options.all else cases[:1]
    chosen += [Job(case=replace(case, layers=DEEP), name=DECODE) for case in deepened]
    chosen += [Job(case=case, name=MIXED) for case in deepened]
    for case in deepened:
        if not options.all or case.model == SMALLEST or case.tp == max(degrees):
            chosen += others(case, devices)
    if options.all:
        chosen += [
            Job(case=replace(case, layers=MODELS[case.model].num_layers), name=DECODE)
            for case in cases
            if case.model == SMALLEST and case.tp == max(degrees)
        ]
    return chosen


def others(case: Case, devices: tuple[object, ...]) -> list[Job]:
    """Every program of a case but its forward passes."""
    named = programs(step_program(case, mesh_of(devices, case.tp)))
    return [Job(case=case, name=name) for name in named if not isinstance(name, Bucket)]


def run(job: Job, devices: tuple[object, ...]) -> Result:
    began_s = time.perf_counter()
    program = step_program(job.case, mesh_of(devices, job.case.tp))
    found = figures(job.case, compile_program(programs(program)[job.name]()))
    seconds = time.perf_counter() - began_s
    return Result(job=job, figures=found, broken=breaches(job.case, job.name, found), seconds=seconds)


def across_depths(results: list[Result]) -> list[str]:
    """What grows with the depth and must not."""
    by_job = {result.job: result.figures for result in results}
    lines: list[str] = []
    for job, deep in by_job.items():
        shallow = by_job.get(replace(job, case=replace(job.case, layers=SHALLOW)))
        if shallow is not None and job.case.layers > SHALLOW:
            lines += [f"{label(job)}: {line}" for line in depth_breaches(shallow, deep)]
    return lines


def program_name(name: Name) -> str:
    match name:
        case Bucket():
            return f"{'decode' if name.is_decode else 'mixed'} {name.tokens}x{name.rows}"
        case Sampling():
            return f"sample {name.rows} {name.route.name.lower()}"
        case str():
            return name
        case _:
            return f"{name.kind} {name.pages}"


def label(job: Job) -> str:
    return f"{case_name(job.case)} {program_name(job.name)}"


def case_name(case: Case) -> str:
    kind = f" {case.quantization}" if case.quantization else ""
    return f"{case.model}{kind} tp={case.tp} layers={case.layers}"


def row(result: Result) -> str:
    found = result.figures
    sent = ", ".join(f"{count} {kind} {size}" for (kind, size), count in found.collectives.items()) or "-"
    lone = found.lone_launches
    return (
        f"{label(result.job):58} args {found.num_arguments:3} {found.argument_bytes / 2**20:9.1f} MiB  "
        f"in place {found.alias_bytes / 2**20:8.2f}  temp {found.temp_bytes / 2**20:7.2f}  "
        f"copies {found.weight_copies}+{found.pool_copies}  loops {found.loops}  "
        f"command buffers {found.command_buffers}, lone {dict(lone) if lone is not None else None}  "
        f"sent: {sent}  {result.seconds:.0f} s"
    )


def series_of(result: Result) -> list[Series]:
    found, job = result.figures, result.job
    numbers = {
        ("arguments", "arrays"): found.num_arguments,
        ("arguments", "bytes"): found.argument_bytes,
        ("in place", "bytes"): found.alias_bytes,
        ("temporaries", "bytes"): found.temp_bytes,
        ("outputs", "bytes"): found.output_bytes,
        ("weight copies", "instructions"): found.weight_copies,
        ("pool copies", "instructions"): found.pool_copies,
        ("loops", "instructions"): found.loops,
        ("gates broken", "gates"): len(result.broken),
    }
    for (kind, size), count in found.collectives.items():
        numbers[(f"{kind} of {size} bytes", "instructions")] = count
    if found.command_buffers is not None and found.lone_launches is not None:
        numbers[("command buffers", "launches")] = found.command_buffers
        for kind, count in found.lone_launches.items():
            numbers[(f"outside command buffers: {kind}", "launches")] = count
    case = case_name(job.case)
    return [
        Series(subject=program_name(job.name), case=case, metric=metric, unit=unit, samples=(float(number),))
        for (metric, unit), number in numbers.items()
    ]


def write(results: list[Result], options: argparse.Namespace, *, left: int) -> Path:
    settings = {name: value for name, value in vars(options).items() if name not in ("output", "target")}
    record = Record(
        name="gpu-programs",
        device=Device(
            kind="gpu",
            name="h100 compiled without a GPU",
            count=8,
            memory_bytes=0,
            detail="target description",
        ),
        settings=settings | {"programs": len(results), "programs left out": left},
        series=[series for result in results for series in series_of(result)],
        note=NOTE,
    )
    return write_record(record, options.output)


def main() -> None:
    options = arguments()
    jax.config.update("jax_platforms", "cpu")
    try:
        devices = h100s(options.target.read_text())
    except RuntimeError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    wanted, results, ends_s = jobs(options, devices), [], time.monotonic() + 60 * (options.minutes or 1e6)
    for job in wanted:
        if time.monotonic() > ends_s:
            break
        results.append(run(job, devices))
        print(row(results[-1]), *(f"  BROKEN: {line}" for line in results[-1].broken), sep="\n", flush=True)
    broken = [line for result in results for line in result.broken] + across_depths(results)
    left = len(wanted) - len(results)
    print(
        *across_depths(results),
        f"{len(results)} programs, {left} left out, {len(broken)} gates broken",
        sep="\n",
    )
    if options.output:
        print(write(results, options, left=left))
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
