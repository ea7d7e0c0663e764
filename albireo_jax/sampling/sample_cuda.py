"""Rows drawn by CUDA kernels (`ops/cuda/sample_rows.cu`): the tokens of `at_once`, in few passes.

::

    logits ──▶ row_peaks ──▶ largest logits ──▶ weights, scores ──▶ draw_rows ──▶ tokens
                                               (operations of XLA)

The kernels compare floats and add integers, which is exact. Exponentials, logarithms and quotients are not:
XLA calculates these, by the expressions of every other route. A greedy row ends with its largest logit.
"""

from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from albireo_jax.core.plan import NOT_FINITE
from albireo_jax.ops.cuda.kernels import Entry, Kernel, Launch, LaunchFn
from albireo_jax.sampling.blocks import View
from albireo_jax.sampling.draw import resolve, scores
from albireo_jax.sampling.filters import SamplerParams, is_likely, selection_words, weights

_WARPS = 32
_LIST_TOKENS = 2944
"""Tokens that a block has room for in shared memory beside its histogram."""

DRAW_READS = MappingProxyType({"logits": 2, "weights": 1, "scores": 1})
"""How often `draw_rows` reads each of its large operands at most, unless some list has no room.

Weights are read for rows with top-p alone, and scores of the tokens that may win.
"""

_INF = np.float32(np.inf)


def sample_cuda(
    logits_RV: Float[Array, "R V"], params: SamplerParams, *, launch: LaunchFn
) -> Int32[Array, " R"]:
    """`sampling.sample.sample` by kernels that `launch` runs."""
    num_rows, vocab = logits_RV.shape
    grid = (num_rows, 1)
    ids_R = jax.ShapeDtypeStruct((num_rows,), jnp.int32)
    peaks_R = jax.ShapeDtypeStruct((num_rows,), jnp.float32)
    peaks = Launch(kernel=sampling_kernel(Entry.PEAKS, vocab), grid=grid, results=(peaks_R, ids_R))
    max_R, greedy_R = launch(peaks, [logits_RV])
    draw = Launch(kernel=sampling_kernel(Entry.DRAW, vocab), grid=grid, results=(ids_R,))
    return launch(draw, [logits_RV, *draw_operands(logits_RV, params, max_R), max_R, greedy_R])[0]


class DrawOperands(NamedTuple):
    """The weight and the score of each token, and the bits of temperature, top-k and top-p of each row.

    The score is minus infinity where a token is out by min-p.
    """

    weight_RV: Int32[Array, "R V"]
    score_RV: Float[Array, "R V"]
    ask_R3: Int32[Array, "R 3"]


def draw_operands(
    logits_RV: Float[Array, "R V"], params: SamplerParams, max_R: Float[Array, " R"]
) -> DrawOperands:
    """The numbers that `draw_rows` selects by; what it has of rows that do not draw means nothing."""
    rows = resolve(params, max_R=max_R, vocab=logits_RV.shape[1])
    view = View(logits_RV[:, None, :], jnp.zeros((logits_RV.shape[0], 1), jnp.int32))
    can_win_RJW = is_likely(view.logit_RJW, rows.filters) & (view.logit_RJW > -_INF)
    score_RJW = jnp.where(can_win_RJW, scores(view, rows), -_INF)
    weight_RJW = weights(view.logit_RJW, rows.filters)
    return DrawOperands(weight_RJW[:, 0], score_RJW[:, 0], selection_words(params))


def sampling_kernel(
    entry: Entry, vocab: int, *, warps: int = _WARPS, list_tokens: int = _LIST_TOKENS
) -> Kernel:
    """A kernel for rows of so many logits."""
    macros = {
        "COLUMNS": vocab,
        "WARPS": warps,
        "LIST": list_tokens,
        "NOT_FINITE": NOT_FINITE,
        "DRAW": int(entry is Entry.DRAW),
    }
    text = tuple((name, str(value)) for name, value in macros.items())
    return Kernel(entry=entry, macros=text, warps=warps)
