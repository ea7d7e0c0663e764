"""What users saw of a run, by hand and against the simulator."""

import pytest

from albireo_jax.core.types import FinishReason, Request, RequestOutput
from albireo_jax.sim.outcome import RequestTimes, outcome
from albireo_jax.sim.workload import TimedOutput


def _request(name: str, arrived_s: float) -> Request:
    return Request(request_id=name, prompt_token_ids=(1,), max_tokens=3, arrived_s=arrived_s)


def _outputs(name: str, *moments_s: float) -> list[TimedOutput]:
    return [TimedOutput(moment_s, RequestOutput(name, 7, None)) for moment_s in moments_s]


def test_times_of_requests_whose_tokens_come_interleaved() -> None:
    requests = [_request("a", 0.0), _request("b", 1.0)]
    outputs = sorted(_outputs("a", 2.0, 3.0, 5.0) + _outputs("b", 4.0))
    outputs.append(TimedOutput(6.0, RequestOutput("b", None, FinishReason.STOP)))
    run = outcome(requests, outputs)
    assert run.requests == (
        RequestTimes(arrived_s=0.0, first_s=2.0, last_s=5.0, num_tokens=3),
        RequestTimes(arrived_s=1.0, first_s=4.0, last_s=4.0, num_tokens=1),
    )
    assert run.ttft_s == (2.0, 3.0)
    assert run.tpot_s == (1.5,)
    assert run.output_tokens_per_s == pytest.approx(4 / 6)


@pytest.mark.parametrize(
    ("ttft_s", "tpot_s", "share"), [(2.0, 1.5, 0.5), (3.0, 1.5, 1.0), (3.0, 1.4, 0.5), (1.9, 9.0, 0.0)]
)
def test_a_request_counts_if_both_targets_are_met(ttft_s: float, tpot_s: float, share: float) -> None:
    requests = [_request("a", 0.0), _request("b", 1.0)]
    run = outcome(requests, sorted(_outputs("a", 2.0, 3.0, 5.0) + _outputs("b", 4.0)))
    assert run.share_meeting(ttft_s=ttft_s, tpot_s=tpot_s) == share


def test_a_request_without_tokens_spoils_the_run() -> None:
    with pytest.raises(RuntimeError, match="1 of 2 requests got no token, b is the first"):
        outcome([_request("a", 0.0), _request("b", 0.0)], _outputs("a", 1.0))
