"""The runs of the GPU check, their parts in the order of their worth, their time limits, and the goals.

Needs Python's own library only: the list is read before anything else is known to be installed.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

TRANSFORMERS, LLAMA_CPP, VLLM = PEERS = ("transformers", "llama.cpp", "vllm")
"""Engines that ours is compared with, the quickest to start first."""

_BEGIN_SHARE = 0.85


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckPart:
    """A part that can be run alone; it begins nothing new after most of `limit_s`, and is ended then.

    It is not begun with less than `least_s` left. `shown` are the metrics that the table has of it; the
    record has all.
    """

    name: str
    title: str
    limit_s: float
    least_s: float
    shown: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckRun:
    """Parts that one call runs one after the other, within `total_s` all told.

    The limits of all parts but the last fit together. The last one gets what the others left. A run that
    `is_carried_to` begins with what an earlier one handed on, where there was one.
    """

    name: str
    title: str
    total_s: float
    parts: tuple[CheckPart, ...]
    is_carried_to: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """A goal: the value that a metric should reach, in those subjects and cases that match.

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


def begin_until_s(limit_s: float) -> float:
    """Seconds after which a part with this limit begins nothing new."""
    return _BEGIN_SHARE * limit_s


RIGHT = CheckRun(
    name="right",
    title="whether this device computes the right numbers, and which form of the step is quickest on it",
    total_s=210,
    is_carried_to=False,
    parts=(
        CheckPart(
            name="device",
            title="the first launch of a kernel, bandwidth and matrix rate of this device",
            limit_s=20,
            least_s=8,
            shown=("first call", "copy bandwidth", "matrix rate"),
        ),
        CheckPart(
            name="golden",
            title="golden tokens of real small models",
            limit_s=40,
            least_s=10,
            shown=("share of equal answers", "largest margin where answers part"),
        ),
        CheckPart(
            name="attention",
            title="attention kernels against float32 on the CPU",
            limit_s=55,
            least_s=10,
            shown=("largest error",),
        ),
        CheckPart(
            name="sampling",
            title="sampling, KV writes, kernels of layers and whole steps against the CPU",
            limit_s=42,
            least_s=10,
            shown=("share of equal tokens", "time", "share of equal bytes", "largest error"),
        ),
        CheckPart(
            name="forms",
            title="forms of the step on two layers: compile, first call, step",
            limit_s=150,
            least_s=15,
            shown=("compile", "first call", "step", "largest difference", "weight copies", "pool copies"),
        ),
    ),
)

