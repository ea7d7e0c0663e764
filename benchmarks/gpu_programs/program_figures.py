"""Figures of a program compiled for a GPU: copies, collectives, loops, launches and memory, counted."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from albireo_jax.nn.shapes import weight_shapes
from albireo_jax.ops.cuda.kernels import Entry
from albireo_jax.sampling.sample_cuda import DRAW_READS
from benchmarks.gpu_programs.compiled_programs import NUM_PAGES, PAGE_SIZE, CompiledProgram, ProgramCase
from benchmarks.gpu_programs.matrix_products import product_bodies
from benchmarks.lib.hlo import Instruction, Program, inner_instructions, outside_fusions, parse
from benchmarks.lib.hlo_collectives import collectives

_LAUNCH = re.compile(r"^( *)\d+: (k[A-Z]\w*)")
_KERNEL_TARGET = 'custom_call_target="__gpu$xla.gpu.ptx"'
_FP8_PRODUCT = 'custom_call_target="__cublas$lt$matmul$f8"'
_IN_PLACE = "output_to_operand_aliasing"
_COLLECTIVES = ("kAll", "kAsync", "kReduceScatter", "kCollective", "kPartitionId")
_NO_LAUNCHES = ("kCommandBuffer", "kWhile", "kConditional", "kSequential")
_NO_READS = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call")
_FREE = ("parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramFigures:
    """Figures of one program on each device.

    `collectives` counts them by kind and bytes of the result. `weight_copies` and `pool_copies` count
    instructions that write a layer's weights or the KV pool anew. `kernels` are launches of ours, `launches`
    all of them, and `read_bytes` what they read at most. `products` are matrix products, `product_bodies`
    those of them that XLA would tune apart, and `fp8_products` those by cuBLASLt of fp8 with fp8. `peaks`
    are reductions to a maximum.
    `host_waits` are conditionals, and loops whose number of turns only the device knows, outside of command
    buffers: the host decides there, once it has waited for the device. `command_buffers`, `lone_launches`,
    those outside of any, and `longest_run` of these between collectives are None where XLA does not tell.
    """

    argument_bytes: int
    num_arguments: int
    alias_bytes: int
    temp_bytes: int
    output_bytes: int
    collectives: Mapping[tuple[str, int], int]
    weight_copies: int
    pool_copies: int
    loops: int
    host_waits: int
    kernels: int
    products: int
    product_bodies: int
    launches: int
    read_bytes: int
    fp8_products: int
    peaks: int
    command_buffers: int | None
    lone_launches: Mapping[str, int] | None
    longest_run: int | None

    @property
    def moved_bytes(self) -> int:
        """Bytes of the results of all collectives."""
        return sum(size * count for (_, size), count in self.collectives.items())


def figures(case: ProgramCase, compiled: CompiledProgram) -> ProgramFigures:
    """The figures of a compiled program."""
    program = parse(compiled.text)
    opcodes = Counter(one.opcode for one in program.instructions())
    launched = launch_order(compiled.launches) if compiled.launches else None
    bodies = product_bodies(program)
    return ProgramFigures(
        argument_bytes=compiled.argument_bytes,
        num_arguments=sum(one.opcode == "parameter" for one in program.computations[program.entry]),
        alias_bytes=compiled.alias_bytes,
        temp_bytes=compiled.temp_bytes,
        output_bytes=compiled.output_bytes,
        collectives=Counter((one.kind, one.result_bytes) for one in collectives(program)),
        weight_copies=_weight_copies(case, program),
        pool_copies=_pool_copies(case, program),
        loops=opcodes["while"],
        host_waits=_host_waits(program, launched),
        kernels=sum(_KERNEL_TARGET in one.text for one in program.instructions()),
        products=bodies.total(),
        product_bodies=len(bodies),
        launches=launch_count(compiled.launches),
        read_bytes=read_bytes(program),
        fp8_products=sum(_FP8_PRODUCT in one.text for one in program.instructions()),
        peaks=sum(one.opcode == "reduce" and _is_maximum(one, program) for one in program.instructions()),
        command_buffers=launched.buffers if launched else None,
        lone_launches=launched.lone if launched else None,
        longest_run=launched.longest_run if launched else None,
    )


def launch_count(launches: str) -> int:
    """Launches in the text of a program's sequence of them, inside of command buffers and outside."""
    kinds = (match.group(2) for match in map(_LAUNCH.match, launches.splitlines()) if match)
    return sum(kind not in _NO_LAUNCHES for kind in kinds)


def read_bytes(program: Program) -> int:
    """Bytes of what all launches read, each operand once, but for those that a kernel of ours reads again."""
    total = 0
    for one, by_name in outside_fusions(program):
        if one.opcode in _NO_READS:
            continue
        times = list(DRAW_READS.values()) if f'"{Entry.DRAW}"' in one.text else []
        for nth, name in enumerate(one.operands):
            size = sum(array.bytes for array in by_name[name].result) if name in by_name else 0
            total += size * (times[nth] if nth < len(times) else 1)
    return total


