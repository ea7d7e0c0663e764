"""Counts that a scheduler keeps."""

from dataclasses import dataclass

from albireo_jax.sched.kv_pages import KvPageStats
from albireo_jax.sched.prefix_cache import CacheStats


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerStats:
    """Requests and pages now, and what happened since the start.

    `finishing` requests have their last step planned and only wait for its result. `nonfinite` requests
    ended with an error because their logits were not finite. `dropped` tokens were sampled in vain: their
    requests had ended or were preempted.
    """

    waiting: int
    running: int
    finishing: int
    steps: int
    preemptions: int
    nonfinite: int
    dropped: int
    tiers: KvPageStats
    cache: CacheStats

    @property
    def pages_in_use(self) -> int:
        """Pages of the device that requests own."""
        return self.tiers.in_use

    @property
    def num_pages(self) -> int:
        """Pages of the device."""
        return self.tiers.num_pages
