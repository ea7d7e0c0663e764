"""The programs for rows with rules, and the packing of their inputs.

::

    admission of a slot with rules ──▶ admit ──┐
    masks of the step's plan ────────▶ mask ───┼──▶ rules ──▶ apply ──▶ logits ──▶ sample ──▶ ids
                                               │                                               │
                                               └───────────────◀── note ◀──────────────────────┘
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int32
from numpy.typing import NDArray

from albireo_jax.core.logit_rules import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, MAX_BIASED_TOKENS, LogitRules
from albireo_jax.core.plan import Int32s, SlotRules
from albireo_jax.nn.sharding import shardings
from albireo_jax.runtime.step import StepProgram
from albireo_jax.sampling.logits import MASK_BITS, Rules, apply_rules, note_tokens

MASKS = 8
"""Masks that are written at once."""

RULED_ADMISSIONS = 8
"""Slots with rules that one program admits at once."""

_HEAD = 6 + MAX_BAD_WORD_TOKENS
_BIASED_AT = _HEAD
_BIAS_AT = _BIASED_AT + MAX_BIASED_TOKENS
_BAD_WORDS_AT = _BIAS_AT + MAX_BIASED_TOKENS
_MASK_AT = _BAD_WORDS_AT + MAX_BAD_WORDS * MAX_BAD_WORD_TOKENS


class LogitRulesShape(NamedTuple):
    """Slots (the padding slot included), tokens of the padded vocabulary, longest sequence."""

    num_slots: int
    padded_vocab: int
    max_len: int

    @property
    def mask_words(self) -> int:
        """X: words of a mask over the vocabulary."""
        return -(-self.padded_vocab // MASK_BITS)

    @property
    def admission_words(self) -> int:
        """Words of the buffer that admits slots, for each of them."""
        return _MASK_AT + self.mask_words + self.max_len


def rules_specs(axis: str) -> Rules:
    """Partition of the rules: counts by vocabulary, the rest on every rank."""
    return Rules(PartitionSpec(None, axis), *([PartitionSpec()] * 6))  # type: ignore[arg-type]


def new_rules(shape: LogitRulesShape, mesh: Mesh, *, axis: str) -> Rules:
    """Rules of all slots that change nothing, made on the devices of `mesh`."""
    slots, words, length = shape.num_slots, shape.mask_words, MAX_BAD_WORD_TOKENS

    def neutral() -> Rules:
        return Rules(
            seen_Zv=jnp.zeros((slots, shape.padded_vocab), jnp.int32),
            mask_ZX=jnp.full((slots, words), -1, jnp.int32),
            biased_ZB=jnp.full((slots, MAX_BIASED_TOKENS), -1, jnp.int32),
            bias_ZB=jnp.zeros((slots, MAX_BIASED_TOKENS), jnp.float32),
            bad_word_ZHY=jnp.full((slots, MAX_BAD_WORDS, length), -1, jnp.int32),
            recent_ZY=jnp.full((slots, length), -1, jnp.int32),
            penalty_Z3=jnp.broadcast_to(jnp.asarray([1.0, 0.0, 0.0], jnp.float32), (slots, 3)),
        )

    return jax.jit(neutral, out_shardings=shardings(mesh, rules_specs(axis)))()


def pack_rules(slot: int, given: SlotRules, shape: LogitRulesShape) -> NDArray[np.int32]:
    """Fresh words with the rules of one slot."""
    words = np.zeros(shape.admission_words, np.int32)
    _write_slot(words, slot, given, packed_content(given.rules, shape))
    return words


def packed_content(rules: LogitRules, shape: LogitRulesShape) -> NDArray[np.int32]:
    """The first words of a slot, up to its tokens, as far as its rules alone say them."""
    words = np.full(_MASK_AT + shape.mask_words, -1, np.int32)
    words[_BIAS_AT:_BAD_WORDS_AT] = 0
    penalties = rules.repetition_penalty, rules.presence_penalty, rules.frequency_penalty
    words[3:6] = np.array(penalties, np.float32).view(np.int32)
    for index, (token_id, bias) in enumerate(rules.logit_bias):
        words[_BIASED_AT + index] = token_id
        words[_BIAS_AT + index] = np.float32(bias).view(np.int32)
    bad_words = words[_BAD_WORDS_AT:_MASK_AT].reshape(MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS)
    for row, word in zip(bad_words, rules.bad_words, strict=False):
        row[-len(word) :] = word
    if len(rules.allowed_token_ids):
        words[_MASK_AT:] = _mask(rules.allowed_token_ids, shape.mask_words)
    return words


class AdmissionPacker:
    """Packs the admissions of slots with rules, equal content once for slots that follow each other.

    The samples of a prompt, and the prompts of a call, have one `LogitRules` object.
    """

    def __init__(self, shape: LogitRulesShape) -> None:
        self._shape = shape
        self._rules: LogitRules | None = None
        self._content = np.zeros(0, np.int32)

    def pack(self, admitted: Sequence[tuple[int, SlotRules]]) -> NDArray[np.int32]:
        """A fresh array [RULED_ADMISSIONS, W] with the rules of up to so many slots."""
        words = np.zeros((RULED_ADMISSIONS, self._shape.admission_words), np.int32)
        words[len(admitted) :, 0] = self._shape.num_slots  # no slot: nothing is written for it
        for row, (slot, given) in zip(words, admitted, strict=False):
            if given.rules is not self._rules:
                self._rules, self._content = given.rules, packed_content(given.rules, self._shape)
            _write_slot(row, slot, given, self._content)
        return words


def _write_slot(words: Int32s, slot: int, given: SlotRules, content: Int32s) -> None:
    """Write the rules of one slot, whose packed content is given, and the tokens that it starts from."""
    answer = given.token_ids[given.prompt_len :][-MAX_BAD_WORD_TOKENS:]
    words[: len(content)] = content
    words[:3] = slot, given.prompt_len, len(given.token_ids)
    words[_HEAD - len(answer) : _HEAD] = answer
    words[len(content) : len(content) + len(given.token_ids)] = given.token_ids


def pack_masks(slots: Int32s, masks: Int32s, shape: LogitRulesShape) -> NDArray[np.int32]:
    """A fresh array [MASKS, 1 + X]: up to MASKS slots and their masks, and slots that are none."""
    words = np.zeros((MASKS, 1 + shape.mask_words), np.int32)
    words[:, 0] = shape.num_slots  # no slot: what is written there is dropped
    words[: len(slots), 0] = slots
    words[: len(slots), 1 : 1 + masks.shape[1]] = masks
    return words


def jit_admit_rules(program: StepProgram, shape: LogitRulesShape) -> jax.stages.Wrapped:
    """(rules, array of `AdmissionPacker.pack`) -> rules; donates the rules."""
    return _jit(program, partial(_admit, shape, program.axis), specs=(PartitionSpec(),))


def jit_masks(program: StepProgram) -> jax.stages.Wrapped:
    """(rules, array of `pack_masks`) -> rules; donates the rules."""

    def write(rules: Rules, word_CX: Int32[Array, "C X"]) -> Rules:
        return rules._replace(mask_ZX=rules.mask_ZX.at[word_CX[:, 0]].set(word_CX[:, 1:], mode="drop"))

    return _jit(program, write, specs=(PartitionSpec(),))


def jit_note(program: StepProgram) -> jax.stages.Wrapped:
    """(rules, slot_R, id_R) -> rules; a slot past the last one is no row's. Donates the rules."""

    def note(rules: Rules, slot_R: Int32[Array, " R"], id_R: Int32[Array, " R"]) -> Rules:
        return note_tokens(rules, slot_R, id_R, first=_first(rules, program.axis))

    return _jit(program, note, specs=(PartitionSpec(), PartitionSpec()))


