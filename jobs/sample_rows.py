"""Takes rows of a dataset by chance, the same ones for the same seed, and reads each file that holds some only once."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby

import numpy as np
import numpy.typing as npt

from jobs.commit_table import CommitTable
from pipeline.dataset_files import StoredFile
from pipeline.find_rows import FoundRow, TokenFile
from pipeline.parquet import PARQUET_ERRORS, open_parquet
from pipeline.storage import Storage
from schemas.errors import BsqError

COLUMNS = ["key", "clip", "view", "frames", "tokens", "position", "source_offset"]


def choose_rows(commits: CommitTable, count: int, seed: int) -> list[tuple[int, int]]:
    """(row of the commit table, row within its token file) of `count` rows, each as likely as any; ascending."""
    ends = np.cumsum(commits.column("rows"))
    total = int(ends[-1]) if len(ends) else 0
    numbers = sorted(random.Random(seed).sample(range(total), min(count, total)))
    files = np.searchsorted(ends, numbers, side="right").tolist()
    starts = ends - commits.column("rows")
    return [(file, number - int(starts[file])) for file, number in zip(files, numbers, strict=True)]


def read_rows(storage: Storage, commits: CommitTable, chosen: Sequence[tuple[int, int]]) -> Iterator[FoundRow]:
    """Read the rows that `choose_rows` chose, in their order, with the columns in COLUMNS.

    Reads the row groups that hold them, of at most 4 MiB of tokens each.  Raises BsqError for a file that is gone or
    damaged."""
    for number, wanted in groupby(chosen, key=lambda place: place[0]):
        source = token_file(commits, number)
        try:
            with StoredFile(storage, source.file) as stored:
                file = open_parquet(stored)
                groups = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
                ends = np.cumsum(groups)
                rows = [row for _, row in wanted]
                for group, members in groupby(rows, key=partial(_group_of, ends)):
                    table = file.read_row_group(group, columns=COLUMNS, use_threads=False)
                    first = int(ends[group]) - groups[group]
                    for row in members:
                        yield FoundRow(source, table.slice(row - first, 1).to_pylist()[0])
        except (IndexError, *PARQUET_ERRORS) as error:
            name = storage.printable(source.file)
            raise BsqError(f"{name}: it is gone or damaged. Run `bsq verify {storage.url}`.") from error


def token_file(commits: CommitTable, number: int) -> TokenFile:
    """The token file in row `number` of the commit table."""
    columns = ["shard", "part", "file", "rows", "failures_file"]
    values = {name: commits.table[name][number].as_py() for name in columns}
    return TokenFile(
        shard=values["shard"],
        part=values["part"],
        file=values["file"],
        url=commits.plan.url(values["shard"]),
        rows=values["rows"],
        min_key=None,
        max_key=None,
        failures=values["failures_file"],
    )


def _group_of(ends: npt.NDArray[np.int64], row: int) -> int:
    return int(np.searchsorted(ends, row, side="right"))
