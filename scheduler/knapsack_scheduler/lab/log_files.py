"""Files of a log, batch by batch: JSON lines, CSV and Parquet, as columns of cells."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from knapsack_scheduler.lab.log_columns import Columns, LogError, WantedColumns

BATCH_ROWS = 65_536
"""Rows held as cells at once."""

_JSON = (".jsonl", ".ndjson", ".json")
_CSV = (".csv", ".tsv")
_PARQUET = (".parquet", ".pq")
SUFFIXES = (*_JSON, *_CSV, *_PARQUET)
"""What the files of a log may end in; .gz may follow on text."""

_BOM = b"\xef\xbb\xbf"
_CSV_BLOCK_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True)
class Cells:
    """Some rows of a log, column by column.

    Attributes:
        steps, prompts, rewards: a cell per row, as the file has it.
        tokens: None where lengths are not in the log.
        place: names the file and the place of the i-th row.
    """

    steps: Sequence[Any]
    prompts: Sequence[Any]
    rewards: Sequence[Any]
    tokens: Sequence[Any] | None
    place: Callable[[int], str]


def find_files(paths: Sequence[Path]) -> list[Path]:
    """Return the files of a log: those named, and those inside the folders named, by name.

    Raises:
        LogError: a path is not there, is not a log by its suffix, or a folder has none.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.is_file() and _kind(p) in SUFFIXES)
            if not inside:
                raise LogError(f"{path}: no file in it ends in {', '.join(SUFFIXES)}")
            files += inside
        elif not path.exists():
            raise LogError(f"{path}: there is no such file")
        elif _kind(path) not in SUFFIXES:
            raise LogError(f"{path}: must end in {', '.join(SUFFIXES)} (.gz may follow on text)")
        else:
            files.append(path)
    return files


def read_cells(path: Path, wanted: WantedColumns) -> tuple[Columns, Iterator[Cells]]:
    """Return the columns of a file and its rows in batches.

    Raises:
        LogError: the file is empty, broken, or lacks a column; also while iterating.
    """
    kind = _kind(path)
    try:
        if kind in _JSON:
            return _json_lines(path, wanted)
        if kind in _CSV:
            return _csv(path, wanted, "\t" if kind == ".tsv" else "")
        return _parquet(path, wanted)
    except OSError as error:
        raise LogError(f"{path}: {error.strerror or error}") from None


def open_bytes(path: Path) -> BinaryIO:
    """Return a text file's bytes, unpacked if it ends in .gz."""
    if path.suffix.lower() == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    return path.open("rb")


def json_objects(path: Path) -> Iterator[tuple[int, list[dict[str, Any]], list[int]]]:
    """Yield the objects of a file of JSON lines in batches, with the line of each.

    Yields:
        the number of the batch's first line, the objects, and their line numbers.

    Raises:
        LogError: a line is not a JSON object.
    """
    try:
        with open_bytes(path) as file:
            lines, numbers = [], []
            for number, line in enumerate(file, 1):
                if number == 1 and line.startswith(_BOM):
                    line = line[len(_BOM) :]
                if line.strip():
                    lines.append(line)
                    numbers.append(number)
                if len(lines) == BATCH_ROWS:
                    yield numbers[0], _objects(path, lines, numbers), numbers
                    lines, numbers = [], []
            if lines:
                yield numbers[0], _objects(path, lines, numbers), numbers
    except (OSError, EOFError) as error:
        raise LogError(f"{path}: cannot be read: {error}") from None


def _kind(path: Path) -> str:
    name = path.name.lower()
    name = name[: -len(".gz")] if name.endswith(".gz") else name
    return Path(name).suffix


def _objects(path: Path, lines: list[bytes], numbers: list[int]) -> list[dict[str, Any]]:
    try:
        objects = json.loads(b"[" + b",".join(lines) + b"]")
        if len(objects) == len(lines) and all(type(one) is dict for one in objects):
            return list(objects)
    except (ValueError, RecursionError):
        pass
    objects = []
    for line, number in zip(lines, numbers, strict=True):
        try:
            one = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise LogError(f"{path}, line {number}: not JSON: {error}") from None
        if not isinstance(one, dict):
            shown = line[:40].decode("utf-8", "replace").strip()
            raise LogError(
                f"{path}, line {number}: {shown!r}: must be a JSON object, one on each line"
            )
        objects.append(one)
    return objects


