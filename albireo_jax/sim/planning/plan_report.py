"""A plan in words, as numbers, and as the configuration that an engine is started with."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from albireo_jax.sim.planning.plan_sizes import Question
from albireo_jax.sim.planning.planner import Plan, Served
from albireo_jax.sim.replica import SimulatedRun, Targets


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One degree of the table; None where it serves nothing. Rates are of all replicas.

    `label` says what the figures are. `bound` says what keeps it from serving more, or why it is not tried.
    """

    tp: int
    replicas: int | None
    tokens_held: int | None
    max_rows: int | None
    max_step_tokens: int | None
    requests_per_s: float | None
    output_tokens_per_s: float | None
    ttft_s: float | None
    tpot_s: float | None
    busy_share: float | None
    exposed_host_s: float | None
    extrapolated_share: float | None
    bound: str
    label: str


def rows(answer: Plan) -> tuple[Row, ...]:
    """All degrees that divide the model, smallest first; latencies are those that enough requests meet."""
    found = [
        *(_served(answer, each) for each in answer.served),
        *(
            _none(
                each.degree.tp,
                f"misses the targets at any rate: alone {_ms(each.alone.ttft_s)} to the first token and "
                f"{_ms(each.alone.tpot_s)} a token",
                answer,
                replicas=each.degree.replicas,
                tokens_held=each.degree.memory.num_pages * answer.question.page_size,
            )
            for each in answer.unserved
        ),
        *(_none(each.tp, each.reason, answer) for each in answer.degrees.excluded),
    ]
    return tuple(sorted(found, key=lambda row: row.tp))


def verdict(run: SimulatedRun, targets: Targets, *, max_rows: int) -> str:
    """The resource that was short in a run that did not serve well, and by how much."""
    pressure = run.pressure
    late = [request for request in run.outcome.requests if request.ttft_s > targets.ttft_s]
    slow = [request for request in run.outcome.requests if (request.tpot_s or 0.0) > targets.tpot_s]
    count = len(run.outcome.requests)
    met = run.outcome.share_meeting(ttft_s=targets.ttft_s, tpot_s=targets.tpot_s)
    pages = pressure.peak_pages / pressure.num_pages
    if met >= targets.attainment:
        cause = "throughput, the rate at which requests that all wait are served"
    elif pressure.preemptions or (pages > 0.95 and pressure.peak_waiting):
        cause = "KV memory"
    elif pressure.peak_running >= max_rows and len(late) > len(slow):
        cause = "rows"
    elif len(slow) > len(late):
        cause = "time per token"
    else:
        cause = "time to first token"
    return (
        f"{cause}: {len(late) / count:.0%} miss the first token's target and {len(slow) / count:.0%} the "
        f"others', {pages:.0%} of the pages, {pressure.preemptions} preemptions, {pressure.peak_waiting} "
        f"waiting at most, device busy {run.busy_share:.0%}"
    )


def lines(answer: Plan) -> list[str]:
    """The plan, the runner-up, and everything that was assumed."""
    question, best = answer.question, answer.best
    targets, label = question.targets, answer.steps.label
    asked = (
        f"{question.name} on {question.num_gpus} x {question.gpu.title}: {targets.attainment:.0%} of the "
        f"requests within {_ms(targets.ttft_s)} to the first token and {_ms(targets.tpot_s)} a token"
    )
    plan = (
        f"best plan, {label}: t={best.degree.tp}, {_replicas(best)}, {best.config.max_rows} "
        f"rows, {best.config.max_step_tokens} step tokens: {_rate(best.rate_per_s)} requests/s, "
        f"{output_tokens_per_s(best):,.0f} output tokens/s"
    )
    rule = f"Albireo's rule of thumb, 4 M / C: t={question.rule_of_thumb}; this plan: t={best.degree.tp}"
    bounds = (
        f"t={row.tp}, {row.label}, is bound by {row.bound}" for row in rows(answer) if row.requests_per_s
    )
    misses = (f"t={row.tp}, {row.label}: {row.bound}" for row in rows(answer) if not row.requests_per_s)
    told = (asked, plan, _runner_up(answer), rule, *bounds, *misses)
    return [*told, *(f"assumed: {each}" for each in assumptions(answer))]


def assumptions(answer: Plan) -> tuple[str, ...]:
    """The assumptions behind the figures, and the part of the trace that was used."""
    question, workload = answer.question, answer.workload
    refused = (
        f"; {workload.num_too_long} requests longer than the model's context of "
        f"{question.model.max_position} tokens are left out, as a server refuses them"
        if workload.num_too_long
        else ""
    )
    empty = f"; {workload.num_empty} without prompt or answer too" if workload.num_empty else ""
    extrapolated = [
        f"t={each.degree.tp}: {each.run.extrapolated_share:.0%} of the steps are outside of what was measured"
        for each in answer.served
        if each.run.extrapolated_share
    ]
    return (
        *answer.steps.sources,
        f"load: one replica gets {min(question.requests_per_replica, len(workload.arrivals))} of the "
        f"{len(workload.arrivals)} requests of the trace, evenly picked from its beginning and the same at "
        f"every t, the times between arrivals stretched to the rate; the others fare as it{refused}{empty}",
        "answers have the trace's lengths; every request samples with top-p; no prefix is shared"
        if not workload.shares_prefixes
        else "answers have the trace's lengths; every request samples with top-p; prefixes are shared",
        f"memory: {question.memory_share:.0%} of {question.gpu.memory_bytes / 1e9:.0f} GB for weights "
        f"({_weights(question)}) and pages",
        f"depth {question.depth}, {question.sampling.value} sampling; goodput is at most the rate "
        f"at which requests that all wait are served",
        *extrapolated,
    )