class LaunchOrder(NamedTuple):
    """Command buffers of a program, launches outside of any by kind, and most of them in a row.

    Collectives, loops and command buffers end a row.
    """

    buffers: int
    lone: Counter[str]
    longest_run: int


def launch_order(launches: str) -> LaunchOrder:
    """Read the text of a program's sequence of launches."""
    buffers, lone = 0, Counter[str]()
    run = longest_run = 0
    inside: int | None = None
    for line in launches.splitlines():
        match = _LAUNCH.match(line)
        if match is None:
            continue
        indent, kind = len(match.group(1)), match.group(2)
        if inside is not None and indent > inside:
            continue
        inside = indent if kind == "kCommandBuffer" else None
        if kind == "kCommandBuffer":
            buffers += 1
        else:
            lone[kind] += 1
        run = 0 if kind.startswith((*_COLLECTIVES, "kCommandBuffer", "kWhile", "kConditional")) else run + 1
        longest_run = max(longest_run, run)
    return LaunchOrder(buffers, lone, longest_run)


def _host_waits(program: Program, launched: LaunchOrder | None) -> int:
    """Decisions of the host on what the device has calculated; all there are, if launches are not known."""
    text = Counter(one.opcode for one in program.instructions())
    counted = sum("known_trip_count" in one.text for one in program.instructions() if one.opcode == "while")
    if launched is None:
        return text["conditional"] + text["while"] - counted
    return max(0, launched.lone["kConditional"] + launched.lone["kWhile"] - counted)


def _weight_copies(case: ProgramCase, program: Program) -> int:
    """Instructions that read a stack of matrices, or a layer of one, and write a layer or all elsewhere."""
    stacks: dict[tuple[int, ...], set[int]] = {}
    for name, whole in weight_shapes(case.config, case.tp).items():
        if len(whole) > 2:
            local = _share(name, whole, case.tp)
            stacks[local] = {prod(local), prod(local[1:])}
            stacks[local[1:]] = {prod(local[1:])}
    count = 0
    for one, shapes in _outside_fusions(program):
        results = {array.elements for array in one.result}
        if _multiplies(one, program):
            continue
        count += any(results & stacks.get(shape, set()) for shape in shapes)
    return count


def _pool_copies(case: ProgramCase, program: Program) -> int:
    """Instructions that write the whole of the pool's keys or values, and not only their tokens in place."""
    model = case.config
    heads = model.kv_heads_at(case.tp) // case.tp
    pool = (model.num_layers * (NUM_PAGES + 1) * PAGE_SIZE * heads) * model.head_dim
    in_place = ("scatter", "dynamic-update-slice")
    return sum(
        any(array.elements == pool for array in one.result)
        and not (_KERNEL_TARGET in one.text and _IN_PLACE in one.text)
        and not any(inner.opcode in in_place for inner in (one, *_fused(one, program)))
        for one, _ in _outside_fusions(program)
    )


def _is_maximum(one: Instruction, program: Program) -> bool:
    """Whether a reduction takes the largest number."""
    return any(inner.opcode == "maximum" for name in one.called for inner in program.computations[name])


def _outside_fusions(program: Program) -> Iterator[tuple[Instruction, list[tuple[int, ...]]]]:
    """Instructions that have a result of their own in memory, and the shapes of what they read."""
    for one, by_name in outside_fusions(program):
        if one.opcode in _FREE:
            continue
        read = [_source(by_name[name], by_name) for name in one.operands if name in by_name]
        yield one, [array.shape for source in read for array in source.result]


def _source(one: Instruction, by_name: Mapping[str, Instruction]) -> Instruction:
    """The instruction at the end of a chain of bitcasts."""
    while one.opcode == "bitcast" and one.operands[0] in by_name:
        one = by_name[one.operands[0]]
    return one


def _multiplies(one: Instruction, program: Program) -> bool:
    return one.opcode in ("dot", "custom-call") or any(
        inner.opcode == "dot" for inner in _fused(one, program)
    )


def _fused(one: Instruction, program: Program) -> Iterator[Instruction]:
    """Instructions of what a fusion calls, and of what these call."""
    if one.opcode == "fusion":
        yield from inner_instructions(one, program)


def _share(name: str, whole: tuple[int, ...], tp: int) -> tuple[int, ...]:
    """The shape of a rank's share of a stack of matrices: split over its heads or its feed-forward width."""
    axes = name.rpartition("_")[2]
    return tuple(size // tp if axis in "NF" else size for axis, size in zip(axes, whole, strict=True))