FAST = CheckRun(
    name="fast",
    title="how fast the engine is on this device, in the form of the step that was quickest",
    total_s=450,
    parts=(
        CheckPart(
            name="decode",
            title="decode steps of real shapes against the byte roofline",
            limit_s=125,
            least_s=30,
            shown=(
                "start",
                "programs compiled",
                "step",
                "share of byte roofline",
                "dispatch",
                "idle share by kernels",
                "memory beside the pool",
            ),
        ),
        CheckPart(
            name="prefill",
            title="prompts of real shapes against the measured matrix rate",
            limit_s=55,
            least_s=20,
            shown=("start", "programs compiled", "prompt", "share of matrix rate"),
        ),
        CheckPart(
            name="trace",
            title="the Azure conversation trace end to end, depth 1 beside 2",
            limit_s=75,
            least_s=25,
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
        CheckPart(
            name="start",
            title="a cold and a warm start with all sizes of steps",
            limit_s=165,
            least_s=20,
            shown=("start", "programs compiled"),
        ),
        CheckPart(
            name="peers",
            title="transformers' continuous batching, llama.cpp and vLLM on the same requests",
            limit_s=90,
            least_s=20,
            shown=("output", "ours over it"),
        ),
    ),
)

MORE = CheckRun(
    name="more",
    title="what else can be measured on one device, where time is not short",
    total_s=600,
    parts=(
        CheckPart(
            name="models",
            title="decode steps of other models, quantised weights and longer contexts",
            limit_s=300,
            least_s=30,
            shown=("step", "share of byte roofline", "dispatch"),
        ),
        CheckPart(
            name="swap",
            title="exposed time of KV copies, conversations in a third of their pages",
            limit_s=60,
            least_s=15,
            shown=(
                "generated tokens",
                "copying per step",
                "exposed copying per step",
                "hidden share of copying",
            ),
        ),
        CheckPart(
            name="shards",
            title="tables for the planner, one device in the shape of a rank",
            limit_s=240,
            least_s=20,
            shown=("decode step", "mixed step"),
        ),
    ),
)

RUNS = {run.name: run for run in (RIGHT, FAST, MORE)}
"""The runs by their names."""

_LARGE = ".*-8b"

GOALS = (
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
    Goal(part="attention", metric="largest error", at_most=0.03, everywhere=True),
    Goal(part="sampling", metric="share of equal tokens", case=".*greedy.*", at_least=1.0, everywhere=True),
    Goal(part="sampling", metric="share of equal tokens", case=".*drawn.*", at_least=0.95, everywhere=True),
    # Norms are sums in another order: of few numbers another one is the nearest in bfloat16.
    Goal(
        part="sampling", metric="share of equal bytes", case=r".*\bnorms\b.*", at_least=0.98, everywhere=True
    ),
    Goal(part="sampling", metric="share of equal bytes", at_least=0.999, everywhere=True),
    Goal(part="sampling", metric="largest error", at_most=0.1, everywhere=True),
    Goal(part="forms", metric="largest difference", at_most=0.05, everywhere=True),
    Goal(part="forms", metric="weight copies", at_most=0),
    Goal(part="forms", metric="pool copies", at_most=0),
    Goal(
        part="decode",
        metric="share of byte roofline",
        subject=_LARGE,
        case="(2|64) rows, 1024 context",
        at_least=0.85,
    ),
    Goal(part="decode", metric="dispatch", at_most=200.0),
    Goal(part="decode", metric="idle share by kernels", subject=_LARGE, at_most=0.02),
    Goal(part="prefill", metric="share of matrix rate", subject=_LARGE, case="2048 tokens", at_least=0.7),
    Goal(part="prefill", metric="share of matrix rate", subject=_LARGE, case="16384 tokens", at_least=0.6),
    Goal(part="trace", metric="idle share", subject=_LARGE, case="overlapped", at_most=0.02),
    Goal(part="trace", metric="idle share by kernels", subject=_LARGE, at_most=0.02),
    Goal(part="trace", metric="idle share", subject=".*-0.6b", case="overlapped", at_most=0.10),
    Goal(part="trace", metric="idle share by kernels", subject=".*-0.6b", at_most=0.10),
    Goal(part="trace", metric="overlap gain", at_least=1.0),
    Goal(part="start", metric="start", subject=_LARGE, case="cold start", at_most=120.0),
    Goal(part="start", metric="start", subject=_LARGE, case="warm start", at_most=20.0),
    Goal(part="start", metric="programs compiled", case="warm start", at_most=0, everywhere=True),
    Goal(part="peers", metric="ours over it", case="transformers.*", at_least=3.0),
    Goal(
        part="models", metric="share of byte roofline", subject=_LARGE, case="(16|64) rows, .*", at_least=0.85
    ),
)


def find_part(run: CheckRun, name: str) -> CheckPart:
    """The part of this name; raises ValueError with the names there are."""
    known = {part.name: part for part in run.parts}
    if name not in known:
        raise ValueError(f"part {name!r} is not known to {run.name!r}; known are {', '.join(known)}")
    return known[name]


def chosen(run: CheckRun, *, only: str | None = None, stretch: float = 1.0) -> CheckRun:
    """The run with all its parts, or with those named in `only`, separated by commas.

    Their order is that of the run. All limits are `stretch` times as long. Raises ValueError for an unknown
    name or a stretch that is not above 0.
    """
    if not stretch > 0:
        raise ValueError(f"stretch must be above 0, got {stretch}")
    names = [find_part(run, name.strip()).name for name in only.split(",")] if only is not None else None
    parts = tuple(
        replace(part, limit_s=stretch * part.limit_s)
        for part in run.parts
        if names is None or part.name in names
    )
    return replace(run, total_s=stretch * run.total_s, parts=parts)


def goal_of(part: str, figure: tuple[str, str, str], goals: Sequence[Goal] = GOALS) -> Goal | None:
    """The goal of a figure, given by its subject, case and metric; None if it has none."""
    return next((goal for goal in goals if goal.part == part and goal.covers(*figure)), None)
