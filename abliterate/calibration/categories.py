"""What calibration prompts are about, where their source says so."""

import json
from importlib import resources

from abliterate.calibration.prompts import PARTS
from abliterate.calibration.sources import read_rows

COLUMN = "category"


def categories_of(kind: str, source: str) -> dict[str, str]:
    """The category of each instruction; empty where the source has no column `category`.

    Args:
        kind: "harmful" or "harmless", of the built-in sets.
        source: "builtin", `FILE[:column]` or `hf:dataset[:config][:split][:column]`.

    Raises:
        CalibrationError: the source cannot be read.
    """
    if source == "builtin":
        pairs = [pair for part in PARTS for pair in _builtin_pairs(f"{kind}_{part}")]
    else:
        rows, texts = read_rows(source)
        pairs = [(text, row.get(COLUMN)) for row, text in zip(rows, texts, strict=True) if isinstance(row, dict)]
    return {text.replace("\r\n", "\n").strip(): name for text, name in pairs if isinstance(name, str) and name.strip()}


def _builtin_pairs(name: str) -> list[tuple[str, str | None]]:
    path = resources.files("abliterate.calibration") / "data" / f"{name}.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [(row["instruction"], row.get(COLUMN)) for row in rows]
