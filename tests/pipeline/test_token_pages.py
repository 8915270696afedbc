"""Reading at byte offsets: what pyarrow reads, or refused.  Never anything else."""

import hashlib
import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.token_files import TokenFile
from pipeline.token_pages import NotPlain, check_prefixes, find_pages, parse_page_header, row_starts
from schemas.errors import BsqError
from schemas.tokenfile import TokenFooter, token_schema
from tests.token_datasets import TokenDatasetWriter

ROW_BYTES = 14  # 6 tokens of 18 bits


class Bytes:
    """A file in memory."""

    def __init__(self, data):
        self.data = bytes(data)

    def read(self, offset, num_bytes):
        if offset < 0 or num_bytes < 0:
            raise OSError("a read outside of the file")
        return self.data[offset : offset + num_bytes]

    def read_into(self, offset, buffers):
        done = 0
        for buffer in buffers:
            part = self.read(offset + done, len(buffer))
            buffer[: len(part)] = part
            done += len(part)
        return done == sum(map(len, buffers))

    def read_each(self, offsets, buffers):
        return all(self.read_into(offset, [buffer]) for offset, buffer in zip(offsets, buffers, strict=True))


def opened(data):
    return TokenFile(Bytes(data), "a file", "a dataset", len(data), in_one_request=False)


def rows_by_pyarrow(data, group):
    """The tokens of a row group as pyarrow decodes them; None when it cannot."""
    try:
        return (
            pq.ParquetFile(io.BytesIO(data)).read_row_group(group, columns=["tokens"], use_threads=False)[0].to_pylist()
        )
    except (pa.ArrowException, OSError):
        return None


def rows_at_offsets(file, unit, row_bytes):
    rows_RS = np.zeros((file.unit_rows[unit], row_bytes + 4), np.uint8)
    file.read_fixed(unit, rows_RS)
    return [row.tobytes() for row in rows_RS[:, 4:]]


def rows_one_by_one(file, unit, row_bytes):
    """None where the file does not allow it."""
    numbers = np.arange(file.unit_rows[unit])[::-1]
    out = [memoryview(bytearray(row_bytes + 4)) for _ in numbers]
    if not file.read_rows(unit, numbers, out):
        return None
    if any(buffer[:4] != row_bytes.to_bytes(4, "little") for buffer in out):
        return None
    return [bytes(buffer[4:]) for buffer in out][::-1]


