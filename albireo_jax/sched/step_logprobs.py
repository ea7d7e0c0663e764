"""Log probabilities: the tokens of a step to score, and the requests that the scores belong to.

A token that is sampled is scored in the step that samples it. A token of a prompt is scored by the step that
computes the token before it; the scores of a prompt are kept until all are there, and go out with the
first token of the answer. A request that was preempted has its prompt computed again, but only those of its
tokens scored whose scores were not committed.
"""

from collections.abc import Mapping

import numpy as np

from albireo_jax.core.plan import TOKEN_ON_DEVICE, Bools, Int32s, LogprobArrays, LogprobTargets, StepPlan
from albireo_jax.core.types import RequestLogprobs, RequestOutput
from albireo_jax.sched.sequence import Sequence


def scored_tokens(plan: StepPlan, wants_R: Bools, live: Mapping[str, Sequence]) -> LogprobTargets:
    """The tokens to score in a step whose rows `wants_R` are of requests that asked for it."""
    tokens: list[Int32s] = [np.zeros(0, np.int32)]
    next_ids: list[Int32s] = [np.zeros(0, np.int32)]
    first_R = np.cumsum(plan.counts) - plan.counts
    for row in np.flatnonzero(wants_R & (plan.token_ids[first_R] != TOKEN_ON_DEVICE)).tolist():
        sequence = live[plan.request_ids[row]]
        request = sequence.request
        if request.prompt_logprobs is not None:
            start, count = int(plan.starts[row]), int(plan.counts[row])
            begin = max(start, sequence.num_scored)
            end = max(begin, min(start + count, len(request.prompt_token_ids) - 1))
            tokens.append(np.arange(begin, end, dtype=np.int32) + np.int32(first_R[row] - start))
            next_ids.append(sequence.known_ids[begin + 1 : end + 1])
    rows = np.flatnonzero(wants_R & plan.samples).astype(np.int32)
    return LogprobTargets(rows=rows, tokens=np.concatenate(tokens), next_ids=np.concatenate(next_ids))


def take_scores(
    plan: StepPlan, scores: LogprobArrays, live: Mapping[str, Sequence]
) -> dict[str, RequestLogprobs]:
    """The scores of a step's outputs by request; those of prompts stay with their sequences till the last."""
    _keep_prompts(plan, scores, live)
    taken: dict[str, RequestLogprobs] = {}
    for at, row in enumerate(plan.scored.rows.tolist()):
        sequence = _waiting_for(plan, row, live)
        if sequence is not None:
            token = scores.part(at, at + 1)
            is_first = plan.starts[row] + plan.counts[row] == len(sequence.request.prompt_token_ids)
            taken[plan.request_ids[row]] = RequestLogprobs(
                token, sequence.give_prompt_scores() if is_first else None
            )
    return taken


def give_scores(outputs: list[RequestOutput], scores: Mapping[str, RequestLogprobs]) -> None:
    """Put the scores into those of a step's outputs that have a token."""
    for index, output in enumerate(outputs):
        if output.token_id is not None and output.request_id in scores:
            outputs[index] = output._replace(scores=scores[output.request_id])


def _keep_prompts(plan: StepPlan, scores: LogprobArrays, live: Mapping[str, Sequence]) -> None:
    row_of_token = np.searchsorted(np.cumsum(plan.counts), plan.scored.tokens, side="right")
    behind_rows = scores.part(len(plan.scored.rows), scores.count)
    for row in dict.fromkeys(row_of_token.tolist()):
        sequence = _waiting_for(plan, row, live)
        if sequence is not None:
            begin, end = np.searchsorted(row_of_token, (row, row + 1)).tolist()
            sequence.prompt_scores = (*sequence.prompt_scores, behind_rows.part(begin, end))
            sequence.num_scored += end - begin


def _waiting_for(plan: StepPlan, row: int, live: Mapping[str, Sequence]) -> Sequence | None:
    """The sequence of a row of the plan, if it still waits for the plan's result."""
    sequence = live.get(plan.request_ids[row])
    return sequence if sequence is not None and sequence.epoch == plan.epochs[row] else None
