"""What a constrained request may say next, worked out as soon as its tokens are known.

The mask of a request is made when its last token is committed, not when its next step is planned:
that is when it becomes known that nothing can follow, and the output of that very token says so. Between
the plan of a step in which the request samples and its commit there is no mask, and the request is *held*:
it is in no plan. It keeps its slot and pages; the rows beside it are planned as if it were not there::

    depth 2             step 1    step 2    step 3    step 4
      constrained row   token 1   held      token 2   held
      any other row     token 1   token 2   token 3   token 4
"""

import logging
from typing import NamedTuple

import numpy as np

from albireo_jax.core.errors import ConstraintError
from albireo_jax.core.plan import Int32s, TokenConstraint
from albireo_jax.core.types import FinishReason, Request

_logger = logging.getLogger(__name__)


class Masks(NamedTuple):
    """Rows of a step that may not sample any token: `words` is [len(slots), ceil(vocab / 32)]."""

    slots: Int32s
    words: Int32s


NO_MASKS = Masks(np.zeros(0, np.int32), np.zeros((0, 0), np.int32))


class ConstrainedAnswer:
    """A request's constraint together with the mask that it gives for the next token.

    Below `min_tokens` the request's stop ids are taken out of the mask, as the device would refuse them. If
    nothing is left, the answer is complete and ends, shorter than it was asked to be.
    """

    def __init__(self, request: Request, constraint: TokenConstraint) -> None:
        self._request_id = request.request_id
        self._constraint = constraint
        self._banned_until = len(request.prompt_token_ids) + request.min_tokens
        self._stop_ids = np.array(request.stop_ids, np.int32)
        self._mask = np.zeros(0, np.int32)

    @property
    def mask(self) -> Int32s:
        """Which tokens may come next, as in `TokenConstraint.mask`."""
        return self._mask

    def look(self, position: int) -> FinishReason | None:
        """Make the mask for the token at `position`; the reason if the request ends instead."""
        try:
            mask = self._constraint.mask()
        except BaseException as error:  # noqa: BLE001 - a panic of the grammar library too
            return self._fail(error)
        if position < self._banned_until:
            np.bitwise_and.at(mask, self._stop_ids // 32, ~_bits(self._stop_ids))
        self._mask = mask
        return None if mask.any() else FinishReason.STOP

    def check(self, token_id: int) -> None:
        """Assert that the mask allows `token_id`."""
        allowed = int(self._mask[token_id // 32]) >> token_id % 32 & 1
        assert allowed, f"request {self._request_id}: token {token_id} was sampled and is not allowed"

    def advance(self, token_id: int, *, position: int) -> FinishReason | None:
        """Take in a token that does not end the request, and `look` at what may follow at `position`."""
        try:
            self._constraint.advance(token_id)
        except BaseException as error:  # noqa: BLE001 - a panic of the grammar library too
            return self._fail(error)
        return self.look(position)

    def _fail(self, error: BaseException) -> FinishReason:
        """End this request alone, whatever its constraint raised: a panic of an extension module as well.

        Raises `error` again if it asks the process to end.
        """
        if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
            raise error
        expected = isinstance(error, ConstraintError)
        _logger.warning("request %s ends: %s", self._request_id, error, exc_info=None if expected else error)
        return FinishReason.ERROR


def _bits(token_ids: Int32s) -> Int32s:
    """The one bit of each token in its word."""
    return np.left_shift(np.uint32(1), (token_ids % 32).astype(np.uint32)).view(np.int32)