def _json_lines(path: Path, wanted: WantedColumns) -> tuple[Columns, Iterator[Cells]]:
    batches = json_objects(path)
    try:
        first = next(batches)
    except StopIteration:
        raise LogError(f"{path}: is empty") from None
    columns = wanted.find(list(first[1][0]), f"{path}, line {first[2][0]}")

    def rows() -> Iterator[Cells]:
        yield _json_cells(path, columns, *first[1:])
        for _, objects, numbers in batches:
            yield _json_cells(path, columns, objects, numbers)

    return columns, rows()


def _json_cells(
    path: Path, columns: Columns, objects: list[dict[str, Any]], numbers: list[int]
) -> Cells:
    def place(at: int) -> str:
        return f"{path}, line {numbers[at]}"

    def column(name: str) -> list[Any]:
        try:
            return [one[name] for one in objects]
        except KeyError:
            at = next(i for i, one in enumerate(objects) if name not in one)
            raise LogError(f"{place(at)}: no {name!r}, which other lines have") from None

    tokens = None if columns.tokens is None else [one.get(columns.tokens) for one in objects]
    return Cells(
        column(columns.step), column(columns.prompt), column(columns.reward), tokens, place
    )


def _csv(path: Path, wanted: WantedColumns, delimiter: str) -> tuple[Columns, Iterator[Cells]]:
    import pyarrow as pa
    from pyarrow import csv as arrow_csv

    with open_bytes(path) as file:
        try:
            head = file.readline().decode("utf-8-sig")
        except (UnicodeDecodeError, EOFError) as error:
            raise LogError(f"{path}: cannot be read: {error}") from None
    if not head.strip():
        raise LogError(f"{path}: is empty, or its first line is" if head else f"{path}: is empty")
    delimiter = delimiter or max(",;\t", key=head.count)
    names = next(csv.reader([head], delimiter=delimiter))
    columns = wanted.find(names, f"{path}, first line")
    used = [c for c in (columns.step, columns.prompt, columns.reward, columns.tokens) if c]
    used = list(dict.fromkeys(used))
    twice = [name for name in used if names.count(name) > 1]
    if twice:
        raise LogError(f"{path}, first line: the column {twice[0]!r} is there twice")

    def batches() -> Iterator[Any]:
        with pa.input_stream(str(path), compression="detect") as stream:
            reader = arrow_csv.open_csv(
                stream,
                arrow_csv.ReadOptions(block_size=_CSV_BLOCK_BYTES, use_threads=False),
                arrow_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
                arrow_csv.ConvertOptions(
                    column_types=dict.fromkeys(used, pa.string()), include_columns=used
                ),
            )
            while True:
                try:
                    yield reader.read_next_batch()
                except StopIteration:
                    return

    return columns, _arrow_cells(path, columns, batches())


def _parquet(path: Path, wanted: WantedColumns) -> tuple[Columns, Iterator[Cells]]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        schema = parquet.read_schema(path)
    except pa.ArrowInvalid as error:
        raise LogError(f"{path}: not a Parquet file: {error}") from None
    columns = wanted.find(schema.names, str(path))
    used = [c for c in (columns.step, columns.prompt, columns.reward, columns.tokens) if c]

    def batches() -> Iterator[Any]:
        with parquet.ParquetFile(path) as file:
            yield from file.iter_batches(
                BATCH_ROWS, columns=list(dict.fromkeys(used)), use_threads=False
            )

    return columns, _arrow_cells(path, columns, batches())


def _arrow_cells(path: Path, columns: Columns, batches: Iterator[Any]) -> Iterator[Cells]:
    import pyarrow as pa

    before = 0

    def place_after(rows: int) -> Callable[[int], str]:
        return lambda at: f"{path}, row {rows + at + 1}"

    try:
        for batch in batches:
            cells = {name: _cells(batch.column(name)) for name in batch.schema.names}
            tokens = None if columns.tokens is None else cells[columns.tokens]
            yield Cells(
                cells[columns.step],
                cells[columns.prompt],
                cells[columns.reward],
                tokens,
                place_after(before),
            )
            before += batch.num_rows
    except (pa.ArrowInvalid, OSError) as error:
        # Arrow quotes the whole row, which may be a page of text.
        message = " ".join(str(error).split())[:200]
        raise LogError(f"{path}, after row {before}: {message}") from None


def _cells(column: Any) -> Sequence[Any]:
    """Return a column's cells: an array where it is of numbers, else Python objects."""
    import pyarrow as pa

    kind = column.type
    numeric = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    if numeric and column.null_count == 0:
        array: Sequence[Any] = column.to_numpy(zero_copy_only=False)
        return array
    cells: list[Any] = column.to_pylist()
    return cells
