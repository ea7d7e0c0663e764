"""Compile the engine's programs for H100s without one, hold them to their gates, and print them as a table.

`make gpu-check` runs this with JAX's CUDA plugin and NVRTC on the path: these compile for GPUs where there is
none. No time is measured here, and no matrix product is tuned, so that a real GPU may choose other kernels.
Exits with 1 if a gate is broken, with 2 where nothing can be compiled for CUDA.
"""

import argparse
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import jax

from albireo_jax.core.config import KvDtype, Quantization
from albireo_jax.measure.records import Device, Record, Series, series_by_metric, write_record
from albireo_jax.ops.cuda.kernels import Kernel
from albireo_jax.runtime.batch import Bucket
from albireo_jax.runtime.decode_loop import DecodeLoop
from albireo_jax.runtime.executor import Sampling
from albireo_jax.runtime.logit_rule_calls import LogitRuleProgram
from albireo_jax.runtime.logprob_calls import LogprobProgram
from albireo_jax.runtime.min_tokens import MinTokensProgram
from benchmarks.gpu_programs.compiled_programs import (
    DECODE,
    MIXED,
    MODELS,
    Name,
    ProgramCase,
    compile_program,
    h100s,
    mesh_of,
    programs,
    step_program,
)
from benchmarks.gpu_programs.gates import breaches, depth_breaches, temp_limit
from benchmarks.gpu_programs.kernel_assembly import (
    ARCHITECTURES,
    KERNEL_MODELS,
    KV_DTYPES,
    Assembled,
    assembled,
    kernel_breaches,
    kernels,
    loop_instructions,
    residual_kernels,
    sampling_kernels,
)
from benchmarks.gpu_programs.program_figures import ProgramFigures, figures

