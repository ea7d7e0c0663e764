"""Histograms count as Prometheus does: cumulatively, bounds included."""

from hypothesis import given
from hypothesis import strategies as st

from albireo_jax.core.types import FinishReason
from albireo_jax.engine.request_metrics import Histogram, RequestMetrics, Tally

BOUNDS = (0.1, 0.5, 2.0)


@given(st.lists(st.one_of(st.sampled_from(BOUNDS), st.floats(0, 10)), max_size=50))
def test_a_bucket_counts_the_values_at_or_below_its_bound(values: list[float]) -> None:
    histogram = Histogram(BOUNDS)
    for value in values:
        histogram.observe(value)
    snapshot = histogram.snapshot()
    assert snapshot.cumulative == tuple(sum(value <= bound for value in values) for bound in BOUNDS)
    assert snapshot.count == len(values)
    assert abs(snapshot.sum - sum(values)) < 1e-9


def test_a_snapshot_does_not_change_later() -> None:
    metrics = RequestMetrics()
    metrics.record(
        Tally(prompt_tokens=3, generated_tokens=1, first_token_s=[0.2], finished=[FinishReason.STOP])
    )
    before = metrics.snapshot()
    metrics.record(Tally(generated_tokens=1, inter_token_s=[0.1], finished=[FinishReason.STOP]))
    assert (before.prompt_tokens, before.generated_tokens, before.inter_token_s.count) == (3, 1, 0)
    assert before.finished[FinishReason.STOP] == 1
    after = metrics.snapshot()
    assert (after.generated_tokens, after.inter_token_s.count) == (2, 1)
    assert after.finished[FinishReason.STOP] == 2
