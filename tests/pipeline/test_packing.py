"""Packing neither loses nor doubles an id, goes on from three integers, and leaves few gaps."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.packing import (
    MAX_LANES,
    MAX_LOOK_AHEAD,
    Cursor,
    Pack,
    Piece,
    collate,
    max_cursor_bytes,
    read_cursors,
    write_cursors,
)
from pipeline.sequence import TokenSequence
from schemas.errors import SpecError


def sequences_of(lengths):
    """Sequences whose every id is one of its own; an id is never 0, which is padding."""
    bounds = itertools.pairwise(itertools.accumulate(lengths, initial=1))
    return [TokenSequence(np.arange(first, last), np.ones(last - first, bool)) for first, last in bounds]


packings = st.builds(Pack, seq_len=st.integers(1, 40), look_ahead=st.integers(0, MAX_LOOK_AHEAD), split=st.booleans())


@st.composite
def problems(draw):
    pack = draw(packings)
    longest = 3 * pack.seq_len if pack.split else pack.seq_len
    return pack, draw(st.lists(st.integers(1, longest), max_size=60))


@given(problems())
def test_no_id_is_lost_or_doubled(problem):
    pack, lengths = problem
    sequences = sequences_of(lengths)
    found = [[] for _ in lengths]
    for packed, _ in pack.packs(sequences):
        used = 0
        for piece, first, last in zip(packed.pieces, packed.cu_seqlens, packed.cu_seqlens[1:], strict=False):
            found[piece.sequence] += packed.ids[first:last].tolist()
            assert last - first == piece.last - piece.first
            used += last - first
        assert not packed.ids[used:].any()
        assert packed.num_used == used
    assert found == [sequence.ids.tolist() for sequence in sequences]


@given(problems())
def test_going_on_from_any_pack_gives_the_packs_that_follow(problem):
    pack, lengths = problem
    sequences = sequences_of(lengths)
    unbroken = list(pack.packs(sequences))
    for number, (_, cursor) in enumerate(unbroken):
        assert read_cursors(json.loads(json.dumps(write_cursors([cursor])))) == [cursor]
        resumed = list(pack.packs(sequences[cursor.oldest :], cursor))
        assert [after for _, after in resumed] == [after for _, after in unbroken[number + 1 :]]
        for (ours, _), (theirs, _) in zip(resumed, unbroken[number + 1 :], strict=True):
            assert np.array_equal(ours.ids, theirs.ids)
            assert np.array_equal(ours.cu_seqlens, theirs.cu_seqlens)


@given(problems())
def test_lengths_alone_decide_and_are_asked_for_near_the_oldest_only(problem):
    """So what others tokenize need not be tokenized to know where they are."""
    pack, lengths = problem
    cursor, plan = Cursor(), []
    while True:
        asked = []

        def length_of(number, asked=asked):
            asked.append(number)
            return lengths[number] if number < len(lengths) else None

        before = cursor
        pieces, cursor = pack.next_pieces(before, length_of)
        assert min(asked) >= before.oldest and max(asked) <= cursor.oldest + pack.look_ahead
        if not pieces:
            break
        plan.append(pieces)
    assert plan == [packed.pieces for packed, _ in pack.packs(sequences_of(lengths))]


@given(problems())
def test_positions_and_loss_begin_anew_in_each_segment(problem):
    pack, lengths = problem
    for packed, _ in pack.packs(sequences_of(lengths)):
        assert packed.cu_seqlens[0] == 0 and packed.cu_seqlens[-1] == pack.seq_len
        assert packed.cu_seqlens.dtype == np.int32
        for number, (first, last) in enumerate(itertools.pairwise(packed.cu_seqlens)):
            assert packed.position_ids[first:last].tolist() == list(range(last - first))
            assert not packed.loss_mask[first]
            assert packed.loss_mask[first + 1 : last].all() == (number < len(packed.pieces) or last - first == 1)


def test_a_pack_worked_out_by_hand():
    """Of 4, 5, 3, 7, 2 in rows of 10: 4 and 5 fit, 3 does not, nor 7, but nothing is left for 2; then 3 and 7."""
    packs = [packed for packed, _ in Pack(seq_len=10).packs(sequences_of([4, 5, 3, 7, 2]))]
    assert [[piece.sequence for piece in packed.pieces] for packed in packs] == [[0, 1], [2, 3], [4]]
    assert packs[0].ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    assert packs[0].position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 0]
    assert packs[0].cu_seqlens.tolist() == [0, 4, 9, 10]
    assert packs[0].loss_mask.astype(int).tolist() == [0, 1, 1, 1, 0, 1, 1, 1, 1, 0]


def test_looking_ahead_fills_gaps_and_never_starves_the_oldest():
    packs = list(Pack(seq_len=10).packs(sequences_of([6, 7, 4, 3])))
    assert [[piece.sequence for piece in packed.pieces] for packed, _ in packs] == [[0, 2], [1, 3]]
    assert [cursor for _, cursor in packs] == [Cursor(1, 0b01, 0), Cursor(4, 0, 0)]
    blind = [packed for packed, _ in Pack(seq_len=10, look_ahead=0).packs(sequences_of([6, 7, 4, 3]))]
    assert [[piece.sequence for piece in packed.pieces] for packed in blind] == [[0], [1], [2, 3]]


def test_a_long_sequence_is_refused_unless_it_may_be_split():
    with pytest.raises(SpecError, match=r"has 25 ids, more than seq_len=10.*split=True"):
        list(Pack(seq_len=10).packs(sequences_of([3, 25])))
    packs = [packed.pieces for packed, _ in Pack(seq_len=10, split=True).packs(sequences_of([3, 25, 4]))]
    assert packs == [
        (Piece(0, 0, 3), Piece(2, 0, 4)),
        (Piece(1, 0, 10),),
        (Piece(1, 10, 20),),
        (Piece(1, 20, 25),),
    ]


def test_captions_and_images_leave_few_gaps():
    """Images of 256 ids with captions of 5 to 80: looking ahead gains what first come, first served leaves empty."""
    lengths = 258 + np.random.default_rng(0).integers(5, 81, 4000)
    shares = {}
    for look_ahead in (0, 8):
        packs = [packed for packed, _ in Pack(seq_len=2048, look_ahead=look_ahead).packs(sequences_of(lengths))]
        shares[look_ahead] = sum(packed.num_used for packed in packs[:-1]) / (2048 * (len(packs) - 1))
    assert shares[8] > shares[0] and shares[8] > 0.9


def test_a_batch_has_its_segments_in_a_row():
    packs = [packed for packed, _ in Pack(seq_len=5).packs(sequences_of([3, 4, 5]))]
    batch = collate(packs)
    assert batch["ids"].tolist() == [[1, 2, 3, 0, 0], [4, 5, 6, 7, 0], [8, 9, 10, 11, 12]]
    assert batch["cu_seqlens"].tolist() == [0, 3, 5, 9, 10, 15]
    assert batch["cu_seqlens"].dtype == np.int32 and batch["max_seqlen"] == 5
    assert batch["used"].tolist() == [3, 4, 5]
    assert batch["loss_mask"].shape == batch["position_ids"].shape == (3, 5)


def test_the_state_of_64_lanes_is_small_even_when_they_have_drifted_far_apart():
    furthest = Cursor(10**12 + (1 << 21) - 1, (1 << MAX_LOOK_AHEAD) - 1, (1 << 14) - 1)
    cursors = [Cursor(10**12), *[furthest] * (MAX_LANES - 1)]
    state = write_cursors(cursors)
    assert read_cursors(state) == cursors
    assert len(json.dumps(state | {"turn": 63})) <= max_cursor_bytes(MAX_LANES) < 700
    assert write_cursors([Cursor()] * 2) == {"oldest": 0, "lanes": "AAAAAAAA"}


@pytest.mark.parametrize("state", [{}, {"oldest": 1, "lanes": "AAA"}, {"oldest": 1, "lanes": "/w=="}, {"oldest": "x"}])
def test_a_damaged_state_is_refused(state):
    with pytest.raises(SpecError, match="packing state is damaged"):
        read_cursors(state)


@pytest.mark.parametrize("settings", [{"seq_len": 0}, {"lanes": MAX_LANES + 1}, {"look_ahead": MAX_LOOK_AHEAD + 1}])
def test_settings_beyond_their_limits_are_refused(settings):
    with pytest.raises(SpecError, match="it must be from"):
        Pack(**{"seq_len": 8} | settings)
