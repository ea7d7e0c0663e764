"""The errors of the engine.

::

    ValueError                      what a caller asked for is wrong: value and limit in the message
    ├── ContextLengthError          a prompt, or a prompt and its answer, beyond the longest sequence
    └── RefusedRequestError         what the engine found wrong with a request after it had taken it
    AlbireoError                    what the engine, a model file or a device did
    ├── ModelError                  a model that cannot be loaded; also a ValueError
    │   ├── UnknownModelError       no such name, folder or file
    │   ├── UnknownArchitectureError   an architecture that is not in the registry; lists those that are
    │   └── WeightError             a shard or tensor that is missing, unused, broken or of a wrong shape
    ├── ConstraintError             a grammar that became too complex in the middle of an answer
    ├── CapacityError               a model or cache that does not fit the device
    ├── OverloadedError             too much work of a kind waits already; the caller may try again
    └── EngineDeadError             the engine thread stopped; the cause is chained
        └── EngineStartingError     the engine's process loads its model; requests are taken later
"""

from typing import NamedTuple


class AlbireoError(Exception):
    """Root of the errors that are not a caller's wrong value."""


class ContextLengthError(ValueError):
    """A prompt, or a prompt and the answer asked for, exceeds `limit`, the tokens that a sequence can hold.

    The message begins with the phrase by which clients of OpenAI's API recognise this error.
    """

    def __init__(self, limit: int, reason: str) -> None:
        super().__init__(f"This model's maximum context length is {limit} tokens. However, {reason}")
        self.limit = limit


class RefusedRequestError(ValueError):
    """The engine took a request and then found it wrong, for instance a constraint that does not compile."""


class ModelError(AlbireoError, ValueError):
    """A model cannot be loaded."""


class UnknownModelError(ModelError):
    """No built-in model, folder or file has the name."""


class UnknownArchitectureError(ModelError):
    """The architecture is not one of those in the registry."""


class WeightError(ModelError):
    """A weight file or tensor is missing, unused, broken, or of a wrong shape or dtype."""


class ConstraintError(AlbireoError):
    """A constraint cannot say what may come next; its request ends, the others go on."""


class CapacityError(AlbireoError, ValueError):
    """The weights or the smallest useful cache do not fit in a device's memory."""


class OverloadedError(AlbireoError):
    """Too much work of a kind waits already; the same request may be taken a little later."""


class EngineDeadError(AlbireoError):
    """The engine stopped after an error, which is chained; nothing more is served."""


class EngineStartingError(EngineDeadError):
    """The engine runs in another process, which is loading the model; requests are taken later."""


class Refusal(NamedTuple):
    """Why the engine gave up a request that it had taken, as plain data.

    With `is_overload` the same request may be taken a little later; otherwise the request is wrong.
    """

    message: str
    is_overload: bool = False

    def error(self) -> RefusedRequestError | OverloadedError:
        """The error to raise where the request's output is read."""
        return OverloadedError(self.message) if self.is_overload else RefusedRequestError(self.message)
