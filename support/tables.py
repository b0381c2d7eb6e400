"""Files of parquet or JSON lines, opened under our names for their columns.

    path, split --find_files--> files --open_table--> Table --values(row)--> {"image": [...], ...}

A column is named by the user (`image=pictures`), or found by its usual name where just one of the
usual names is there. What a cell means is data.py's business.
"""

import glob
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

USUAL = {  # our name -> what data sets call it; a dot reaches into a struct
    "image": ("images", "image", "img", "decoded_image"),
    "video": ("videos", "video"),
    "problem": ("problem", "question", "query", "prompt", "messages", "conversations"),
    "answer": ("answer", "solution", "ground_truth", "label", "reward_model.ground_truth"),
    "choices": ("choices", "options"),
    "type": ("type",),
    "source": ("data_source",),
}
NEEDED = ("problem", "answer")
SUFFIXES = (".parquet", ".jsonl")

Column = pa.ChunkedArray | list


@dataclass(frozen=True)
class Table:
    """The rows of one file, by our names for its columns."""

    file: Path
    name: str  # what errors and sources call it
    rows: int
    columns: dict[str, dict[str, Column]]  # our name -> its columns, by the file's names for them
    unnamed: list[str]  # columns that hold files' bytes and that nothing names

    def __len__(self) -> int:
        return self.rows

    def values(self, row: int) -> dict[str, list]:
        """Our names -> the values of their columns in this row, empty cells left out.

        Raises ValueError, naming the column, for text that is not UTF-8.
        """
        values = {}
        for ours, columns in self.columns.items():
            cells = [_cell(name, column, row) for name, column in columns.items()]
            values[ours] = [cell for cell in cells if not is_empty(cell)]
        return values

    def count(self, ours: str) -> int:
        """How many images or videos the file holds, in lists or alone, without reading them."""
        return sum(map(_count, self.columns.get(ours, {}).values()))

    def taken(self) -> str:
        """Which columns are taken for what, to print."""
        joined = [f"{ours}={'+'.join(names)}" for ours, names in self.columns.items() if names]
        return ",".join(joined)


def _cell(name: str, column: Column, row: int) -> Any:
    value = column[row]
    if not isinstance(value, pa.Scalar):
        return value
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"column {name!r} holds text that is not UTF-8 ({error}); convert it"
        ) from error


def is_empty(value: Any) -> bool:
    """Nothing at all: null, NaN (pandas' null), an empty text or list."""
    return value is None or value != value or value in ("", [])


def _count(column: Column) -> int:
    if isinstance(column, pa.ChunkedArray):
        if "list" in str(column.type).partition("<")[0]:
            return pc.sum(pc.list_value_length(column)).as_py() or 0
        return len(column) - column.null_count
    held = [cell for cell in column if not is_empty(cell)]
    return sum(len(cell) if isinstance(cell, list) else 1 for cell in held)


# --------------------------------------------------------------------------------------------------
# Columns


def parse_columns(text: str) -> dict[str, list[str]]:
    """`image=image_1+image_2,answer=solution` -> {"image": ["image_1", "image_2"], ...}.

    Nothing behind the `=` leaves that out even where a usual name is there. Raises ValueError for
    what is written otherwise, naming it.
    """
    named = {}
    for part in filter(None, text.split(",")):
        ours, equals, theirs = part.partition("=")
        ours = ours.strip()
        if not equals or ours not in USUAL or ours in named:
            raise ValueError(
                f"--columns {part!r}: write each of {', '.join(USUAL)} at most once, as in "
                "image=pictures,answer=solution"
            )
        named[ours] = [name.strip() for name in theirs.split("+") if name.strip()]
    return named