ROOT = Path(__file__).resolve().parents[2]
SHALLOW, DEEP = 2, 4
SMALLEST = "llama-3.1-8b"
DEGREES = (1, 2, 4, 8)
NOTE = (
    "Compiled without a GPU for eight H100s as tests/data/h100.textproto describes them; nothing was run or "
    "timed, and matrix products were not tuned. Attention and the selection of tokens are the CUDA kernels "
    "of ops/cuda, which are also assembled alone. XLA ends a command buffer at each collective, and begins "
    "none for fewer than 5 launches. Waits of the host are conditionals, and loops whose number of turns "
    "only the device knows, outside of command buffers. Bytes read are those of the operands of launches."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileJob:
    """One program to compile."""

    case: ProgramCase
    name: Name


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The result of a job; `seconds` is the time of tracing and compiling."""

    job: CompileJob
    figures: ProgramFigures
    broken: list[str]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelResult:
    """A kernel assembled for a GPU."""

    case: str
    role: str
    figures: Assembled
    blocks: int
    loop_instructions: float | None
    broken: list[str]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="all models at all degrees, and one at full depth")
    parser.add_argument("--model", choices=MODELS, help="only this model")
    parser.add_argument("--tp", type=int, help="only this degree")
    parser.add_argument("--target", type=Path, default=ROOT / "tests/data/h100.textproto")
    parser.add_argument("--output", type=Path, help="folder for a record of the table")
    parser.add_argument("--minutes", type=float, help="begin no program after so many minutes")
    return parser.parse_args()


def jobs(options: argparse.Namespace, devices: tuple[object, ...]) -> list[CompileJob]:
    """The most telling first: forward passes at two depths, then what samples, admits, loops and copies."""
    listed = all_jobs(devices) if options.all else few_jobs(devices)
    return [
        job for job in listed if options.model in (None, job.case.model) and options.tp in (None, job.case.tp)
    ]


def few_jobs(devices: tuple[object, ...]) -> list[CompileJob]:
    """The jobs that each change must pass: decode steps of all models, the rest of one at few degrees."""
    one, four, eight = (ProgramCase(model=SMALLEST, tp=tp, layers=SHALLOW) for tp in (1, 4, 8))
    return [
        *forward_passes((eight, one), (DECODE, MIXED)),
        *forward_passes((four,), (DECODE,)),
        *forward_passes((case for case in every_case() if case not in (one, four, eight)), (DECODE,)),
        *forward_passes((replace(case, layers=DEEP) for case in every_case()), (DECODE,)),
        *forward_passes((replace(eight, graph_collectives=True),), (DECODE,)),
        *forward_passes((replace(one, quantization=Quantization.INT8),), (DECODE,)),
        *forward_passes((replace(one, quantization=Quantization.FP8),), (DECODE, MIXED)),
        *forward_passes((replace(eight, quantization=Quantization.FP8, kv_dtype=KvDtype.FP8),), (MIXED,)),
        *forward_passes((replace(one, quantization=Quantization.FP8_W8A16),), (DECODE,)),
        *(
            job
            for job in others(one, devices)
            if isinstance(job.name, DecodeLoop | Sampling | LogprobProgram)
        ),
        *(job for job in others(eight, devices) if not isinstance(job.name, DecodeLoop)),
    ]


def all_jobs(devices: tuple[object, ...]) -> list[CompileJob]:
    """All models at all degrees; what is not a forward pass, of one model and at the highest degree."""
    cases = every_case()
    smallest = [case for case in cases if case.model == SMALLEST]
    ends = [case for case in smallest if case.tp in (min(DEGREES), max(DEGREES))]
    deep = [replace(case, layers=DEEP) for case in cases]
    whole = [replace(case, layers=MODELS[SMALLEST].num_layers) for case in ends]
    codes = [replace(case, quantization=kind) for case in smallest for kind in Quantization]
    paged = [replace(case, kv_dtype=kind) for case in ends for kind in (KvDtype.INT8, KvDtype.FP8)]
    return [
        *forward_passes(cases, (DECODE, MIXED)),
        *forward_passes(deep, (DECODE,)),
        *(job for case in ends for job in others(case, devices)),
        *forward_passes(codes + paged, (DECODE, MIXED)),
        *forward_passes(
            [replace(case, graph_collectives=True) for case in smallest if case.tp > 1], (DECODE, MIXED)
        ),
        *forward_passes(whole, (DECODE,)),
        *forward_passes(deep, (MIXED,)),
        *(
            job
            for case in cases
            if case.tp == max(DEGREES) and case not in ends
            for job in others(case, devices)
        ),
    ]


def every_case() -> list[ProgramCase]:
    """All models at all degrees, at the smaller depth."""
    return [ProgramCase(model=model, tp=tp, layers=SHALLOW) for model in MODELS for tp in DEGREES]


def forward_passes(cases: Iterable[ProgramCase], buckets: Iterable[Bucket]) -> list[CompileJob]:
    return [CompileJob(case=case, name=bucket) for case in cases for bucket in buckets]


def others(case: ProgramCase, devices: tuple[object, ...]) -> list[CompileJob]:
    """Every program of a case but its forward passes."""
    named = programs(step_program(case, mesh_of(devices, case.tp)))
    return [CompileJob(case=case, name=name) for name in named if not isinstance(name, Bucket)]


def assembled_kernels(options: argparse.Namespace) -> Iterator[KernelResult]:
    """The kernels of each model: of layers, for each kind of KV pages, of sampling, and of residuals."""
    for model, shape in KERNEL_MODELS.items():
        for tp in DEGREES if options.all and model in MODELS else DEGREES[:1]:
            case = f"{model} tp={tp}"
            for kv_dtype in KV_DTYPES:
                yield from assembled_roles(
                    f"{case} {kv_dtype} pages", kernels(shape, tp=tp, kv_dtype=kv_dtype)
                )
            yield from assembled_roles(f"{case} sampling", sampling_kernels(shape, tp=tp))
        yield from assembled_roles(model, residual_kernels(shape))


def assembled_roles(case: str, by_role: Mapping[str, Kernel]) -> Iterator[KernelResult]:
    """Some kernels, by what they are for, for each kind of GPU."""
    for role, kernel in by_role.items():
        for architecture in ARCHITECTURES:
            found = assembled(kernel, architecture)
            yield KernelResult(
                case=f"{case} {architecture}",
                role=role,
                figures=found,
                blocks=found.blocks(kernel.threads),
                loop_instructions=found.loop and loop_instructions(role, kernel, found.loop),
                broken=kernel_breaches(role, kernel, found, architecture=architecture),
            )


def run(job: CompileJob, devices: tuple[object, ...]) -> Result:
    began_s = time.perf_counter()
    program = step_program(job.case, mesh_of(devices, job.case.tp))
    lower = programs(program, job.case.kv_dtype)[job.name]
    found = figures(job.case, compile_program(lower()))
    seconds = time.perf_counter() - began_s
    return Result(job=job, figures=found, broken=breaches(job.case, job.name, found), seconds=seconds)


def across_depths(results: list[Result]) -> list[str]:
    """The figures that grow with the model's layers and must not, a line each."""
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
        case MinTokensProgram():
            return f"ban {name.rows}"
        case LogitRuleProgram():
            return f"{name.kind} {name.rows or ''}".rstrip()
        case LogprobProgram():
            return f"{name.kind} {name.wanted}" + (f" of {name.of}" if name.of else "")
        case DecodeLoop():
            return f"loop {name.rows}x{name.steps} {name.route.name.lower()}"
        case str():
            return name
        case _:
            return f"{name.kind} {name.pages}"


def label(job: CompileJob) -> str:
    return f"{case_name(job.case)} {program_name(job.name)}"


def case_name(case: ProgramCase) -> str:
    weights = f" {case.quantization}" if case.quantization else ""
    graphs = " graphs" if case.graph_collectives else ""
    pages = "" if case.kv_dtype is KvDtype.AUTO else f" {case.kv_dtype} pages"
    return f"{case.model}{weights}{pages} tp={case.tp}{graphs} layers={case.layers}"


def row(result: Result) -> str:
    found = result.figures
    sent = ", ".join(f"{count} {kind} {size}" for (kind, size), count in found.collectives.items()) or "-"
    lone, job = found.lone_launches, result.job
    limit = f" of {temp_limit(job.case, job.name) / 2**20:.0f}" if isinstance(job.name, Bucket) else ""
    return (
        f"{label(job):62} args {found.num_arguments:3} {found.argument_bytes / 2**20:9.1f} MiB  "
        f"in place {found.alias_bytes / 2**20:8.2f}  temp {found.temp_bytes / 2**20:7.2f}{limit}  "
        f"copies {found.weight_copies}+{found.pool_copies}  products {found.product_bodies} "
        f"of {found.products}  kernels {found.kernels} "
        f"of {found.launches} launches, {found.read_bytes / 1e9:.3f} GB read  "
        f"loops {found.loops}, waits {found.host_waits}  "
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
        ("products of fp8 with fp8", "instructions"): found.fp8_products,
        ("waits of the host", "instructions"): found.host_waits,
        ("matrix products", "instructions"): found.products,
        ("distinct matrix products", "bodies"): found.product_bodies,
        ("our kernels", "launches"): found.kernels,
        ("all launches", "launches"): found.launches,
        ("read by launches", "bytes"): found.read_bytes,
        ("gates broken", "gates"): len(result.broken),
    }
    for (kind, size), count in found.collectives.items():
        numbers[(f"{kind} of {size} bytes", "instructions")] = count
    if found.command_buffers is not None and found.lone_launches is not None:
        numbers[("command buffers", "launches")] = found.command_buffers
        numbers[("all launches", "launches")] = found.launches or 0
        for kind, count in found.lone_launches.items():
            numbers[(f"outside command buffers: {kind}", "launches")] = count
    case = case_name(job.case)
    samples = {metric: [number] for metric, number in numbers.items()}
    return series_by_metric(program_name(job.name), case, samples)


def kernel_row(result: KernelResult) -> str:
    found, needed = result.figures, result.loop_instructions
    return (
        f"{result.case + ' ' + result.role:62} registers {found.registers:3}  "
        f"blocks a core {result.blocks:2}  spilled {found.spill_bytes}  stack {found.stack_bytes}  "
        f"shared {found.shared_bytes}  instructions {found.instructions}"
        + (f", {needed:.0f} for 64 tokens" if needed is not None else "")
    )


def kernel_series(result: KernelResult) -> list[Series]:
    found = result.figures
    numbers: dict[tuple[str, str], float] = {
        ("registers", "registers"): found.registers,
        ("blocks a core", "blocks"): result.blocks,
        ("spilled", "bytes"): found.spill_bytes,
        ("stack", "bytes"): found.stack_bytes,
        ("shared memory", "bytes"): found.shared_bytes,
        ("code", "instructions"): found.instructions,
        ("gates broken", "gates"): len(result.broken),
    }
    if result.loop_instructions is not None:
        numbers[("loop over 64 cached tokens", "instructions")] = result.loop_instructions
    samples = {metric: [number] for metric, number in numbers.items()}
    return series_by_metric(f"kernel of {result.role}", result.case, samples)


def write(results: list[Result], seen: list[KernelResult], options: argparse.Namespace, *, left: int) -> Path:
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
        settings=settings | {"programs": len(results), "programs left out": left, "kernels": len(seen)},
        series=[
            *(series for result in results for series in series_of(result)),
            *(series for result in seen for series in kernel_series(result)),
        ],
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
    ends_s = time.monotonic() + 60 * (options.minutes or 1e6)
    seen: list[KernelResult] = []
    for kernel in assembled_kernels(options):
        seen.append(kernel)
        print(kernel_row(kernel), *(f"  BROKEN: {line}" for line in kernel.broken), sep="\n", flush=True)
    wanted, results = jobs(options, devices), []
    for job in wanted:
        if time.monotonic() > ends_s:
            break
        results.append(run(job, devices))
        print(row(results[-1]), *(f"  BROKEN: {line}" for line in results[-1].broken), sep="\n", flush=True)
    broken = [line for result in (*seen, *results) for line in result.broken] + across_depths(results)
    left = len(wanted) - len(results)
    print(
        *across_depths(results),
        f"{len(seen)} kernels, {len(results)} programs, {left} left out, {len(broken)} gates broken",
        sep="\n",
    )
    if options.output:
        print(write(results, seen, options, left=left))
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