def table_of(sizes, seed=0):
    generator = np.random.default_rng(seed)
    count = len(sizes)
    return pa.table(
        {
            "key": [f"{row:04d}" for row in range(count)],
            "clip": [0] * count,
            "view": [0] * count,
            "frames": [size // ROW_BYTES for size in sizes],
            "tokens": [generator.bytes(size) for size in sizes],
            "width": [1] * count,
            "height": [1] * count,
            "crop": [[0, 0, 1, 1]] * count,
            "flipped": [False] * count,
            "start": [None] * count,
            "frame_times": [None] * count,
            "position": list(range(count)),
            "source_offset": [0] * count,
        },
        schema=token_schema(()),
    )


FOOTER = TokenFooter(
    fingerprint="f" * 64, shard=0, bits=18, group_size=9, grid=(2, 3), views=1, samples=1, failed=0, source_bytes=1
)


def written(table, **options):
    options = {
        "compression": {name: "NONE" if name == "tokens" else "ZSTD" for name in table.schema.names if name != "crop"},
        "use_dictionary": ["key"],
        "write_statistics": ["key", "frames"],
        "data_page_size": 1 << 30,
        "write_batch_size": 1 << 20,
        "row_group_size": 64,
        "store_schema": False,
    } | options
    sink = io.BytesIO()
    with pq.ParquetWriter(
        sink, table.schema, **{name: value for name, value in options.items() if name != "row_group_size"}
    ) as writer:
        writer.add_key_value_metadata(FOOTER.to_metadata())
        writer.write_table(table, row_group_size=options["row_group_size"])
    return sink.getvalue()


SAME_SIZE = [ROW_BYTES] * 150
SIZES = [ROW_BYTES * (1 + row % 4) for row in range(150)]

LAYOUTS = {
    "as this project writes": ({}, True),
    "page checksums": ({"write_page_checksum": True}, True),
    "second version of pages": ({"data_page_version": "2.0"}, True),
    "several pages": ({"data_page_size": 100, "write_batch_size": 16}, True),
    "statistics and a page index": ({"write_statistics": True, "write_page_index": True}, True),
    "zstd": ({"compression": "ZSTD"}, False),
    "a dictionary": ({"use_dictionary": True}, False),
    "another encoding": ({"use_dictionary": False, "column_encoding": {"tokens": "DELTA_LENGTH_BYTE_ARRAY"}}, False),
}


@pytest.mark.parametrize("sizes", [SAME_SIZE, SIZES], ids=["one size", "several sizes"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_layouts_give_the_tokens_that_were_written(layout, sizes):
    options, plain = LAYOUTS[layout]
    table = table_of(sizes)
    data = written(table, **options)
    file = opened(data)
    assert file.unit_rows == [64, 64, 22]
    tokens = table["tokens"].to_pylist()
    for unit in range(3):
        expected = tokens[64 * unit : 64 * unit + 64]
        if sizes is SAME_SIZE:
            assert rows_at_offsets(file, unit, ROW_BYTES) == expected
            one_page = plain and layout != "several pages"
            assert rows_one_by_one(file, unit, ROW_BYTES) == (expected if one_page else None)
        lengths = np.array([len(each) for each in expected])
        chunk, starts = file.read_ragged(unit, lengths)
        assert [chunk[start : start + size].tobytes() for start, size in zip(starts, lengths, strict=True)] == expected


def test_a_column_that_may_be_null_is_decoded():
    table = table_of(SAME_SIZE)
    nullable = table.cast(pa.schema([field.with_nullable(True) for field in table.schema]))
    file = opened(written(nullable))
    assert rows_at_offsets(file, 1, ROW_BYTES) == table["tokens"].to_pylist()[64:128]


@pytest.mark.parametrize("sizes", [[ROW_BYTES, ROW_BYTES + 1, ROW_BYTES - 1], [ROW_BYTES] * 2 + [28]])
def test_rows_of_other_sizes_than_expected_are_refused(sizes):
    file = opened(written(table_of(sizes)))
    with pytest.raises(BsqError, match="its rows have other sizes than recorded"):
        rows_at_offsets(file, 0, ROW_BYTES)
    with pytest.raises(BsqError, match="its rows have other sizes than recorded"):
        file.read_ragged(0, np.full(3, ROW_BYTES))
    assert rows_one_by_one(file, 0, ROW_BYTES) is None


PLAIN = written(table_of(SAME_SIZE))
PLACES = [opened(PLAIN)._places[unit] for unit in range(3)]
FOOTER_START = len(PLAIN) - 8 - int.from_bytes(PLAIN[-8:-4], "little")
HEADER_BYTES = PLACES[0].num_bytes - 64 * (ROW_BYTES + 4)


def mutated(changes):
    data = bytearray(PLAIN)
    for place, value in changes:
        data[place] = value
    return bytes(data)


TRUE_ROWS = [rows_by_pyarrow(PLAIN, unit) for unit in range(3)]


def compare(data):
    """Whatever the bytes are: an answer is that of pyarrow, or where pyarrow gives none what was written.  Everything
    else is a refusal in our words."""
    try:
        file = opened(data)
    except BsqError:
        return {"refused"}
    outcomes = set()
    for unit, count in enumerate(file.unit_rows[:4]):
        if not 0 <= count < 100_000:
            continue
        expected = rows_by_pyarrow(data, unit)
        if expected is None:
            expected = TRUE_ROWS[unit]
        for read in (rows_at_offsets, rows_one_by_one, rows_ragged):
            try:
                found = read(file, unit, ROW_BYTES)
            except BsqError:
                found = None
            assert found is None or found == expected
            outcomes.add("refused" if found is None else "equal")
    return outcomes


def rows_ragged(file, unit, row_bytes):
    chunk, starts = file.read_ragged(unit, np.full(file.unit_rows[unit], row_bytes))
    return [chunk[start : start + row_bytes].tobytes() for start in starts]


OCTETS = st.integers(0, 255)
FUZZ = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
LONG_FUZZ = settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.too_slow])

HEADER_CHANGES = st.lists(
    st.tuples(st.integers(PLACES[0].offset, PLACES[0].offset + HEADER_BYTES + 40), OCTETS), min_size=1, max_size=4
)
FOOTER_CHANGES = st.lists(st.tuples(st.integers(FOOTER_START, len(PLAIN) - 1), OCTETS), min_size=1, max_size=3)


@FUZZ
@given(HEADER_CHANGES)
def test_a_changed_page_header_is_refused_or_read_as_pyarrow_reads_it(changes):
    compare(mutated(changes))


@FUZZ
@given(FOOTER_CHANGES)
def test_a_changed_footer_is_refused_or_read_as_pyarrow_reads_it(changes):
    compare(mutated(changes))


@pytest.mark.parametrize("change", [(7599, 72), (8001, 119), (8705, 52)])
def test_a_codec_that_parquet_does_not_have_is_refused(change):
    """pyarrow would end the process."""
    assert compare(mutated([change])) <= {"refused", "equal"}


RAGGED = written(table_of(SIZES), data_page_size=100, write_batch_size=16)
RAGGED_ROWS = [rows_by_pyarrow(RAGGED, unit) for unit in range(3)]


def ragged_headers():
    """The bytes of all page headers of the first two row groups, with the first lengths behind them."""
    for place in opened(RAGGED)._places[:2]:
        header = place.offset
        for first, num_bytes, _ in find_pages(np.frombuffer(RAGGED, np.uint8)[place.offset :][: place.num_bytes], 64):
            yield from range(header, place.offset + first + 4)
            header = place.offset + first + num_bytes


RAGGED_CHANGES = st.lists(st.tuples(st.sampled_from(list(ragged_headers())), OCTETS), min_size=1, max_size=4)


def compare_ragged(changes):
    data = bytearray(RAGGED)
    for place, value in changes:
        data[place] = value
    file = opened(data)
    for unit, true_rows in enumerate(RAGGED_ROWS):
        expected = rows_by_pyarrow(data, unit) or true_rows
        sizes = np.array([len(row) for row in true_rows])
        try:
            chunk, starts = file.read_ragged(unit, sizes)
        except BsqError:
            continue
        found = [chunk[start : start + size].tobytes() for start, size in zip(starts, sizes, strict=True)]
        assert found == expected


@FUZZ
@given(RAGGED_CHANGES)
def test_changed_headers_of_several_pages_are_refused_or_read_as_pyarrow_reads_them(changes):
    compare_ragged(changes)


@pytest.mark.long
@LONG_FUZZ
@given(RAGGED_CHANGES)
def test_many_changed_headers_of_several_pages(changes):
    compare_ragged(changes)


@pytest.mark.long
@LONG_FUZZ
@given(st.one_of(HEADER_CHANGES, FOOTER_CHANGES))
def test_many_changes_are_refused_or_read_as_pyarrow_reads_them(changes):
    compare(mutated(changes))


@FUZZ
@given(st.integers(0, len(PLAIN)), st.integers(0, 60))
def test_bytes_that_are_missing_or_doubled(place, count):
    compare(PLAIN[:place] + PLAIN[place + count :])
    compare(PLAIN[:place] + PLAIN[place : place + count] + PLAIN[place:])


def test_every_changed_byte_of_a_header():
    """Each byte of the first page header, to each of its neighbours and a few others."""
    outcomes = set()
    for place in range(PLACES[0].offset, PLACES[0].offset + HEADER_BYTES):
        for value in {0, 255, 0x80, PLAIN[place] ^ 1, PLAIN[place] ^ 2, PLAIN[place] ^ 16}:
            outcomes |= set(compare(mutated([(place, value)])))
    assert "refused" in outcomes and "equal" in outcomes


@given(st.binary(max_size=80))
def test_any_bytes_are_a_header_or_refused(data):
    try:
        header = parse_page_header(data)
    except NotPlain:
        return
    assert 0 < header.header_bytes <= len(data) and header.value_bytes >= 0 and header.num_values >= 0


def test_a_header_is_parsed_as_it_was_written():
    header = parse_page_header(PLAIN[PLACES[0].offset : PLACES[0].offset + 100])
    assert (header.header_bytes, header.value_bytes, header.num_values) == (HEADER_BYTES, 64 * (ROW_BYTES + 4), 64)


@given(st.integers(0, 5), st.integers(0, 63), st.integers(1, 255))
def test_prefixes_are_checked(byte, row, change):
    rows_RS = np.zeros((64, ROW_BYTES + 4), np.uint8)
    rows_RS[:, 0] = ROW_BYTES
    check_prefixes(rows_RS)
    rows_RS[row, byte % 4] ^= change
    with pytest.raises(NotPlain):
        check_prefixes(rows_RS)


def test_pages_that_run_over_their_chunk_are_refused():
    chunk = np.frombuffer(PLAIN, np.uint8)[PLACES[0].offset : PLACES[0].offset + PLACES[0].num_bytes]
    sizes = np.full(64, ROW_BYTES)
    assert len(row_starts(chunk, sizes)) == 64
    for wrong in (chunk[:-1], np.append(chunk, np.uint8(0)), chunk[:HEADER_BYTES]):
        with pytest.raises(NotPlain):
            row_starts(wrong, sizes)
    with pytest.raises(NotPlain):
        row_starts(chunk, sizes[:-1])


def test_a_dataset_rewritten_by_another_tool_gives_the_same_tokens(tmp_path):
    """Compressed, with dictionaries: then pyarrow decodes.  The manifest is written for the new files."""
    from pipeline import TokenDataset, TokenLoader
    from schemas.manifest import manifest_table

    writer = TokenDatasetWriter(url=str(tmp_path), clips_of_file=[40, 25], row_group_rows=16, finished=False).write()
    commits = []
    for commit in writer.commits:
        path = tmp_path / commit.file
        file = pq.ParquetFile(path)
        sink = io.BytesIO()
        with pq.ParquetWriter(sink, file.schema_arrow, compression="ZSTD") as rewriter:
            rewriter.add_key_value_metadata(
                {key: value for key, value in file.metadata.metadata.items() if key.startswith(b"bsqtok.")}
            )
            for group in range(file.num_row_groups):
                rewriter.write_table(file.read_row_group(group))
        data = sink.getvalue()
        path.write_bytes(data)
        commits.append(commit.model_copy(update={"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}))
    writer.finish(manifest_table((commit, "", 0) for commit in commits))
    dataset = TokenDataset(tmp_path, check="sha256")
    for sample, row in zip(dataset, writer.rows, strict=True):
        assert np.array_equal(sample["index"].numpy(), writer.indices(row))
    for batch in TokenLoader(dataset, 5, window=32):
        for sample, tokens in zip(batch["sample"].tolist(), batch["index"], strict=True):
            assert np.array_equal(tokens.numpy(), writer.indices(writer.rows[sample]))