def name_columns(
    file: Path, present: Collection[str], named: dict[str, list[str]]
) -> dict[str, list[str]]:
    """Our name -> the columns that are taken for it: those named, or the one of a usual name.

    Args:
        present: names of the file's columns, dotted ones for the fields of structs.
        named: by `parse_columns`.

    Raises ValueError for a column that is not there, and where two usual names are there.
    """
    chosen = {}
    for ours, usual in USUAL.items():
        chosen[ours] = named.get(ours, [name for name in usual if name in present])
        missing = [name for name in chosen[ours] if name not in present]
        if missing:
            raise ValueError(
                f"{file}: no column {missing[0]!r} for {ours} among {sorted(present)}; correct "
                "--columns"
            )
    several = [ours for ours, names in chosen.items() if len(names) > 1 and ours not in named]
    if several:
        what = " and ".join(f"the {ours} ({', '.join(chosen[ours])})" for ours in several)
        flag = ",".join(f"{ours}={chosen[ours][0]}" for ours in several)
        raise ValueError(
            f"{file}: more than one column may be {what}; choose, as in --columns {flag}"
        )
    for ours in NEEDED:
        if not chosen[ours]:
            chats = sorted({"messages", "conversations"} & set(present))
            hint = f" (the last turn of a chat: {ours}={chats[0]})" if chats else ""
            raise ValueError(
                f"{file}: no column for the {ours} among {sorted(present)}; name it with "
                f"--columns {ours}=NAME{hint}"
            )
    return chosen


# --------------------------------------------------------------------------------------------------
# Files


def find_files(path: str, split: str) -> dict[Path, str]:
    """The files of a split, and what to call them: their names, with folders where two have one.

    Args:
        path: a file, a folder, a glob, or a data set of the hub.
        split: of a folder or a hub data set the files are taken whose path says it, after one of
            `/ _ - .` and in any case; `validation`, `val` and `dev` are one. The only file of a
            folder may be named after no split.

    Raises ValueError for no such file, and where the split cannot be told.
    """
    folder = Path(path).expanduser()
    if folder.is_file():
        return {folder: folder.name}
    if "*" in path:
        matches = sorted(map(Path, glob.glob(str(folder), recursive=True)))
        if not matches:
            raise ValueError(f"{path}: no file matches; correct the pattern")
        folder = Path(os.path.commonpath([file.parent for file in matches]))
        return _short_names(folder, matches, matches)
    if folder.suffix in SUFFIXES and not folder.is_dir():
        raise ValueError(f"{path}: no such file; correct the path")
    if not folder.is_dir():
        folder = _download(path)
    below = sorted(file for file in folder.rglob("*") if file.is_file())
    files = [file for file in below if file.suffix in SUFFIXES]
    names = [file.relative_to(folder).as_posix() for file in files]
    told = [_split_of(name, split) for name in names]
    asked = _one_validation(split.lower())
    chosen = [file for file, its in zip(files, told, strict=True) if its == asked]
    if told == [""]:
        chosen = files
    if not chosen:
        raise ValueError(
            f"{path}: no parquet or jsonl file of split {split!r} among {names}; name another "
            "split, one file, or a glob such as 'folder/*.parquet'"
        )
    return _short_names(folder, files, chosen)


def _short_names(folder: Path, files: list[Path], chosen: list[Path]) -> dict[Path, str]:
    """File names; below `folder` with their folders, where several of `files` have the same."""
    times = Counter(file.name for file in files)
    return {
        file: file.name if times[file.name] == 1 else file.relative_to(folder).as_posix()
        for file in chosen
    }


def _split_of(name: str, asked: str) -> str:
    """The split that a path names last, in lower case; "" for none. `test` is not in testmini."""
    known = {asked.lower(), "train", "validation", "val", "dev", "test"}
    words = "|".join(map(re.escape, known))
    found = re.findall(rf"(?:^|[/_.-])({words})(?![a-z])", name.lower())
    return _one_validation(found[-1]) if found else ""


def _one_validation(word: str) -> str:
    return "validation" if word in ("val", "dev") else word


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download  # only a data set of the hub needs it

    patterns = [f"*{suffix}" for suffix in SUFFIXES]
    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name}: no such file or folder, and not to be had from the hub: {error}"
        ) from error


