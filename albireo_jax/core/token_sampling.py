"""The parameters by which a token is chosen: one record, whose fields say all that other layers make of them.

To add a parameter is to add a field here, and its effect in `sampling.filters`. The request's body, the
command's flags, the model's defaults and the words that travel to the device are made from the fields.
"""

import operator
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from albireo_jax.core import checks

MAX_SEED = 2**63 - 1

MAX_TEMPERATURE = 100.0

LEAST_TEMPERATURE = 1e-5
"""A lower temperature is greedy: logits divided by it would leave the range of float32."""

_PARAMETER = "parameter"


class WordKind(Enum):
    """Form of a parameter on the device: the format of its 32-bit words, as `struct` writes them."""

    FLOAT = "f"
    INT = "i"
    INT64 = "II"
    """The high word and the low word."""

    @property
    def num_words(self) -> int:
        """32-bit words of a value."""
        return len(self.value)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParameter:
    """A field of `TokenSampling`.

    `check` gives a caller's value in Python's own type, or raises ValueError. `help` and `unset` are for a
    flag of the command line: the meaning of the value, and whose value holds if none is given. `is_filter`
    is set if the parameter can rule out tokens; its default then rules out none. `is_models` is set if a
    model may have a default of its own.
    """

    check: Callable[[object], Any]
    kind: WordKind
    help: str
    unset: str = "the model's"
    is_filter: bool = False
    is_models: bool = True


def _field(default: Any, **described: Any) -> Any:
    return field(default=default, metadata={_PARAMETER: SamplingParameter(**described)})


def _top_k(value: object) -> int:
    """-1 means the whole vocabulary, as 0 does."""
    given = checks.plain(value)
    return 0 if isinstance(given, int) and given == -1 else checks.integer("top_k", value, low=0)


def _seed(value: object) -> int | None:
    """-1 means none, as in other servers."""
    seed = None if value is None else checks.integer("seed", value, low=-1, high=MAX_SEED)
    return None if seed == -1 else seed


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSampling:
    """The choice of a request's tokens.

    temperature 0 is greedy, and so are temperatures below `LEAST_TEMPERATURE` and top_p 0; top_k 0 and -1
    mean the whole vocabulary; top_p 1 and min_p 0 filter nothing. A request without a seed, which -1 also
    says, gets one when it enters the engine, so that its tokens still do not depend on batch, depth or
    preemption. Raises ValueError naming the value and the limit.
    """

    temperature: float = _field(
        1.0,
        check=partial(checks.number, "temperature", low=0.0, high=MAX_TEMPERATURE),
        kind=WordKind.FLOAT,
        help="0 always takes the likeliest token.",
    )
    top_k: int = _field(
        0,
        check=_top_k,
        kind=WordKind.INT,
        help="Draw from the N likeliest tokens; 0: from all.",
        is_filter=True,
    )
    top_p: float = _field(
        1.0,
        check=partial(checks.number, "top_p", low=0.0, high=1.0),
        kind=WordKind.FLOAT,
        help="Draw from the likeliest tokens of this mass.",
        is_filter=True,
    )
    min_p: float = _field(
        0.0,
        check=partial(checks.number, "min_p", low=0.0, high=1.0),
        kind=WordKind.FLOAT,
        help="Leave out tokens X times less likely than the likeliest.",
        is_filter=True,
    )
    seed: int | None = _field(
        None,
        check=_seed,
        kind=WordKind.INT64,
        help="Draws the same answer again.",
        unset="random",
        is_models=False,
    )

    def __post_init__(self) -> None:
        """Refuse what no sampler can do."""
        for name, value in self.by_name().items():
            object.__setattr__(self, name, PARAMETERS[name].check(value))
        if self.temperature < LEAST_TEMPERATURE or self.top_p == 0:
            object.__setattr__(self, "temperature", 0.0)
            object.__setattr__(self, "top_p", self.top_p or 1.0)

    def by_name(self) -> dict[str, Any]:
        """The parameters by name, in the order of the fields."""
        return dict(zip(PARAMETERS, _values(self), strict=True))

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature == 0

    @property
    def is_filtered(self) -> bool:
        """Whether any parameter rules out tokens."""
        values = self.by_name()
        return any(values[name] != default for name, default in _NEUTRAL.items())

    def with_seed(self, seed: int) -> "TokenSampling":
        """The same choices, drawn by this seed."""
        return TokenSampling(**self.by_name() | {"seed": seed})

    def words(self) -> NDArray[np.int32]:
        """The parameters in the order of the fields, as `NUM_WORDS` words of 32 bits; for one with a seed."""
        numbers: list[float] = []
        for name, value in self.by_name().items():
            is_long = PARAMETERS[name].kind is WordKind.INT64
            numbers += (value >> 32, value & 0xFFFFFFFF) if is_long else (value,)
        return np.frombuffer(_WORDS.pack(*numbers), np.int32)


PARAMETERS: Mapping[str, SamplingParameter] = MappingProxyType(
    {each.name: each.metadata[_PARAMETER] for each in fields(TokenSampling)}
)
"""The parameters by name, in the order of their words."""

_NEUTRAL = {each.name: each.default for each in fields(TokenSampling) if PARAMETERS[each.name].is_filter}
_WORDS = struct.Struct("=" + "".join(parameter.kind.value for parameter in PARAMETERS.values()))
_values: Callable[[TokenSampling], tuple[Any, ...]] = operator.attrgetter(*PARAMETERS)

NUM_WORDS = _WORDS.size // 4
"""32-bit words of a `TokenSampling`."""

GREEDY = TokenSampling(temperature=0.0, seed=0)
"""Takes the likeliest token."""
