"""How many launches a program compiled for a GPU has, and how many bytes these read at most."""

import re

from albireo_jax.ops.cuda.kernels import Entry
from albireo_jax.sampling.sample_cuda import DRAW_READS
from benchmarks.lib.hlo import Program, outside_fusions

_LAUNCH = re.compile(r"^ *\d+: (k[A-Z]\w*)")
_NO_LAUNCHES = ("kCommandBuffer", "kWhile", "kConditional", "kSequential")
_NO_READS = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call")


def launch_count(launches: str) -> int:
    """Launches in the text of a program's sequence of them, inside of command buffers and outside."""
    kinds = (match.group(1) for match in map(_LAUNCH.match, launches.splitlines()) if match)
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
