"""The process of one part of the GPU check, as `gpu_check.runner` starts it."""

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, cast

from benchmarks.gpu_check.part_figures import PartFigures, PartSkipped
from benchmarks.gpu_check.part_settings import PartSettings, end_with_parent, read_settings
from benchmarks.gpu_check.record_file import DONE, FAILED, SKIPPED, RecordFile

if TYPE_CHECKING:
    from benchmarks.gpu_check.check import Check

RUNNERS = {
    "device": "device.run_device",
    "golden": "golden.run_golden",
    "attention": "attention_cases.run_attention",
    "sampling": "numerics.run_sampling",
    "forms": "forms.run_forms",
    "decode": "decode.run_decode",
    "prefill": "prefill.run_prefill",
    "trace": "trace_part.run_trace",
    "start": "start_times.run_start",
    "peers": "peer_part.run_peers",
    "models": "decode.run_models",
    "swap": "swapping.run_swap",
    "shards": "rank_tables.run_shards",
}
"""The function of each part and its module here, which is imported in the process of the part only."""


def main() -> int:
    """Run one part; what it measured is in the record however it ends."""
    end_with_parent()
    name, file, limit_s, began_s = sys.argv[1:]
    settings = read_settings(Path(file))
    record = RecordFile.read(Path(settings.record))
    figures = PartFigures(name, record, limit_s=float(limit_s), began_s=float(began_s))
    try:
        _run(name, settings, figures)
    except PartSkipped as skipped:
        print(f"SKIPPED {name}: {skipped}", flush=True)
        figures.close(SKIPPED, reason=str(skipped))
    except BaseException as error:
        figures.close(FAILED, error=error)
        raise
    else:
        figures.close(DONE)
    return 0


def _run(name: str, settings: PartSettings, figures: PartFigures) -> None:
    from benchmarks.gpu_check.check import new_check

    run_of(name)(new_check(settings, figures))


def run_of(name: str) -> "Callable[[Check], None]":
    """The function that runs a part."""
    module, function = RUNNERS[name].split(".")
    found = import_module(f"benchmarks.gpu_check.{module}")
    return cast("Callable[[Check], None]", vars(found)[function])


if __name__ == "__main__":
    sys.exit(main())
