"""The parts of a run as one table, with the goals beside the measured values."""

from collections.abc import Sequence
from dataclasses import dataclass

from albireo_jax.measure.records import Series
from benchmarks.gpu_check.check_parts import GOALS, CheckPart, Goal, goal_of
from benchmarks.gpu_check.record_file import DONE, SKIPPED, Notes

NOTE = (
    "Shares of ceilings are of those measured in the same process. Random weights, but for golden tokens. "
    "Keys and values of decode and prefill steps are zeros. Profiled runs are slowed down by the profiler."
)
CPU_NOTE = "Run on a CPU with tiny models: shows that everything runs, says nothing of any speed."


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A measured figure of a part beside its goal; `met` is None where the goal is not for this device."""

    part: str
    figure: Series
    goal: Goal | None
    met: bool | None

    @property
    def fails(self) -> bool:
        """Whether something is wrong, not only slow."""
        return self.met is False and self.goal is not None and self.goal.everywhere


def verdicts(notes: Notes, *, on_cpu: bool, goals: Sequence[Goal] = GOALS) -> list[Verdict]:
    """Every figure of a part, in the order measured, medians judged by their goals."""
    found: list[Verdict] = []
    for figure in notes.series:
        goal = goal_of(notes.part, (figure.subject, figure.case, figure.metric), goals)
        judged = goal is not None and (goal.everywhere or not on_cpu)
        met = goal.is_met(figure.median) if goal is not None and judged else None
        found.append(Verdict(part=notes.part, figure=figure, goal=goal, met=met))
    return found


def is_good(notes: Sequence[Notes], *, on_cpu: bool) -> bool:
    """Whether every part ran to its end or had reason not to, and nothing that it found is wrong."""
    return all(
        one.status in (DONE, SKIPPED) and not any(each.fails for each in verdicts(one, on_cpu=on_cpu))
        for one in notes
    )


def table(parts: Sequence[CheckPart], notes: Sequence[Notes], *, on_cpu: bool) -> str:
    """The figures of each part that its list shows, the goals beside it, and how each part ended."""
    lines = [f"{'subject':<18}{'case':<46}{'metric':<36}{'measured':>11} {'unit':<9}{'goal':<9}"]
    for part, one in zip(parts, notes, strict=True):
        lines.append(f"--- {part.name}: {part.title}")
        lines += [_line(each) for each in verdicts(one, on_cpu=on_cpu) if each.figure.metric in part.shown]
        lines += [f"    left out: {reason}" for reason in one.left_out]
    lines.append("")
    lines += [_ending(part, one, on_cpu=on_cpu) for part, one in zip(parts, notes, strict=True)]
    return "\n".join(lines)


def _line(verdict: Verdict) -> str:
    figure, goal = verdict.figure, verdict.goal
    said = {True: "met", False: "MISSED", None: "not judged"}[verdict.met] if goal is not None else ""
    return (
        f"{figure.subject:<18}{figure.case:<46}{figure.metric:<36}{figure.median:>11.4g} {figure.unit:<9}"
        f"{goal.text if goal is not None else '':<9}{said}"
    ).rstrip()


def _ending(part: CheckPart, notes: Notes, *, on_cpu: bool) -> str:
    judged = [each.met for each in verdicts(notes, on_cpu=on_cpu) if each.met is not None]
    goals = f"{sum(judged)} of {len(judged)} goals met" if judged else ""
    left = f"{len(notes.left_out)} left out" if notes.left_out else ""
    words = ", ".join(word for word in (goals, left) if word)
    reason = f": {notes.reason}" if notes.reason else ""
    limit_s = notes.limit_s or part.limit_s
    return f"{part.name:<10}{notes.status:<12}{notes.seconds:6.1f} of {limit_s:4.0f} s  {words}{reason}"
