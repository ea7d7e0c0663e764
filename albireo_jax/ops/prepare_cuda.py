"""A step's rows as the CUDA kernels of its layers read them, made by one kernel (`ops/cuda/prepare_step.cu`).

Axes besides the usual: X pieces of the attention kernels' work, F fields, W words.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32
from numpy.typing import NDArray

from albireo_jax.ops.cuda.kernels import Entry, Kernel, Launch, LaunchFn

_WARPS = 16
_TILE_WORDS, _PIECE_WORDS, _CUT_WORDS = 8, 8, 10
_MOST_QUERIES = 2**31 - 1


class Cut(NamedTuple):
    """A cut of the attention of rows with `fewest` to `most` queries; `group` query heads share keys.

    At most `num_tiles` tiles of `queries` queries come out, and fewer than `num_tiles` + `num_pieces` pieces,
    which take at most `num_slots` slots from `first_slot` on, one per query and head of its group.
    """

    queries: int
    group: int
    block_tokens: int
    num_tiles: int
    num_pieces: int
    first_slot: int
    window: int | None
    fewest: int = 1
    most: int = _MOST_QUERIES

    @property
    def num_slots(self) -> int:
        """The most slots that it takes: a tile of x > 1 lengths is cut into fewer than 2 x pieces."""
        return 2 * self.num_pieces * self.queries * self.group

    @property
    def most_pieces(self) -> int:
        """Length of the list of pieces; one at least is unused."""
        return self.num_tiles + self.num_pieces

    def words(self, *, clears_padding: bool) -> list[int]:
        """The fields as the kernel reads them."""
        return [
            *(self.fewest, self.most, self.queries, self.group, self.block_tokens),
            *(self.num_tiles, self.num_pieces, self.first_slot, self.window or 0, int(clears_padding)),
        ]


class PackedRows(NamedTuple):
    """A step's rows as they come to the device.

    `words_W` are the input ids of T tokens, then of R rows the slots in the page table, the positions of
    their first queries, and the numbers of their queries. An id of -1 stands for the slot's last token.
    """

    words_W: Int32[Array, " W"]
    page_table_ZM: Int32[Array, "Z M"]
    last_token_Z: Int32[Array, " Z"]
    num_tokens: int
    num_rows: int


class AttentionWork(NamedTuple):
    """The pieces of one cut, and of each head how many of a tile's pieces are done: none yet.

    `piece_XF`: slot of the page table, first token, number of queries, position of the first one, first and
    last (exclusive) cached token, first slot or -1, and which piece of its tile it is times 65,536 plus how
    many these are. Pieces that see no tokens are unused; their queries are padding, whose results are zeros.
    """

    piece_XF: Int32[Array, "X F"]
    arrived_XN: Int32[Array, "X N"]


class PreparedStep(NamedTuple):
    """Tokens and work of a step; padding tokens have position 0 and the null page.

    `place_T` is page * page_size + offset of each token, `last_R` the last token of each row.
    """

    token_T: Int32[Array, " T"]
    position_T: Int32[Array, " T"]
    place_T: Int32[Array, " T"]
    last_R: Int32[Array, " R"]
    works: tuple[AttentionWork, ...]


def prepare_step(
    rows: PackedRows, cuts: list[Cut], *, page_size: int, heads: int, launch: LaunchFn
) -> PreparedStep:
    """One or two lists of work for the attention kernels, and what else a step's layers need of its rows.

    `heads` are the key/value heads of this rank. The last cut's unused pieces share out the padding tokens.
    """
    num_tokens, num_rows = rows.num_tokens, rows.num_rows
    tiles = max(how.num_tiles for how in cuts)
    scratch_words = -(-2 * num_rows // 4) * 4 + tiles * _TILE_WORDS

    def ints(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    lists = [how.most_pieces for how in cuts] + [1] * (2 - len(cuts))
    what = Launch(
        kernel=Kernel(entry=Entry.PREPARE, macros=(("WARPS", str(_WARPS)),), warps=_WARPS),
        grid=(1, 1),
        results=(
            *(ints(num_tokens), ints(num_tokens), ints(num_tokens), ints(num_rows), ints(scratch_words)),
            *(each for length in lists for each in (ints(length, _PIECE_WORDS), ints(length, heads))),
        ),
    )
    sizes = np.array([num_tokens, num_rows, rows.page_table_ZM.shape[1], page_size, heads], np.int32)
    operands = [rows.words_W, rows.page_table_ZM, rows.last_token_Z, *map(jnp.asarray, (sizes, _words(cuts)))]
    token_T, position_T, place_T, last_R, _, *made = launch(what, operands)
    works = tuple(AttentionWork(made[2 * nth], made[2 * nth + 1]) for nth in range(len(cuts)))
    return PreparedStep(token_T, position_T, place_T, last_R, works)


def _words(cuts: list[Cut]) -> NDArray[np.int32]:
    words = np.zeros((2, _CUT_WORDS), np.int32)
    for nth, how in enumerate(cuts):
        words[nth] = how.words(clears_padding=nth == len(cuts) - 1)
    return words
