"""Masks of a constrained request's next tokens, begun as soon as its last token is known.

The mask of a request is made when its last token is committed, not when its next step is planned. So it is
known at once if nothing can follow, and the output of that very token says so. Between
the plan of a step in which the request samples and its commit there is no mask, and the request is *held*:
it is in no plan. It keeps its slot and pages; the rows beside it are planned as if it were not there::

    depth 2             step 1    step 2    step 3    step 4
      constrained row   token 1   held      token 2   held
      any other row     token 1   token 2   token 3   token 4

Who makes the masks is said by a `MaskMaker`. One that works aside may be late: the row is held until its mask
is there, and the others go on. An end that is found late goes out as an output without a token.
"""

import logging
from collections.abc import Sequence
from typing import NamedTuple, Protocol

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

    A token is noted by `take`, taken in by `make`, which any thread may call, and used from `settle` on. No
    other method is called between the first and the last of these.
    """

    def __init__(self, request: Request, constraint: TokenConstraint) -> None:
        self._request_id = request.request_id
        self._constraint = constraint
        self._banned_until = len(request.prompt_token_ids) + request.min_tokens
        self._stop_ids = np.array(request.stop_ids, np.int32)
        self._mask = np.zeros(0, np.int32)
        self._token_id: int | None = None  # to take in
        self._position = len(request.prompt_token_ids)  # of the next token
        self._made: Int32s | BaseException | None = None
        self._is_pending = True
        self._is_dropped = False

    @property
    def request_id(self) -> str:
        """The request whose answer it is."""
        return self._request_id

    @property
    def mask(self) -> Int32s:
        """The mask of the tokens that may come next, as in `TokenConstraint.mask`."""
        return self._mask

    @property
    def is_made(self) -> bool:
        """Whether `make` has done its work since the last token was noted."""
        return self._made is not None

    @property
    def is_pending(self) -> bool:
        """Whether the mask behind the last token is not settled yet: `mask` is an earlier one."""
        return self._is_pending

    def update_mask(self, position: int) -> FinishReason | None:
        """Make the mask for the token at `position` here and now; the reason if the request ends instead."""
        self._position = position
        self.make()
        return self.settle()

    def check(self, token_id: int) -> None:
        """Assert that the mask allows `token_id`."""
        allowed = int(self._mask[token_id // 32]) >> token_id % 32 & 1
        assert allowed, f"request {self._request_id}: token {token_id} was sampled and is not allowed"

    def take(self, token_id: int, *, position: int) -> None:
        """Note a token that does not end the request, and that the next one is at `position`."""
        self._token_id, self._position, self._made, self._is_pending = token_id, position, None, True

    def make(self) -> None:
        """Take in the token and make the mask behind it; raises nothing."""
        if self._is_dropped:
            return
        try:
            if self._token_id is not None:
                self._constraint.advance(self._token_id)
            mask = self._constraint.mask()
        except BaseException as error:  # noqa: BLE001 - a panic of the grammar library too
            self._made = error
            return
        if self._position < self._banned_until:
            np.bitwise_and.at(mask, self._stop_ids // 32, ~_bits(self._stop_ids))
        self._made = mask

    def settle(self) -> FinishReason | None:
        """Use the mask that was made for the next token; the reason if the request ends instead."""
        made = self._made
        assert made is not None, f"request {self._request_id}: its mask is not made yet"
        self._is_pending = False
        if isinstance(made, BaseException):
            return self._fail(made)
        self._mask = made
        return None if made.any() else FinishReason.STOP

    def drop(self) -> None:
        """Note that the answer has ended: a mask that is not made yet is not needed."""
        self._is_dropped = True

    def _fail(self, error: BaseException) -> FinishReason:
        """End this request alone, whatever its constraint raised: a panic of an extension module as well.

        Raises `error` again if it asks the process to end.
        """
        if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
            raise error
        expected = isinstance(error, ConstraintError)
        _logger.warning("request %s ends: %s", self._request_id, error, exc_info=None if expected else error)
        return FinishReason.ERROR


class MaskMaker(Protocol):
    """Has the masks of constrained rows made. Tokens do not depend on when that happens."""

    def make(self, answers: Sequence[ConstrainedAnswer]) -> None:
        """Have the `make` of each called once, by any thread; may return before all of it is done."""
        ...

    def wait(self, answers: Sequence[ConstrainedAnswer], timeout_s: float) -> None:
        """Return when one of `answers`, which were given before, is made, or at the end of the time."""
        ...


class InlineMaskMaker:
    """Makes all masks on the thread that asks for them: the same plans in every run."""

    def make(self, answers: Sequence[ConstrainedAnswer]) -> None:
        """Make the masks of all `answers`."""
        for answer in answers:
            answer.make()

    def wait(self, answers: Sequence[ConstrainedAnswer], timeout_s: float) -> None:
        """Return at once: no mask is late."""


def _bits(token_ids: Int32s) -> Int32s:
    """The one bit of each token in its word."""
    return np.left_shift(np.uint32(1), (token_ids % 32).astype(np.uint32)).view(np.int32)
