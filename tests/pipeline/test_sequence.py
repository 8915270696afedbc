"""Sequences against vectors written by hand, in the layouts of published models, and against a plain loop."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.sequence import SequenceFormat
from schemas.errors import SpecError

GRID = np.array([[[5, 0, 3], [1, 2, 4]]])
"""One frame of 2 x 3 tokens of 3 bits."""


def marked(sequence) -> str:
    """Ids that count in the loss, as a string of 1 and 0."""
    return "".join(map(str, sequence.loss_mask.astype(int)))


def test_llamagen_puts_a_class_before_the_codes_in_raster_order():
    """16,384 codes, then 1,000 classes and one for none; only codes are learnt."""
    form = SequenceFormat(label_offset=16384, null_label=17384, drop=0.1)
    sequence = form.sequence(np.array([[[7, 8], [16383, 0]]]), label=207)
    assert sequence.ids.tolist() == [16591, 7, 8, 16383, 0]
    assert marked(sequence) == "01111"
    assert form.sequence(np.array([[[7, 8], [16383, 0]]]), label=207, dropped=True).ids[0] == 17384
    form.check(14)
    assert form.num_ids(14, num_labels=1000) == 17385


def test_chameleon_scatters_the_codes_over_the_vocabulary_of_the_text():
    form = SequenceFormat(
        bos=0, eos=2, boi=8197, eoi=8196, id_map=tuple(range(4, 4 + 8 * 3, 3)), loss=("text", "codes", "special")
    )
    sequence = form.sequence(GRID, text=[9000, 9001])
    assert sequence.ids.tolist() == [0, 9000, 9001, 8197, 19, 4, 13, 7, 10, 16, 8196, 2]
    assert marked(sequence) == "011111111111"
    form.check(3)
    captioning = SequenceFormat(boi=1, eoi=2, id_offset=10, order=("image", "text"), loss=("text",))
    sequence = captioning.sequence(GRID, text=[50, 51])
    assert sequence.ids.tolist() == [1, 15, 10, 13, 11, 12, 14, 2, 50, 51]
    assert marked(sequence) == "0000000011"


def test_emu3_writes_the_size_and_ends_every_row_and_frame():
    """boi H*W img, each row with its eol, eof after the frame, eoi; the digits are text."""
    form = SequenceFormat(
        bos=90, eos=91, boi=80, eoi=81, eol=82, eof=83, id_offset=100, size_header=("height", 42, "width", 84),
        numbers={2: (17,), 3: (18, 19)}, loss=("codes",),
    )  # fmt: skip
    sequence = form.sequence(GRID, text=[60])
    header, rows = [80, 17, 42, 18, 19, 84], [105, 100, 103, 82, 101, 102, 104, 82]
    assert sequence.ids.tolist() == [90, 60, *header, *rows, 83, 81, 91]
    assert marked(sequence) == "00" + "000000" + "1110" + "1110" + "000"


def test_emu3_clips_repeat_rows_and_end_of_frame():
    form = SequenceFormat(boi=80, eoi=81, eol=82, eof=83, id_offset=100)
    clip = np.array([[[1, 2]], [[3, 4]]])
    assert form.sequence(clip).ids.tolist() == [80, 101, 102, 82, 83, 103, 104, 82, 83, 81]


def test_cosmos_runs_through_time_between_two_marks_behind_the_codes():
    form = SequenceFormat(boi=64000, eoi=64001, pad=64002)
    clip = np.array([[[63999, 1], [2, 3]], [[4, 5], [6, 7]]])
    sequence = form.sequence(clip)
    assert sequence.ids.tolist() == [64000, 63999, 1, 2, 3, 4, 5, 6, 7, 64001]
    assert marked(sequence) == "0" + "1" * 9
    assert len(form.sequence(np.zeros((5, 40, 64), np.int64))) == 12802


def test_groups_give_several_ids_for_a_token_each_with_its_offset():
    """0b101_1100 is 5 in the high three bits and 12 in the low four."""
    form = SequenceFormat(group_bits=(3, 4), id_offset=(0, 8), eol=24)
    sequence = form.sequence(np.array([[[0b1011100, 0b0000001], [0b1110000, 0b0101111]]]))
    assert sequence.ids.tolist() == [5, 20, 0, 9, 24, 7, 8, 2, 23, 24]
    form.check(7)
    assert SequenceFormat(group_bits=(3, 4)).sequence(np.array([[[0b1011100]]])).ids.tolist() == [5, 12]


def slowly(form, indices, text, label):
    """The sequence, one id after the other."""
    ids, learnt = [], []

    def put(number, kind):
        if number is not None:
            ids.append(int(number))
            learnt.append(kind in form.loss)

    put(form.bos, "never")
    for part in form.order:
        if part == "label" and form.label_offset is not None:
            put(form.null_label if label is None else form.label_offset + label, "label")
        elif part == "text":
            for number in text:
                put(number, "text")
        elif part == "image":
            put(form.boi, "special")
            for each in form.size_header:
                size = dict(zip(("frames", "height", "width"), indices.shape, strict=True)).get(each)
                put(each if size is None else form.numbers + size, "special")
            for frame in indices:
                for line in frame:
                    for value in line:
                        rest = int(value)
                        groups = []
                        for width in reversed(form.group_bits or (18,)):
                            groups.append(rest & ((1 << width) - 1))
                            rest >>= width
                        for number, group in enumerate(reversed(groups)):
                            offset = form.id_offset if isinstance(form.id_offset, int) else form.id_offset[number]
                            put(group + offset, "codes")
                    put(form.eol, "special")
                put(form.eof, "special")
            put(form.eoi, "special")
    put(form.eos, "special")
    learnt[0] = False
    return ids, learnt


special = st.none() | st.integers(1 << 19, (1 << 19) + 50)


@st.composite
def formats(draw):
    group_bits = draw(st.sampled_from([(), (9, 9), (6, 12), (1, 16, 1)]))
    offset = draw(st.integers(0, 100))
    return SequenceFormat(
        **{name: draw(special) for name in ("bos", "eos", "boi", "eoi", "eol", "eof")},
        id_offset=tuple(range(offset, offset + len(group_bits))) if group_bits and draw(st.booleans()) else offset,
        group_bits=group_bits,
        size_header=draw(st.sampled_from([(), (7,), ("frames", "height", "width"), ("width", 3)])),
        numbers=1000,
        label_offset=draw(st.none() | st.integers(0, 9)),
        null_label=77,
        order=draw(st.permutations(["label", "text", "image"])),
        loss=draw(st.lists(st.sampled_from(["label", "text", "special", "codes"]), unique=True)),
    )


@given(formats(), st.tuples(*[st.integers(1, 3)] * 3), st.lists(st.integers(0, 4), max_size=4), st.randoms())
def test_the_quick_way_equals_a_plain_loop(form, size, text_lengths, random):
    texts = [[random.randrange(1000) for _ in range(length)] for length in text_lengths]
    labels = [random.choice([None, random.randrange(10)]) for _ in texts]
    indices = np.array([random.randrange(1 << 18) for _ in range(len(texts) * np.prod(size))], np.int64)
    indices = indices.reshape(len(texts), *size)
    sequences = form.sequences(indices, texts=texts, labels=labels)
    assert len(sequences) == len(texts)
    for row, (sequence, text, label) in enumerate(zip(sequences, texts, labels, strict=True)):
        ids, learnt = slowly(form, indices[row], text, label)
        assert sequence.ids.tolist() == ids
        assert sequence.loss_mask.tolist() == learnt
        assert form.length(size[0], size[1:], len(text)) == len(ids)


def test_narrow_indices_make_wide_ids():
    form = SequenceFormat(id_offset=(1 << 31) - 1)
    assert form.sequence(np.array([[[(1 << 31) - 1]]], np.int32)).ids.tolist() == [(1 << 32) - 2]


def test_a_dropped_row_loses_text_and_label():
    form = SequenceFormat(label_offset=10, null_label=9, null_text=(8, 7), id_offset=100, drop=0.5)
    dropped = np.array([True, False])
    first, second = form.sequences(np.zeros((2, 1, 1, 1), int), texts=[[1], [2]], labels=[3, 4], dropped=dropped)
    assert first.ids.tolist() == [9, 8, 7, 100]
    assert second.ids.tolist() == [14, 2, 100]


def test_the_share_that_is_dropped_is_that_of_the_hashes_below_it():
    hashes = np.array([0, (1 << 62) - 1, 1 << 62, (1 << 64) - 1], np.uint64)
    assert SequenceFormat(drop=0.25).dropped(hashes).tolist() == [True, True, False, False]
    assert not SequenceFormat().dropped(hashes).any()
    assert SequenceFormat(drop=1.0).dropped(hashes).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"order": ("text", "picture")}, "no 'picture'.*Known: label, text, image"),
        ({"order": ("text",)}, "name 'image' once"),
        ({"loss": ("code",)}, "Did you mean 'codes'"),
        ({"size_header": ("hight",)}, "Did you mean 'height'"),
        ({"size_header": ("height",)}, "give their ids as numbers="),
        ({"id_map": (1, 2), "id_offset": 3}, "takes the place of id_offset"),
        ({"group_bits": (9, 9), "id_offset": (1, 2, 3)}, "3 numbers for 2 ids"),
        ({"drop": 1.5}, "a share from 0 to 1"),
        ({"drop": 0.1, "label_offset": 5}, "null_label does not say"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(SpecError, match=message):
        SequenceFormat(**settings)


def test_rows_that_do_not_fit_the_format_are_refused():
    with pytest.raises(SpecError, match="a row has no label"):
        SequenceFormat(label_offset=10).sequence(GRID)
    with pytest.raises(SpecError, match="order has no place for it"):
        SequenceFormat(order=("image",)).sequence(GRID, text=[1])
    with pytest.raises(SpecError, match="no ids for 2, the height"):
        SequenceFormat(size_header=("height",), numbers={3: (1,)}).sequence(GRID)


def test_ids_that_mean_two_things_are_refused():
    SequenceFormat(boi=8, id_offset=0).check(3)
    with pytest.raises(SpecError, match="boi: 7 is also the id of a code"):
        SequenceFormat(boi=7).check(3)
    with pytest.raises(SpecError, match="eol: 5 is also"):
        SequenceFormat(eol=5, id_map=(1, 5)).check(1)
    with pytest.raises(SpecError, match="numbers: 3 is also"):
        SequenceFormat(size_header=("height",), numbers={2: (9, 3)}).check(3)
    with pytest.raises(SpecError, match="make 18 bits; the tokens have 20"):
        SequenceFormat(group_bits=(9, 9)).check(20)
    with pytest.raises(SpecError, match="tokens of 2 bits have 4 codes"):
        SequenceFormat(id_map=(1, 5)).check(2)


def test_the_fingerprint_is_that_of_the_settings_and_stays():
    form = SequenceFormat(boi=1, id_offset=(3, 515), group_bits=(9, 9), numbers={2: [5]})
    assert form.to_json_dict() == {"boi": 1, "id_offset": [3, 515], "group_bits": [9, 9], "numbers": {"2": [5]}}
    canonical = b'{"boi":1,"group_bits":[9,9],"id_offset":[3,515],"numbers":{"2":[5]}}'
    assert form.fingerprint == hashlib.sha256(canonical).hexdigest()
    assert (
        form.fingerprint == SequenceFormat(boi=1, id_offset=[3, 515], group_bits=[9, 9], numbers={2: (5,)}).fingerprint
    )
    assert SequenceFormat().to_json_dict() == {}
    scattered = SequenceFormat(id_map=(1, 5)), SequenceFormat(id_map=(5, 1))
    assert len({each.fingerprint for each in scattered}) == 2
