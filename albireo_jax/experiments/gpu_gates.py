"""What a program compiled for a GPU must look like, and what it does look like.

What would make a step slow shows in the compiled text: copies of weights or of the KV pool, temporaries that
grow with the depth, collectives beyond those of the design, kernels that are launched one by one, and loops,
in which the host waits for the device.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from albireo_jax.core.config import Dtype, ModelConfig
from albireo_jax.core.memory import page_bytes, weight_bytes
from albireo_jax.experiments.collectives import collectives
from albireo_jax.experiments.gpu_kernels import launches, scratch_bytes
from albireo_jax.experiments.gpu_programs import (
    MAX_LEN,
    MAX_ROWS,
    NUM_PAGES,
    PAGE_SIZE,
    Case,
    CompiledProgram,
    Name,
)
from albireo_jax.experiments.hlo import Instruction, Program, parse
from albireo_jax.nn.shapes import weight_shapes
from albireo_jax.runtime.banned_rows import BanProgram
from albireo_jax.runtime.batch import SLOT_FIELDS, Bucket
from albireo_jax.runtime.decode_loop import DecodeLoop
from albireo_jax.runtime.executor import Sampling
from albireo_jax.sampling.routes import wire_bytes

MEMORY_TOLERANCE = 0.03
"""By how much what programs take on a device may differ from what `core.memory` counts.

The arguments of forward passes and loops from what is counted at their depth; what a program takes beside its
arguments, from nothing, in parts of the weights and pages of the whole model, as it does not grow with depth.
"""

_MAX_ARGUMENTS = 18
_MAX_SCALES = 4
_TABLE_BYTES = 4 * (MAX_ROWS + 1) * (MAX_LEN // PAGE_SIZE)
_LAUNCH = re.compile(r"^( *)\d+: (k[A-Z]\w*)")
_COLLECTIVES = ("kAll", "kAsync", "kReduceScatter", "kCollective", "kPartitionId")
_FEWEST_LAUNCHES = 5  # that XLA makes a command buffer of
_PARTIAL_SUMS_BYTES = 16 * 2**20  # of products that cores share by their inner dimension, at most 8 parts
_PACKING_BYTES = 2**18  # by which a few layers may pack their temporaries better than many
_KERNEL_TARGET = 'custom_call_target="__gpu$xla.gpu.ptx"'
_FREE = ("parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional")


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What one program is on each device.

    `collectives` counts them by kind and bytes of the result. `weight_copies` and `pool_copies` count
    instructions that write a layer's weights or the KV pool anew. `kernels` are launches of ours.
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
    command_buffers: int | None
    lone_launches: Mapping[str, int] | None
    longest_run: int | None


def figures(case: Case, compiled: CompiledProgram) -> Figures:
    """The figures of a compiled program."""
    program = parse(compiled.text)
    opcodes = Counter(one.opcode for one in program.instructions())
    launched = launch_order(compiled.launches) if compiled.launches else None
    return Figures(
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
        command_buffers=launched.buffers if launched else None,
        lone_launches=launched.lone if launched else None,
        longest_run=launched.longest_run if launched else None,
    )


def breaches(case: Case, name: Name, found: Figures) -> list[str]:
    """What of a program is not as it must be, a line each."""
    said = [
        *_copies(found),
        *_memory(case, name, found),
        *(_forward(case, name, found) if isinstance(name, Bucket) else []),
        *(_sampling(case, name, found) if isinstance(name, Sampling) else []),
        *(_loop(case, name, found) if isinstance(name, DecodeLoop) else []),
        *(_decisions(case, name, found) if isinstance(name, Sampling | DecodeLoop) else []),
    ]
    if not isinstance(name, Bucket | Sampling | DecodeLoop) and (found.collectives or found.host_waits):
        sent = dict(found.collectives)
        said.append(
            f"collectives {sent} and {found.host_waits} waits of the host, where there should be none"
        )
    return said


def depth_breaches(shallow: Figures, deep: Figures) -> list[str]:
    """What grows with the depth of the model and must not, of one program at two depths."""
    if deep.temp_bytes > 1.05 * shallow.temp_bytes + _PACKING_BYTES:
        return [f"temporaries grow with the layers: {shallow.temp_bytes} to {deep.temp_bytes} bytes"]
    return []


class LaunchOrder(NamedTuple):
    """Command buffers of a program, launches outside of any by kind, and most of them in a row.

    Collectives, loops and command buffers end a row.
    """

    buffers: int
    lone: Counter[str]
    longest_run: int


def launch_order(launches: str) -> LaunchOrder:
    """What stands in the text of a program's sequence of launches."""
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


