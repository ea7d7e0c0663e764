"""Rules and bans against a plain loop in NumPy, whole and split over ranks."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from albireo_jax.sampling.logits import Bans, Rules, apply_rules, ban, note_tokens, unpack_mask

SLOTS, VOCAB, WORDS = 5, 150, 5
INF = np.inf


def made(seed):
    """Rules of every kind in all slots but the last, which changes nothing."""
    draw = np.random.default_rng(seed)
    rules = Rules(
        seen_Zv=draw.choice([0, 0, 0, 1, 2, 5], size=(SLOTS, VOCAB)).astype(np.int32),
        mask_ZX=draw.integers(-(2**31), 2**31, size=(SLOTS, WORDS)).astype(np.int32),
        biased_ZB=np.full((SLOTS, 6), -1, np.int32),
        bias_ZB=draw.normal(size=(SLOTS, 6)).astype(np.float32),
        bad_word_ZHY=np.full((SLOTS, 3, 4), -1, np.int32),
        recent_ZY=draw.integers(0, 3, size=(SLOTS, 4)).astype(np.int32),
        penalty_Z3=draw.uniform(0.5, 1.5, size=(SLOTS, 3)).astype(np.float32),
    )
    rules.recent_ZY[0, :3] = -1
    for slot in range(SLOTS - 1):
        rules.biased_ZB[slot, :4] = draw.choice(VOCAB, size=4, replace=False)
        for row, length in zip(rules.bad_word_ZHY[slot], (1, 2, 4), strict=True):
            row[-length:] = draw.integers(0, 3, size=length)
    rules.seen_Zv[-1], rules.mask_ZX[-1], rules.penalty_Z3[-1] = 0, -1, (1, 0, 0)
    return rules


def oracle(logits, rules, slot):
    """One row, token by token."""
    out = logits.astype(np.float32).copy()
    for token in range(VOCAB):
        if not int(rules.mask_ZX[slot, token // 32]) >> token % 32 & 1:
            out[token] = -INF
    recent = rules.recent_ZY[slot].tolist()
    for row in rules.bad_word_ZHY[slot].tolist():
        word = [token for token in row if token >= 0]
        if word and (len(word) == 1 or recent[-(len(word) - 1) :] == word[:-1]):
            out[word[-1]] = -INF
    for token, bias in zip(rules.biased_ZB[slot], rules.bias_ZB[slot], strict=True):
        if token >= 0:
            out[token] += bias
    repetition, presence, frequency = rules.penalty_Z3[slot]
    for token in range(VOCAB):
        seen = rules.seen_Zv[slot, token]
        if seen:
            out[token] = out[token] / repetition if out[token] > 0 else out[token] * repetition
        out[token] -= frequency * np.float32(seen >> 1)
        out[token] -= presence if seen >> 1 else 0
    return out


@pytest.mark.parametrize("ranks", [1, 3, 5])
def test_rules_change_logits_as_the_loop_does(ranks):
    share = VOCAB // ranks
    slots = np.array([3, 4, 0, 0, 2, 1], np.int32)
    for seed in range(5):
        rules = made(seed)
        logits = np.random.default_rng(seed).normal(size=(len(slots), VOCAB)).astype(np.float32)
        parts = []
        for rank in range(ranks):
            own = slice(rank * share, (rank + 1) * share)
            local = jax.tree.map(jnp.asarray, rules._replace(seen_Zv=rules.seen_Zv[:, own]))
            change = jax.jit(partial(apply_rules, first=rank * share))
            parts.append(change(jnp.asarray(logits[:, own]), local, jnp.asarray(slots)))
        got = np.concatenate(parts, axis=1)
        want = np.stack([oracle(row, rules, slot) for row, slot in zip(logits, slots, strict=True)])
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(got[1], logits[1])
        assert np.isneginf(got[0]).any()


def test_tokens_are_noted_in_their_slots_and_nowhere_else():
    rules = made(0)
    slots, ids = np.array([2, SLOTS, 0], np.int32), np.array([149, 3, 60], np.int32)
    for first, share in ((0, VOCAB), (100, 50)):
        local = jax.tree.map(jnp.asarray, rules._replace(seen_Zv=rules.seen_Zv[:, first : first + share]))
        noted = jax.jit(partial(note_tokens, first=first))(local, jnp.asarray(slots), jnp.asarray(ids))
        seen = rules.seen_Zv.copy()
        seen[2, 149] += 2
        seen[0, 60] += 2
        np.testing.assert_array_equal(noted.seen_Zv, seen[:, first : first + share])
        recent = rules.recent_ZY.copy()
        recent[2] = [*recent[2, 1:], 149]
        recent[0] = [*recent[0, 1:], 60]
        np.testing.assert_array_equal(noted.recent_ZY, recent)


@pytest.mark.parametrize(
    ("first", "count"), [(0, 150), (0, 32), (31, 2), (64, 86), (149, 1), (128, 64), (320, 40)]
)
def test_any_slice_of_a_mask_is_that_of_its_bits(first, count):
    words = np.random.default_rng(0).integers(-(2**31), 2**31, size=(3, WORDS)).astype(np.int32)
    bits = np.zeros((3, first + count + 160), np.bool_)
    bits[:, : 32 * WORDS] = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
    got = unpack_mask(jnp.asarray(words), first=first, count=count)
    np.testing.assert_array_equal(got, bits[:, first : first + count])


@pytest.mark.parametrize("ranks", [1, 3])
def test_banned_ids_lose_their_logit_below_their_position_and_no_other_does(ranks):
    draw, rows, share = np.random.default_rng(ranks), 40, VOCAB // ranks
    logits = draw.normal(size=(rows, VOCAB)).astype(np.float32)
    bans = Bans(
        position_R=draw.integers(8, 12, rows).astype(np.int32),
        until_R=draw.choice([0, 10], rows).astype(np.int32),
        stop_id_RB=draw.choice([-1, -1, 0, 49, 50, 75, VOCAB - 1, *range(3, 30)], (rows, 8)).astype(np.int32),
    )
    want = logits.copy()
    for row, (position, until, stop_ids) in enumerate(zip(*bans, strict=True)):
        if position < until:
            want[row, stop_ids[stop_ids >= 0]] = -INF
    assert 50 < np.isneginf(want).sum() < want.size / 10
    parts = [
        jax.jit(partial(ban, first=rank * share))(
            jnp.asarray(logits[:, rank * share : (rank + 1) * share]), jax.tree.map(jnp.asarray, bans)
        )
        for rank in range(ranks)
    ]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), want)


def test_bans_do_not_copy_logits_that_have_no_other_use():
    rows, vocab = 64, 2**14
    ints = jax.ShapeDtypeStruct((rows,), jnp.int32)
    bans = Bans(ints, ints, jax.ShapeDtypeStruct((rows, 32), jnp.int32))
    made_here = jax.jit(lambda hidden, head, bans: ban(hidden @ head, bans).max(axis=1))
    compiled = made_here.lower(jnp.zeros((rows, 8)), jnp.zeros((8, vocab)), bans).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1.5 * rows * vocab * 4