def open_table(file: Path, name: str, named: dict[str, list[str]]) -> Table:
    """The file's rows under our names; its images stay as they are stored.

    `name` is what errors call it, `named` is of `parse_columns`. Raises ValueError, naming the
    file, for a broken one and as `name_columns`.
    """
    if file.suffix in (".json", ".jsonl"):
        return _open_json(file, name, named)
    return _open_parquet(file, name, named)


def _open_parquet(file: Path, name: str, named: dict[str, list[str]]) -> Table:
    try:
        schema = pq.read_schema(file)
        _refuse_twins(file, schema.names)
        paths = dict(_struct_paths(schema))
        chosen = name_columns(file, paths, named)
        tops = {paths[theirs][0] for theirs in itertools.chain(*chosen.values())}
        table = pq.read_table(file, columns=sorted(tops), partitioning=None)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(
            f"{file} is not a whole parquet file ({error}); convert it, or download it again"
        ) from error
    columns = {}
    for ours, names in chosen.items():
        columns[ours] = {theirs: _column(table, paths[theirs]) for theirs in names}
    unnamed = [f.name for f in schema if f.name not in tops and _holds_files(f.type)]
    return Table(file, name, table.num_rows, columns, unnamed)


def _refuse_twins(file: Path, names: list[str]) -> None:
    twins = [name for name, times in Counter(names).items() if times > 1]
    if twins:
        raise ValueError(f"{file}: the column {twins[0]!r} is there twice; rename one of them")


def _struct_paths(fields: Iterable[pa.Field], above: tuple = ()) -> list[tuple[str, tuple]]:
    """Dotted name and path of every column, and of every field of those that are structs."""
    paths = []
    for field in fields:
        path = (*above, field.name)
        paths.append((".".join(path), path))
        if pa.types.is_struct(field.type):
            paths += _struct_paths(field.type, path)
    return paths


def _column(table: pa.Table, path: tuple[str, ...]) -> pa.ChunkedArray:
    top, *fields = path
    column = table[top]
    return pc.struct_field(column, fields) if fields else column


def _holds_files(kind: pa.DataType) -> bool:
    """Whether it is how data sets store images: a struct with bytes, or a list of them."""
    kind = getattr(kind, "value_type", kind)
    return pa.types.is_struct(kind) and any("binary" in str(field.type) for field in kind)


def _open_json(file: Path, name: str, named: dict[str, list[str]]) -> Table:
    rows = _read_json(file)
    paths = {}
    for row in rows:
        paths |= _dict_paths(row)
    chosen = name_columns(file, paths, named) if rows else {}
    columns = {}
    for ours, names in chosen.items():
        columns[ours] = {theirs: _reached(rows, paths[theirs]) for theirs in names}
    return Table(file, name, len(rows), columns, unnamed=[])


def _read_json(file: Path) -> list[dict]:
    """The objects of JSON lines, or of one JSON list. Arrow's reader wants one type a column, and
    takes texts that look like dates for dates."""
    raw = file.read_bytes()
    listed = raw.lstrip().startswith(b"[")
    pieces = [raw] if listed else filter(bytes.strip, raw.splitlines())
    rows = []
    for number, piece in enumerate(pieces):
        try:
            value = json.loads(piece)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} row {number} is not JSON ({error}); repair it") from error
        rows += value if listed else [value]
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(
                f"{file} row {number} is a {type(row).__name__}; a row is an object with a value "
                "for each column"
            )
    return rows


def _dict_paths(row: dict, above: tuple = ()) -> dict[str, tuple]:
    paths = {}
    for name, value in row.items():
        path = (*above, name)
        paths[".".join(path)] = path
        if isinstance(value, dict) and len(path) < 5:  # a hostile row may be a thousand deep
            paths |= _dict_paths(value, path)
    return paths


def _reached(rows: list[dict], path: tuple[str, ...]) -> list:
    """The value at a path in each row, None where it leads nowhere."""
    values = rows
    for name in path:
        values = [value.get(name) if isinstance(value, dict) else None for value in values]
    return values
