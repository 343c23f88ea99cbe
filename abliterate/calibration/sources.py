"""Prompts out of files and datasets: one text a row, with a choice of column."""

import csv
import io
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from abliterate.errors import CalibrationError

KNOWN_COLUMNS = ("instruction", "prompt", "text", "goal", "question", "behavior", "query", "request")


def read_prompts(spec: str) -> list[str]:
    """Non-empty prompts of `FILE[:column]` or `hf:dataset[:config][:split][:column]`, in their order.

    Raises:
        CalibrationError: not found, not readable, empty, or the column is not clear.
    """
    return read_rows(spec)[1]


def read_rows(spec: str) -> tuple[Sequence[Any], list[str]]:
    """The rows as they are stored, and the prompt of each; see `read_prompts`."""
    if spec.startswith("hf:"):
        rows, column = _dataset(spec)
    else:
        path, column = _file_and_column(spec)
        rows = _READERS[path.suffix.lower()](path)
    texts = _texts(rows, column, spec)
    if not texts:
        raise CalibrationError(f"{spec} holds no prompts")
    return rows, texts


def _file_and_column(spec: str) -> tuple[Path, str | None]:
    path, column = Path(spec), None
    if not path.is_file() and ":" in spec:
        name, _, column = spec.rpartition(":")
        path = Path(name)
    if not path.is_file():
        raise CalibrationError(f"no prompt file {spec}; give FILE[:column], or hf:dataset[:config][:split][:column]")
    if path.suffix.lower() not in _READERS:
        raise CalibrationError(
            f"{path}: prompts come from {', '.join(_READERS)}, not from {path.suffix or 'a bare name'}"
        )
    return path, column


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path} cannot be read as UTF-8 text: {error}") from error


def _lines(path: Path) -> list[str]:
    """Lines by line feeds alone: a text may hold U+2028 and the other characters that `str.splitlines` breaks at."""
    return _text(path).split("\n")


def _read_txt(path: Path) -> list[Any]:
    return [line for line in _lines(path) if line.strip()]


def _read_json(path: Path) -> list[Any]:
    try:
        content = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{path} is not valid JSON: {error}") from error
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        content = lists[0] if len(lists) == 1 else None
    if not isinstance(content, list):
        raise CalibrationError(f"{path} holds no list of prompts")
    return content


def _read_jsonl(path: Path) -> list[Any]:
    rows = []
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise CalibrationError(f"{path} line {number} is not valid JSON: {error}") from error
    return rows


def _read_csv(path: Path) -> list[Any]:
    try:
        rows: list[Any] = list(csv.DictReader(io.StringIO(_text(path)), strict=True))
    except csv.Error as error:
        raise CalibrationError(f"{path} is not valid CSV: {error}") from error
    for number, row in enumerate(rows, 1):
        if None in row:
            raise CalibrationError(f"{path} row {number} has more fields than the header; put texts in double quotes")
    return rows


def _read_parquet(path: Path) -> list[Any]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise CalibrationError("parquet files need pyarrow: pip install 'abliterate[parquet]'") from error
    try:
        rows: list[Any] = parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{path} is not a readable parquet file: {str(error).splitlines()[0]}") from error
    return rows


_READERS: dict[str, Callable[[Path], list[Any]]] = {
    ".txt": _read_txt,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _dataset(spec: str) -> tuple[Sequence[Any], str | None]:
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError("hf: sources need datasets: pip install 'abliterate[datasets]'") from error
    # a colon in brackets belongs to the split: train[:100]
    name, *rest = re.split(r":(?![^\[\]]*\])", spec.removeprefix("hf:"))
    if not name or len(rest) > 3:
        raise CalibrationError(f"{spec} is not of the form hf:dataset[:config][:split][:column]")
    config, split, column = [*rest, "", "", ""][:3]
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train")
    except Exception as error:
        raise CalibrationError(
            f"{spec} cannot be loaded: {(str(error).splitlines() or ['unknown error'])[0]}"
        ) from error
    return rows, column or None


def _texts(rows: Sequence[Any], column: str | None, spec: str) -> list[str]:
    texts = []
    for number, row in enumerate(rows, 1):
        value = row
        if isinstance(row, dict):
            column = column or _column(row, spec)
            if column not in row:
                raise CalibrationError(f"{spec} row {number} has no column {column}; it has {_names(row)}")
            value = row[column]
        elif column:
            raise CalibrationError(f"{spec} row {number} has no columns, so none named {column}")
        if not isinstance(value, str) or not value.strip():
            raise CalibrationError(f"{spec} row {number} is not a text, or empty")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise CalibrationError(f"{spec} row {number} holds half a surrogate pair")
        texts.append(value)
    return texts


def _column(row: dict[Any, Any], spec: str) -> str:
    names = [str(name) for name, value in row.items() if isinstance(value, str)]
    known = [name for name in names if name.lower() in KNOWN_COLUMNS]
    if len(names) == 1 or len(known) == 1:
        return (known or names)[0]
    raise CalibrationError(f"{spec} has columns {_names(row)}; say which with :column")


def _names(row: dict[Any, Any]) -> str:
    """The columns on one line."""
    return ", ".join(" ".join(str(name).split()) for name in row)