def jit_apply(program: StepProgram) -> jax.stages.Wrapped:
    """(rules, slot_R, logits_RV) -> logits_RV, split over the vocabulary.

    The logits given stay, because log probabilities are theirs.
    """

    def change(rules: Rules, slot_R: Int32[Array, " R"], logits_Rv: Float[Array, "R v"]) -> Array:
        return apply_rules(logits_Rv, rules, slot_R, first=_first(rules, program.axis))

    split = PartitionSpec(None, program.axis)
    body = jax.shard_map(
        change,
        mesh=program.mesh,
        in_specs=(rules_specs(program.axis), PartitionSpec(), split),
        out_specs=split,
        check_vma=False,
    )
    return jax.jit(body)


def _jit(program: StepProgram, body: object, *, specs: Sequence[PartitionSpec]) -> jax.stages.Wrapped:
    own = rules_specs(program.axis)
    mapped = jax.shard_map(
        body,  # type: ignore[arg-type]
        mesh=program.mesh,
        in_specs=(own, *specs),
        out_specs=own,  # type: ignore[arg-type]
        check_vma=False,
    )
    return jax.jit(mapped, donate_argnums=(0,))


def _admit(shape: LogitRulesShape, axis: str, rules: Rules, word_CW: Int32[Array, "C W"]) -> Rules:
    slot_C, prompt_len_C, length_C = word_CW[:, 0], word_CW[:, 1], word_CW[:, 2]
    tokens_at = _MASK_AT + shape.mask_words
    seen = partial(_seen, like=rules.seen_Zv, axis=axis)
    bad_word_CHY = word_CW[:, _BAD_WORDS_AT:_MASK_AT].reshape(-1, MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS)
    written = Rules(
        seen_Zv=jax.vmap(seen)(word_CW[:, tokens_at:], prompt_len_C, length_C),
        mask_ZX=word_CW[:, _MASK_AT:tokens_at],
        biased_ZB=word_CW[:, _BIASED_AT:_BIAS_AT],
        bias_ZB=_floats(word_CW[:, _BIAS_AT:_BAD_WORDS_AT]),
        bad_word_ZHY=bad_word_CHY,
        recent_ZY=word_CW[:, 6:_HEAD],
        penalty_Z3=_floats(word_CW[:, 3:6]),
    )
    return Rules(*(old.at[slot_C].set(new, mode="drop") for old, new in zip(rules, written, strict=True)))


