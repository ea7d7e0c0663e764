"""The parts of the GPU check in the order of their worth per second, their time limits, and the goals.

Needs Python's own library only: the list is read before anything else is known to be installed.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

TOTAL_S = 540.0
"""All parts together, with what lies between them, must end in less."""

TRANSFORMERS, LLAMA_CPP, VLLM = PEERS = ("transformers", "llama.cpp", "vllm")
"""Engines that ours is compared with, the quickest to start first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part that can be run alone; it begins nothing new after most of `limit_s`, and is ended then.

    `shown` are the metrics that the table has of it; the record has all.
    """

    name: str
    title: str
    limit_s: float
    shown: tuple[str, ...]

    @property
    def deadline_s(self) -> float:
        """Seconds after which nothing new is begun."""
        return 0.8 * self.limit_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What a metric should reach, in those subjects and cases that match.

    `everywhere`: right or wrong on any device, and missing it fails the check. The others are for GPUs, and
    missing one is only told.
    """

    part: str
    metric: str
    subject: str = ".*"
    case: str = ".*"
    at_least: float | None = None
    at_most: float | None = None
    everywhere: bool = False

    def covers(self, subject: str, case: str, metric: str) -> bool:
        """Whether it is about this figure of its part."""
        return (
            metric == self.metric
            and re.fullmatch(self.subject, subject) is not None
            and re.fullmatch(self.case, case) is not None
        )

    def is_met(self, value: float) -> bool:
        """Whether the value is within the bounds."""
        above = self.at_least is None or value >= self.at_least
        return above and (self.at_most is None or value <= self.at_most)

    @property
    def text(self) -> str:
        """The bounds as a table shows them."""
        bounds = ((">=", self.at_least), ("<=", self.at_most))
        return " ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)


PARTS = (
    Part(
        name="ceilings",
        title="bandwidth and matrix rate that this device reaches",
        limit_s=20,
        shown=("copy bandwidth", "matrix rate"),
    ),
    Part(
        name="numerics",
        title="attention, sampling and KV writes against float32 on the CPU",
        limit_s=50,
        shown=("largest error", "share of equal tokens", "time", "share of equal bytes"),
    ),
    Part(
        name="golden",
        title="golden tokens of real small models",
        limit_s=45,
        shown=("share of equal answers", "largest margin where answers part"),
    ),
    Part(
        name="decode",
        title="decode steps of real shapes against the byte roofline",
        limit_s=95,
        shown=("step", "share of byte roofline", "dispatch"),
    ),
    Part(
        name="prefill",
        title="prompts of real shapes against the measured matrix rate",
        limit_s=40,
        shown=("step", "share of matrix rate"),
    ),
    Part(
        name="trace",
        title="the Azure conversation trace end to end, depth 1 beside 2",
        limit_s=95,
        shown=(
            "output",
            "time to first token, median",
            "time per output token, median",
            "idle share",
            "idle share by kernels",
            "overlap gain",
            "energy per token",
        ),
    ),
    Part(
        name="peers",
        title="transformers' continuous batching, llama.cpp and vLLM on the same requests",
        limit_s=70,
        shown=("output", "ours over it"),
    ),
    Part(
        name="programs",
        title="the decode step as this device's compiler makes it",
        limit_s=15,
        shown=("weight copies", "pool copies", "command buffers", "launches outside of them"),
    ),
    Part(
        name="host",
        title="host time of a dispatch, and cold and warm starts",
        limit_s=30,
        shown=("call", "start", "programs compiled"),
    ),
    Part(
        name="swap",
        title="exposed time of KV copies, conversations in a third of their pages",
        limit_s=25,
        shown=("generated tokens", "copying per step", "exposed copying per step", "hidden share of copying"),
    ),
    Part(
        name="shards",
        title="tables for the planner, one device in the shape of a rank",
        limit_s=35,
        shown=("decode step", "mixed step"),
    ),
)

GOALS = (
    Goal(part="numerics", metric="largest error", at_most=0.03, everywhere=True),
    Goal(
        part="numerics",
        metric="share of equal tokens",
        case=".*greedy.*",
        at_least=1.0,
        everywhere=True,
    ),
    Goal(
        part="numerics",
        metric="share of equal tokens",
        case=".*drawn.*",
        at_least=0.95,
        everywhere=True,
    ),
    Goal(part="numerics", metric="share of equal bytes", at_least=0.999, everywhere=True),
    Goal(
        part="golden",
        metric="share of equal answers",
        case="float32, exact products",
        at_least=1.0,
        everywhere=True,
    ),
    Goal(
        part="golden",
        metric="largest margin where answers part",
        case="bfloat16",
        at_most=0.5,
        everywhere=True,
    ),
    Goal(
        part="decode",
        metric="share of byte roofline",
        subject=".*-8b",
        case="(1|4|16|64) rows, .*",
        at_least=0.85,
    ),
    Goal(part="decode", metric="dispatch", at_most=200.0),
    Goal(
        part="prefill",
        metric="share of matrix rate",
        subject=".*-8b",
        case="2048 tokens",
        at_least=0.6,
    ),
    Goal(part="trace", metric="idle share", subject=".*-8b", case="overlapped", at_most=0.02),
    Goal(part="trace", metric="idle share by kernels", subject=".*-8b", at_most=0.02),
    Goal(part="trace", metric="idle share", subject=".*-0.6b", case="overlapped", at_most=0.10),
    Goal(part="trace", metric="idle share by kernels", subject=".*-0.6b", at_most=0.10),
    Goal(part="trace", metric="overlap gain", at_least=1.0),
    Goal(part="peers", metric="ours over it", case="transformers.*", at_least=3.0),
    Goal(part="programs", metric="weight copies", at_most=0),
    Goal(part="programs", metric="pool copies", at_most=0),
    Goal(part="host", metric="programs compiled", case="warm start", at_most=0, everywhere=True),
)


def find_part(name: str) -> Part:
    """The part of this name; raises ValueError with the names there are."""
    known = {part.name: part for part in PARTS}
    if name not in known:
        raise ValueError(f"part {name!r} is not known; known are {', '.join(known)}")
    return known[name]


def chosen(only: str | None, *, stretch: float = 1.0) -> tuple[Part, ...]:
    """All parts, or those named in `only`, separated by commas, in the order of the list.

    Their limits are `stretch` times as long. Raises ValueError for an unknown name or a stretch that is not
    above 0.
    """
    if not stretch > 0:
        raise ValueError(f"stretch must be above 0, got {stretch}")
    names = [find_part(name.strip()).name for name in only.split(",")] if only is not None else None
    return tuple(
        replace(part, limit_s=stretch * part.limit_s) for part in PARTS if names is None or part.name in names
    )


def goal_of(part: str, figure: tuple[str, str, str], goals: Sequence[Goal] = GOALS) -> Goal | None:
    """The goal of a figure, given by its subject, case and metric; None if it has none."""
    return next((goal for goal in goals if goal.part == part and goal.covers(*figure)), None)
