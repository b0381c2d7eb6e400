"""Files of parquet or JSON lines, opened under our names for their columns.

    path, split --find_files--> files --open_table--> Table --values(row)--> {"image": [...], ...}

A column is named by the user (`image=pictures`), or found by its usual name where just one of the
usual names is there. What a cell means is data.py's business.
"""

import glob
import json
import os
import re
from collections import Counter
from collections.abc import Iterable
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

# a column, or the way to a field of a struct: ("reward_model", "ground_truth")
Place = tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """The rows of one file, by our names for its columns."""

    file: Path
    name: str  # what errors and sources call it
    rows: int
    columns: pa.Table | dict[str, list]  # by the file's names
    taken: dict[str, dict[str, Place]]  # our name -> the columns taken for it, and where they are
    unnamed: list[str]  # columns that hold files' bytes and that nothing names

    def __len__(self) -> int:
        return self.rows

    def values(self, row: int) -> dict[str, list]:
        """Our names -> the values of their columns in this row, empty cells left out.

        Raises ValueError, naming the column, for text that is not UTF-8.
        """
        return {ours: self.cells(ours, row) for ours in self.taken}

    def cells(self, ours: str, row: int) -> list:
        """What `values` holds under one of our names."""
        cells = [self._cell(place, row) for place in self.taken[ours].values()]
        return [cell for cell in cells if not is_empty(cell)]

    def _cell(self, place: Place, row: int) -> Any:
        top, *fields = place
        value = self.columns[top][row]
        if isinstance(value, pa.Scalar):
            try:
                value = value.as_py()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"column {top!r} holds text that is not UTF-8 ({error}); convert it"
                ) from error
        for field in fields:
            value = value.get(field) if isinstance(value, dict) else None
        return value

    def count(self, ours: str) -> int:
        """How many images or videos the file holds, in lists or alone. Of parquet, which holds
        their bytes, none is read."""
        if not isinstance(self.columns, pa.Table):
            return sum(len(flat(self.cells(ours, row))) for row in range(self.rows))
        held = 0
        for top, *fields in self.taken[ours].values():
            column = self.columns[top]
            if fields:
                column = pc.struct_field(column, fields)
            if "list" in str(column.type).partition("<")[0]:  # large_list, fixed_size_list, too
                held += pc.sum(pc.list_value_length(column)).as_py() or 0
            else:
                held += len(column) - column.null_count
        return held

    def __str__(self) -> str:
        """Which columns are taken for what."""
        joined = [f"{ours}={'+'.join(names)}" for ours, names in self.taken.items() if names]
        return ",".join(joined)


def is_empty(value: Any) -> bool:
    """Nothing at all: null, NaN (pandas' null), an empty text or list."""
    return value is None or value != value or value in ("", [])


def flat(cells: list) -> list:
    """The values of cells that hold one value, or a list of them."""
    values = []
    for cell in cells:
        values += cell if isinstance(cell, list) else [cell]
    return values


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
    file: Path, present: dict[str, Place], named: dict[str, list[str]]
) -> dict[str, dict[str, Place]]:
    """Our name -> the columns that are taken for it: those named, or the one of a usual name.

    Args:
        present: the file's columns, by dotted names for the fields of structs.
        named: by `parse_columns`.

    Raises ValueError for a column that is not there, and where two usual names are there.
    """
    taken = {}
    several = []
    for ours, usual in USUAL.items():
        names = named.get(ours, [name for name in usual if name in present])
        missing = [name for name in names if name not in present]
        if missing:
            raise ValueError(
                f"{file}: no column {missing[0]!r} for {ours} among {sorted(present)}; correct "
                "--columns"
            )
        if len(names) > 1 and ours not in named:
            several.append(ours)
        taken[ours] = {name: present[name] for name in names}
    if several:
        what = " and ".join(f"the {ours} ({', '.join(taken[ours])})" for ours in several)
        flag = ",".join(f"{ours}={next(iter(taken[ours]))}" for ours in several)
        raise ValueError(
            f"{file}: more than one column may be {what}; choose, as in --columns {flag}"
        )
    for ours in NEEDED:
        if not taken[ours]:
            chats = sorted({"messages", "conversations"} & set(present))
            hint = f" (the last turn of a chat: {ours}={chats[0]})" if chats else ""
            raise ValueError(
                f"{file}: no column for the {ours} among {sorted(present)}; name it with "
                f"--columns {ours}=NAME{hint}"
            )
    return taken


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
    below = sorted(folder.rglob("*"))
    files = [file for file in below if file.suffix in SUFFIXES and file.is_file()]
    names = [file.relative_to(folder).as_posix() for file in files]
    told = [_split_of(name, split) for name in names]
    asked = _one_validation(split.lower())
    chosen = [file for file, its in zip(files, told, strict=True) if its == asked]
    if told == [""]:  # a single file, of which nothing is told
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
    longest_first = sorted(known, key=len, reverse=True)  # train-clean before train
    words = "|".join(map(re.escape, longest_first))
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
        twins = [column for column, times in Counter(schema.names).items() if times > 1]
        if twins:
            raise ValueError(f"{file}: the column {twins[0]!r} is there twice; rename one of them")
        taken = name_columns(file, _places(_as_dict(schema)), named)
        tops = _tops(taken)
        table = pq.read_table(file, columns=tops, partitioning=None)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(
            f"{file} is not a whole parquet file ({error}); convert it, or download it again"
        ) from error
    unnamed = [f.name for f in schema if f.name not in tops and _holds_files(f.type)]
    return Table(file, name, table.num_rows, table, taken, unnamed)


def _open_json(file: Path, name: str, named: dict[str, list[str]]) -> Table:
    rows = read_json(file)
    present = {}
    for row in rows:
        present |= _places(row)
    taken = name_columns(file, present, named) if rows else {}
    columns = {}
    for top in _tops(taken):
        columns[top] = [row.get(top) for row in rows]
    return Table(file, name, len(rows), columns, taken, unnamed=[])


def _as_dict(fields: Iterable[pa.Field]) -> dict:
    return {f.name: _as_dict(f.type) if pa.types.is_struct(f.type) else None for f in fields}


def _places(row: dict, above: Place = ()) -> dict[str, Place]:
    """Dotted name and place of every column, and of every field of those that are structs."""
    places = {}
    for name, value in row.items():
        place = (*above, name)
        places[".".join(place)] = place
        if isinstance(value, dict) and len(place) < 5:  # a hostile row may be a thousand deep
            places |= _places(value, place)
    return places


def _tops(taken: dict[str, dict[str, Place]]) -> list[str]:
    """The columns that hold what is taken."""
    tops = set()
    for places in taken.values():
        tops |= {top for top, *_ in places.values()}
    return sorted(tops)


def _holds_files(kind: pa.DataType) -> bool:
    """Whether it is how data sets store images: a struct with bytes, or a list of them."""
    kind = getattr(kind, "value_type", kind)
    return pa.types.is_struct(kind) and any("binary" in str(field.type) for field in kind)


def read_json(file: Path) -> list[dict]:
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
