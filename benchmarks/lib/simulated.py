"""The frame of studies on simulated GPUs: their options, models by name, and the paper's degrees."""

import json
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path

from albireo_jax.core.hf_config import model_config_from_hf
from albireo_jax.core.model_config import ModelConfig
from albireo_jax.measure.records import Device, Series, series_by_metric
from albireo_jax.sim.gpus import find_gpu
from albireo_jax.sim.replica import Targets
from benchmarks.lib.recording import script_parser

NOT_MEASURED = "Simulated (roofline): the shipped scheduler on a clock. Nothing was measured on a GPU."
"""For the note of every such record; their names begin with `simulated-`."""

ANY_LATENCY = Targets(ttft_s=1e9, tpot_s=1e9)
"""Targets of studies that ask for throughput alone."""

_PAPER_TP = {7: (1, 1), 8: (1, 1), 13: (1, 2), 14: (1, 2), 32: (2, 4), 70: (4, 8), 72: (4, 8)}


def paper_tp(name: str) -> tuple[int, int] | None:
    """The t_e that the paper found for a model of this size, of vLLM 0.11.2 and of Albireo; None without.

    The size is read from the name, in 10^9 parameters; 8 stands for the paper's 7.
    """
    size = re.search(r"(\d+)b\b", name, re.IGNORECASE)
    return _PAPER_TP.get(int(size[1])) if size else None


def simulated_parser(doc: str | None) -> ArgumentParser:
    """A script's parser with the options of the GPUs."""
    made = script_parser(doc)
    made.add_argument("--gpu", default="h100")
    made.add_argument("--gpus", type=int, default=8)
    return made


def add_models(parser: ArgumentParser, names: tuple[str, ...]) -> None:
    """Add the options of a study over several models."""
    parser.add_argument(
        "--configs", type=Path, required=True, help="folder of ORGANISATION--MODEL_config.json"
    )
    parser.add_argument("--models", nargs="*", default=names)


def model_named(name: str, configs: Path) -> ModelConfig:
    """The shape of a model by the end of its file's name; ValueError unless there is one such file."""
    found = sorted(configs.glob(f"*--{name}_config.json"))
    if len(found) != 1:
        raise ValueError(f"{configs} has {len(found)} files *--{name}_config.json, one is needed")
    return model_config_from_hf(json.loads(found[0].read_text()))


def simulated_gpus(options: Namespace) -> Device:
    """The GPUs of the options, which nobody had."""
    gpu = find_gpu(options.gpu)
    return Device(
        kind="simulated",
        name=gpu.name,
        count=options.gpus,
        memory_bytes=gpu.memory_bytes,
        detail=gpu.title,
    )


def simulated_series(subject: str, case: str, figures: Mapping[tuple[str, str], float]) -> list[Series]:
    """Series of one figure each, whose metrics say that they were simulated."""
    told = {(f"{metric}, simulated (roofline)", unit): [value] for (metric, unit), value in figures.items()}
    return series_by_metric(subject, case, told)
