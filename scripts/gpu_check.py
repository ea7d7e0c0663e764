"""Checks and measures the engine on a machine with one GPU, in parts that can be run alone.

`scripts/gpu_check.sh` takes these options, and runs every part as a process with a limit of time. It needs
neither a network nor an installed albireo_jax: what a Python lacks is carried as wheels.

    scripts/gpu_check.sh --data DATA --wheels WHEELS            everything, in less than nine minutes
    scripts/gpu_check.sh --only numerics,decode                 two parts
    scripts/gpu_check.sh --only decode --stretch 3              one part, with three times its time
    scripts/gpu_check.sh --only peers --stretch 5 --peer vllm=VENV/bin/python --peer llama.cpp=LLAMA_SERVER
    scripts/gpu_check.sh --device cpu --small --data DATA       every part at tiny sizes, without a GPU

Exits with 1 if a part failed or was cut off, or if something is wrong; goals of speed that are missed are
only told. The commands are those that the shell script calls: plan, part, start, report.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from albireo_jax.experiments.gpu_check.parts import PARTS, PEERS, TRANSFORMERS, chosen, find_part

if TYPE_CHECKING:
    from albireo_jax.experiments.gpu_check.check import Check

ROOT = Path(__file__).resolve().parents[1]
_CPU_STRETCH = 5.0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="gpu_check.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="parts: " + "; ".join(f"{part.name} ({part.title}, {part.limit_s:g} s)" for part in PARTS),
    )
    made.add_argument("--only", metavar="PART,PART", help="these parts, not all")
    made.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    made.add_argument("--small", action="store_true", help="tiny models and few cases, to try everything")
    made.add_argument(
        "--stretch", type=float, help="times as long for every part; by default 1, or 5 on a CPU"
    )
    made.add_argument(
        "--data", type=Path, help="folder of real models and traces; its parts are skipped without"
    )
    made.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder of records"
    )
    made.add_argument("--wheels", type=Path, help="folder of wheels to install for this run only")
    made.add_argument("--python", default=sys.executable, help="the interpreter that runs everything")
    made.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=PROGRAM",
        help="an engine to compare with: transformers=PYTHON (by default this Python), "
        "llama.cpp=LLAMA_SERVER, vllm=PYTHON",
    )
    made.add_argument(
        "--dump-target", type=Path, help="file for the description of this GPU, as tests/data has it"
    )
    made.add_argument("--dump-hlo", type=Path, help="file for the compiled decode step, gzipped text")
    made.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    return made


def arguments(argv: list[str]) -> argparse.Namespace:
    """The options, with `command` and, for a part, its `name`; exits with 2 and a reason for bad ones."""
    made = parser()
    made.add_argument("command", choices=("plan", "part", "start", "report"))
    made.add_argument("name", nargs="?")
    options = made.parse_args(argv)
    if options.stretch is None:
        options.stretch = _CPU_STRETCH if options.device == "cpu" else 1.0
    try:
        options.peers = {TRANSFORMERS: options.python, **named_peers(options.peer)}
        options.parts = chosen(options.only, stretch=options.stretch)
        if options.command == "part":
            options.part = next(each for each in options.parts if each.name == find_part(options.name).name)
    except ValueError as error:
        made.error(str(error))
    return options


def named_peers(words: list[str]) -> dict[str, str]:
    """Peers of the options and their programs; raises ValueError for one that is not known or not there."""
    if not words:  # plans are made by Python's own library alone
        return {}
    from albireo_jax.experiments.compare import parse_peers

    return parse_peers(words, known=PEERS)


def runners() -> "dict[str, Callable[[Check], None]]":
    """The function of each part; importing them imports JAX."""
    from albireo_jax.experiments.gpu_check.ceilings import run_ceilings
    from albireo_jax.experiments.gpu_check.golden import run_golden
    from albireo_jax.experiments.gpu_check.host import run_host
    from albireo_jax.experiments.gpu_check.numerics import run_numerics
    from albireo_jax.experiments.gpu_check.peers import run_peers
    from albireo_jax.experiments.gpu_check.programs import run_programs
    from albireo_jax.experiments.gpu_check.shards import run_shards
    from albireo_jax.experiments.gpu_check.steps import run_decode, run_prefill
    from albireo_jax.experiments.gpu_check.swapping import run_swap
    from albireo_jax.experiments.gpu_check.trace import run_trace

    return {
        "ceilings": run_ceilings,
        "numerics": run_numerics,
        "golden": run_golden,
        "decode": run_decode,
        "prefill": run_prefill,
        "trace": run_trace,
        "peers": run_peers,
        "programs": run_programs,
        "host": run_host,
        "swap": run_swap,
        "shards": run_shards,
    }


def new_check(options: argparse.Namespace, *, name: str, deadline_s: float) -> "Check":
    """What a part is told. JAX is held to the device that was asked for, and starts later."""
    import jax

    from albireo_jax.experiments.gpu_check.check import Check
    from albireo_jax.experiments.gpu_check.notebook import Notebook

    on_cpu = options.device == "cpu"
    jax.config.update("jax_platforms", "cpu" if on_cpu else "cuda,cpu")
    return Check(
        small=options.small,
        on_cpu=on_cpu,
        data=options.data,
        output=options.output,
        notebook=Notebook(name, options.work, deadline_s=deadline_s),
        peers=options.peers,
        dump_target=options.dump_target,
        dump_hlo=options.dump_hlo,
    )


def run_part(options: argparse.Namespace) -> int:
    """Run one part; what it measured is in its notebook however it ends."""
    from albireo_jax.experiments.gpu_check.notebook import DONE, FAILED, SKIPPED, PartSkipped

    check = new_check(options, name=options.part.name, deadline_s=options.part.deadline_s)
    status, reason = FAILED, ""
    try:
        runners()[options.part.name](check)
        status = DONE
    except PartSkipped as skipped:
        print(f"SKIPPED {options.part.name}: {skipped}", flush=True)
        status, reason = SKIPPED, str(skipped)
    finally:
        error = sys.exception() if status == FAILED else None
        check.notebook.close(status, reason or _first_line(error))
    return 0


def _first_line(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}" if error is not None else ""


def run_start(options: argparse.Namespace) -> int:
    """Prepare the engine that the part `host` starts, and print what it took."""
    import tempfile

    from albireo_jax.experiments.gpu_check.host import measure_start, start_line

    with tempfile.TemporaryDirectory() as folder:
        options.work = Path(folder)
        print(start_line(measure_start(new_check(options, name="start", deadline_s=0.0))))
    return 0


def run_report(options: argparse.Namespace) -> int:
    """Print the table and write the record."""
    from albireo_jax.experiments.gpu_check.device import device_here
    from albireo_jax.experiments.gpu_check.report import is_good, read_all, record_of, table
    from albireo_jax.experiments.records import write_record

    on_cpu = options.device == "cpu"
    notes = read_all(options.work, options.parts)
    print(table(options.parts, notes, on_cpu=on_cpu))
    settings = {"small": options.small, "stretch": options.stretch, "only": options.only}
    record = record_of(options.parts, notes, device=device_here(on_cpu=on_cpu), settings=settings)
    print(write_record(record, options.output))
    return 0 if is_good(notes, on_cpu=on_cpu) else 1


def main() -> int:
    options = arguments(sys.argv[1:])
    match options.command:
        case "plan":
            for part in options.parts:
                print(part.name, f"{part.limit_s:g}")
            return 0
        case "part":
            return run_part(options)
        case "start":
            return run_start(options)
        case _:
            return run_report(options)


if __name__ == "__main__":
    sys.exit(main())