def as_json(answer: Plan) -> dict[str, Any]:
    """The plan for machines: the same figures and words, seconds and counts."""
    question = answer.question
    return {
        "label": answer.steps.label,
        "model": question.name,
        "gpus": question.num_gpus,
        "gpu": question.gpu.name,
        "targets": {
            "ttft_s": question.targets.ttft_s,
            "tpot_s": question.targets.tpot_s,
            "attainment": question.targets.attainment,
        },
        "depth": question.depth,
        "sampling": question.sampling.value,
        "quantization": question.model.quantization,
        "best": asdict(_served(answer, answer.best)),
        "runner_up": None if answer.runner_up is None else asdict(_served(answer, answer.runner_up)),
        "why_runner_up_lost": _runner_up(answer),
        "rule_of_thumb_tp": question.rule_of_thumb,
        "degrees": [asdict(row) for row in rows(answer)],
        "assumptions": list(assumptions(answer)),
    }


def config_yaml(answer: Plan) -> str:
    """The best plan as a file for `albireo serve MODEL --config FILE`; every replica takes the same."""
    question, best = answer.question, answer.best
    remarks = (
        f"{question.name} on {question.num_gpus} x {question.gpu.title}: {best.degree.replicas} of these",
        f"{answer.steps.label}: {_rate(best.rate_per_s)} requests/s over all replicas, "
        f"{_ms(question.targets.ttft_s)} to the first token and {_ms(question.targets.tpot_s)} a token",
        f"planned with {best.degree.memory.num_pages} pages; an engine takes what its memory holds",
    )
    flags = {
        "tp": best.degree.tp,
        "dtype": question.dtype.value,
        "max-rows": best.config.max_rows,
        "max-step-tokens": best.config.max_step_tokens,
        "page-size": question.page_size,
        "kv-cache-dtype": question.kv_dtype.value,
        "depth": best.config.depth,
        "sampling": question.sampling.value,
    }
    if question.model.quantization is not None:
        flags["quantization"] = question.model.quantization.value
    text = [*(f"# {remark}" for remark in remarks), *(f"{name}: {value}" for name, value in flags.items())]
    return "\n".join(text) + "\n"


def output_tokens_per_s(served: Served) -> float:
    """Tokens that all replicas generate a second at the plan's goodput."""
    return served.degree.replicas * served.run.outcome.output_tokens_per_s


def _weights(question: Question) -> str:
    """The format in which weights are stored."""
    kind, dtype = question.model.quantization, question.dtype.value
    return dtype if kind is None else f"{kind.value} matrices, the rest {dtype}"


def _runner_up(answer: Plan) -> str:
    best, other, beyond = answer.best, answer.runner_up, answer.runner_up_beyond
    if other is None or beyond is None:
        return f"no runner-up: only t={best.degree.tp} meets the targets at all"
    lost = verdict(beyond, answer.question.targets, max_rows=other.config.max_rows)
    return (
        f"runner-up, {answer.steps.label}: t={other.degree.tp}, {_replicas(other)}, "
        f"{_rate(other.rate_per_s)} requests/s, {other.rate_per_s / best.rate_per_s - 1:+.0%}; at more it is "
        f"short of {lost}"
    )


def _served(answer: Plan, served: Served) -> Row:
    outcome, share = served.run.outcome, answer.question.targets.attainment
    tasks = served.run.tasks
    return Row(
        tp=served.degree.tp,
        replicas=served.degree.replicas,
        tokens_held=served.degree.memory.num_pages * answer.question.page_size,
        max_rows=served.config.max_rows,
        max_step_tokens=served.config.max_step_tokens,
        requests_per_s=served.rate_per_s,
        output_tokens_per_s=output_tokens_per_s(served),
        ttft_s=_met_by(outcome.ttft_s, share),
        tpot_s=_met_by(outcome.tpot_s, share),
        busy_share=served.run.busy_share,
        exposed_host_s=tasks.exposed_s / max(tasks.steps, 1),
        extrapolated_share=served.run.extrapolated_share,
        bound=verdict(served.beyond, answer.question.targets, max_rows=served.config.max_rows),
        label=answer.steps.label,
    )


def _none(
    tp: int, reason: str, answer: Plan, *, replicas: int | None = None, tokens_held: int | None = None
) -> Row:
    return Row(
        tp=tp,
        replicas=replicas,
        tokens_held=tokens_held,
        max_rows=None,
        max_step_tokens=None,
        requests_per_s=None,
        output_tokens_per_s=None,
        ttft_s=None,
        tpot_s=None,
        busy_share=None,
        exposed_host_s=None,
        extrapolated_share=None,
        bound=reason,
        label=answer.steps.label,
    )


def _met_by(values: Sequence[float], share: float) -> float:
    return sorted(values)[math.ceil(share * len(values)) - 1] if values else 0.0


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.4g} ms"


def _rate(per_s: float) -> str:
    return f"{per_s:,.0f}" if per_s >= 100 else f"{per_s:.3g}"


def _replicas(served: Served) -> str:
    count = served.degree.replicas
    return f"{count} replica" if count == 1 else f"{count} replicas"
