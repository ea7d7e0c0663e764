"""Token ids that end requests, each with the number of live requests that it ends."""

from collections.abc import Iterable

import numpy as np

from albireo_jax.core.plan import NOT_FINITE, Bools, Int32s


class StopIds:
    """The stop ids of all live requests; an id that none of them has is forgotten."""

    def __init__(self, vocab_size: int) -> None:
        self._counts: dict[int, int] = {}
        self._may_end = np.zeros(vocab_size + 1, np.bool_)
        self._may_end[NOT_FINITE] = True  # the last entry

    def add(self, stop_ids: Iterable[int]) -> None:
        """Count the stop ids of a request that was added."""
        for token_id in dict.fromkeys(stop_ids):
            self._counts[token_id] = self._counts.get(token_id, 0) + 1
            self._may_end[token_id] = True

    def remove(self, stop_ids: Iterable[int]) -> None:
        """Take off the stop ids of a request that ended."""
        for token_id in dict.fromkeys(stop_ids):
            self._counts[token_id] -= 1
            if not self._counts[token_id]:
                del self._counts[token_id]
                self._may_end[token_id] = False

    def may_end(self, ids: Int32s) -> Bools:
        """Whether each of the sampled `ids` ends any request, or is not finite."""
        return self._may_end[ids]

    def check_invariants(self, stop_ids: Iterable[Iterable[int]]) -> None:
        """Raise AssertionError unless the counts are those of live requests with these `stop_ids`."""
        expected = StopIds(len(self._may_end) - 1)
        for each in stop_ids:
            expected.add(each)
        assert self._counts == expected._counts, "stop ids are counted wrongly"
        assert (self._may_end == expected._may_end).all(), "stop ids are not those that are counted"