def _seen(
    token_M: Int32[Array, " M"],
    prompt_len: Int32[Array, ""],
    length: Int32[Array, ""],
    *,
    like: Int32[Array, "Z v"],
    axis: str,
) -> Int32[Array, " v"]:
    """Counts of the known tokens, as in `Rules.seen_Zv`."""
    count = like.shape[1]
    column_M = token_M - lax.axis_index(axis) * count
    position_M = jnp.arange(len(token_M))
    is_own_M = (column_M >= 0) & (column_M < count) & (position_M < length)
    column_M = jnp.where(is_own_M, column_M, count)
    in_prompt_M = position_M < prompt_len
    zeros_v = jnp.zeros(count, jnp.int32)
    answered_v = zeros_v.at[column_M].add(jnp.where(in_prompt_M, 0, 2), mode="drop")
    return answered_v | zeros_v.at[column_M].max(in_prompt_M.astype(jnp.int32), mode="drop")


def _first(rules: Rules, axis: str) -> Int32[Array, ""]:
    return lax.axis_index(axis) * rules.seen_Zv.shape[1]


def _floats(word_CX: Int32[Array, "C X"]) -> Float[Array, "C X"]:
    return lax.bitcast_convert_type(word_CX, jnp.float32)


def _mask(token_ids: Int32s, num_words: int) -> NDArray[np.int32]:
    bits = np.zeros(num_words * MASK_BITS, np.bool_)
    bits[token_ids] = True
    return np.packbits(bits, bitorder="little").view(np.int32)