def temp_limit(case: Case, bucket: Bucket) -> int:
    """Bytes of temporaries that a forward pass may have: what one layer makes of its tokens, and no weights.

    Activations are counted as float32, which products with codes are before they are scaled. Beside them,
    what the attention kernels leave for each other, once, as layers take turns, and partial sums.
    """
    model, tp = case.config, case.tp
    qkv = (model.num_heads // tp + 2 * model.kv_heads_at(tp) // tp) * model.head_dim
    widths = 2 * model.intermediate_size // tp + model.hidden_size + qkv
    scratch = scratch_bytes(model, bucket, tp=tp, kv_dtype=case.kv_dtype)
    return 4 * bucket.tokens * widths + scratch + _PARTIAL_SUMS_BYTES


def _copies(found: Figures) -> Iterator[str]:
    if found.weight_copies:
        yield f"{found.weight_copies} copies of a layer's weights"
    if found.pool_copies:
        yield f"{found.pool_copies} copies of the KV pool"


def _pool_bytes(case: Case, model: ModelConfig) -> int:
    """Bytes of the pages of all of a model's layers."""
    page = page_bytes(model, tp=case.tp, page_size=PAGE_SIZE, dtype=Dtype.BFLOAT16, kv_dtype=case.kv_dtype)
    return (NUM_PAGES + 1) * page


def _counted_bytes(case: Case, model: ModelConfig) -> int:
    return weight_bytes(model, tp=case.tp, dtype=Dtype.BFLOAT16) + _pool_bytes(case, model)


def _memory(case: Case, name: Name, found: Figures) -> Iterator[str]:
    """Donated state is written where it is, and what comes and goes is little beside what stays."""
    pool = _pool_bytes(case, case.config)
    sampler = 4 * (MAX_ROWS + 1) * (1 + SLOT_FIELDS)
    donated = {"admit": sampler, "begin with pages": _TABLE_BYTES}
    match name:
        case Bucket():
            wanted = pool + _TABLE_BYTES
        case Sampling():
            wanted = sampler
        case DecodeLoop():
            wanted = pool + _TABLE_BYTES + sampler
        case BanProgram():
            wanted = 0  # log probabilities still need the logits that it changes
        case str():
            wanted = donated[name]
        case _:
            wanted = pool if "write" in name.kind else 0
    if found.alias_bytes != wanted:
        yield f"{found.alias_bytes} bytes are written in place, not the {wanted} of the donated state"
    beside = found.temp_bytes + max(0, found.output_bytes - wanted)
    whole = _counted_bytes(case, case.whole)
    if beside > MEMORY_TOLERANCE * whole:
        yield f"{beside} bytes beside the arguments, where {whole} are counted for the whole model"


def _arguments(case: Case, found: Figures) -> Iterator[str]:
    counted = _counted_bytes(case, case.config)
    if abs(found.argument_bytes / counted - 1) > MEMORY_TOLERANCE:
        yield f"{found.argument_bytes} bytes of arguments, where {counted} are counted"


def _forward(case: Case, bucket: Bucket, found: Figures) -> Iterator[str]:
    model, tp = case.config, case.tp
    limit = temp_limit(case, bucket)
    if found.temp_bytes > limit:
        yield f"{found.temp_bytes} bytes of temporaries, more than {limit}"
    most = _MAX_ARGUMENTS + (_MAX_SCALES if case.quantization is not None else 0)
    if found.num_arguments > most:
        yield f"{found.num_arguments} arguments, more than {most}"
    yield from _arguments(case, found)
    sums = 2 * case.layers + 1 if tp > 1 else 0
    result_bytes = bucket.tokens * model.hidden_size * Dtype.BFLOAT16.num_bytes
    if found.collectives != ({("all-reduce", result_bytes): sums} if sums else {}):
        yield f"collectives {dict(found.collectives)}, not {sums} all-reduces of {result_bytes} bytes"
    if found.loops or found.host_waits:
        yield f"{found.loops} loops and {found.host_waits} waits of the host in a forward pass"
    kernels = case.layers * len(launches(model, bucket, tp=tp, kv_dtype=case.kv_dtype))
    if found.kernels != kernels:
        yield f"{found.kernels} attention kernels, not {kernels}"
    yield from _command_buffers(found, sums=sums)


def _command_buffers(found: Figures, *, sums: int) -> Iterator[str]:
    """Everything is in a command buffer but collectives and the few kernels between some of them.

    XLA ends a buffer at each collective, and begins none for fewer than `_FEWEST_LAUNCHES`. What the first
    collective runs beside has a buffer of its own.
    """
    if found.command_buffers is None or found.lone_launches is None or found.longest_run is None:
        yield "XLA does not tell what is in command buffers"
        return
    most = sums + 2 if sums else 1
    if not 1 <= found.command_buffers <= most:
        yield f"{found.command_buffers} command buffers, not 1 ... {most}"
    if found.longest_run >= (_FEWEST_LAUNCHES if sums else 1):
        yield f"{found.longest_run} launches in a row are in no command buffer"


def _loop(case: Case, loop: DecodeLoop, found: Figures) -> Iterator[str]:
    yield from _arguments(case, found)
    bucket = Bucket(loop.rows, loop.rows)
    kernels = case.layers * len(launches(case.config, bucket, tp=case.tp, kv_dtype=case.kv_dtype))
    if found.kernels != kernels:
        yield f"{found.kernels} attention kernels, not {kernels}"


def _decisions(case: Case, name: Sampling | DecodeLoop, found: Figures) -> Iterator[str]:
    """Sampling has nothing to decide, and one GPU decides by itself how often loops of decode steps turn.

    Over several, XLA keeps loops with collectives out of command buffers, and the host decides.
    """
    waits = int(isinstance(name, DecodeLoop) and case.tp > 1)
    if found.host_waits > waits:
        yield f"{found.host_waits} waits of the host, more than {waits}"
    if case.tp == 1:
        yield from _command_buffers(found, sums=0)


def _sampling(case: Case, name: Sampling, found: Figures) -> Iterator[str]:
    columns = case.config.padded_vocab_size(case.tp)
    wanted = wire_bytes(name.route, rows=name.rows, columns=columns, ranks=case.tp)
    moved = sum(size * count for (_, size), count in found.collectives.items())
    if moved > wanted:
        yield f"{moved} bytes travel, more than {wanted}"
    gathered = max((size for kind, size in found.collectives if kind == "all-gather"), default=0)
    if gathered > 4 * name.rows:
        yield f"an all-gather of {gathered} bytes, where only {name.rows} ids should be gathered"


def _host_waits(program: Program, launched: LaunchOrder | None) -> int:
    """Decisions of the host on what the device has calculated; all there are, if launches are not known."""
    text = Counter(one.opcode for one in program.instructions())
    counted = sum("known_trip_count" in one.text for one in program.instructions() if one.opcode == "while")
    if launched is None:
        return text["conditional"] + text["while"] - counted
    return max(0, launched.lone["kConditional"] + launched.lone["kWhile"] - counted)


def _weight_copies(case: Case, program: Program) -> int:
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


def _pool_copies(case: Case, program: Program) -> int:
    """Instructions that write the whole of the pool's keys or values and are no scatter into them."""
    model = case.config
    heads = model.kv_heads_at(case.tp) // case.tp
    pool = (model.num_layers * (NUM_PAGES + 1) * PAGE_SIZE * heads) * model.head_dim
    in_place = ("scatter", "dynamic-update-slice")
    return sum(
        any(array.elements == pool for array in one.result)
        and not any(inner.opcode in in_place for inner in (one, *_inner(one, program)))
        for one, _ in _outside_fusions(program)
    )


def _outside_fusions(program: Program) -> Iterator[tuple[Instruction, list[tuple[int, ...]]]]:
    """Instructions that have a result of their own in memory, and the shapes of what they read."""
    fused = {name for one in program.instructions() if one.opcode == "fusion" for name in one.called}
    for computation, instructions in program.computations.items():
        if computation in fused:
            continue
        by_name = {one.name: one for one in instructions}
        for one in instructions:
            if one.opcode in _FREE:
                continue
            read = [_source(by_name[name], by_name) for name in one.operands if name in by_name]
            yield one, [array.shape for source in read for array in source.result]


def _source(one: Instruction, by_name: Mapping[str, Instruction]) -> Instruction:
    """What a chain of bitcasts looks at."""
    while one.opcode == "bitcast" and one.operands[0] in by_name:
        one = by_name[one.operands[0]]
    return one


def _multiplies(one: Instruction, program: Program) -> bool:
    return one.opcode in ("dot", "custom-call") or any(
        inner.opcode == "dot" for inner in _inner(one, program)
    )


def _inner(one: Instruction, program: Program) -> Sequence[Instruction]:
    """Instructions of what a fusion calls, and of what these call."""
    found: list[Instruction] = []
    if one.opcode == "fusion":
        for name in one.called:
            for inner in program.computations[name]:
                found += [inner, *_inner(inner, program)]
    return found


def _share(name: str, whole: tuple[int, ...], tp: int) -> tuple[int, ...]:
    """The shape of a rank's share of a stack of matrices: split over its heads or its feed-forward width."""
    axes = name.rpartition("_")[2]
    return tuple(size // tp if axis in "NF" else size for axis, size in zip(axes, whole, strict=True))
