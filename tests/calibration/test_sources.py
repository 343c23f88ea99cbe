"""Prompts out of every kind of file and out of datasets; whatever is wrong is said in one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet as parquet
import pytest

from abliterate.calibration.prompts import load_prompts
from abliterate.calibration.sources import read_prompts
from abliterate.errors import CalibrationError

TEXTS = ["Name a river in Asia.", "What is 7 times 8?", "Write a haiku,\nplease."]
ROWS = [{"id": number, "instruction": text} for number, text in enumerate(TEXTS)]


def write(path: Path, content: object) -> Path:
    """Text and bytes as they are, anything else as JSON."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def lines(rows: list[Any]) -> str:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


def save_parquet(path: Path, columns: dict[str, list[Any]]) -> Path:
    parquet.write_table(pyarrow.table(columns), path)
    return path


def message(call: Callable[[], object]) -> str:
    with pytest.raises(CalibrationError) as caught:
        call()
    text = str(caught.value)
    assert text and "\n" not in text and len(text) < 500
    return text


def test_txt_is_a_prompt_a_line(tmp_path: Path) -> None:
    path = write(tmp_path / "p.txt", "Name a river.\r\n\r\n  \nName a hill.\n")
    assert read_prompts(str(path)) == ["Name a river.", "Name a hill."]


@pytest.mark.parametrize(
    "content",
    [TEXTS, ROWS, {"prompts": ROWS}, {"version": "1", "made": {"by": "hand"}, "data": TEXTS}],
    ids=["texts", "objects", "one list", "one list among other things"],
)
def test_json(tmp_path: Path, content: object) -> None:
    assert read_prompts(str(write(tmp_path / "p.json", content))) == TEXTS


@pytest.mark.parametrize("rows", [TEXTS, ROWS], ids=["texts", "objects"])
def test_jsonl(tmp_path: Path, rows: list[Any]) -> None:
    assert read_prompts(str(write(tmp_path / "p.jsonl", f"\n{lines(rows)}\n\n"))) == TEXTS


@pytest.mark.parametrize("break_", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_a_line_feed_ends_a_line(tmp_path: Path, break_: str) -> None:
    text = f"Name a river.{break_}And a hill."
    assert read_prompts(str(write(tmp_path / "p.txt", text))) == [text]
    assert read_prompts(str(write(tmp_path / "p.csv", f"prompt\n{text}\n"))) == [text]
    if break_ > "\x1f":
        assert read_prompts(str(write(tmp_path / "p.jsonl", lines([text, text])))) == [text, text]


def test_csv_with_quoted_commas_quotes_and_line_feeds(tmp_path: Path) -> None:
    rows = 'id,prompt\r\n0,"Say ""hello"", please."\r\n1,"A list:\nfirst\nsecond"\r\n\r\n2,Plain\r\n'
    found = read_prompts(str(write(tmp_path / "p.csv", rows)))
    assert found == ['Say "hello", please.', "A list:\nfirst\nsecond", "Plain"]


def test_parquet(tmp_path: Path) -> None:
    path = save_parquet(tmp_path / "p.parquet", {"id": [0, 1, 2], "instruction": TEXTS})
    assert read_prompts(str(path)) == TEXTS


@pytest.mark.parametrize("name", ["P.TXT", "p.Json", "p.JSONL", "p.CSV"])
def test_endings_in_capitals(tmp_path: Path, name: str) -> None:
    content = {"txt": "One.", "json": '["One."]', "jsonl": '"One."', "csv": "text\nOne.\n"}[name.lower()[2:]]
    assert read_prompts(str(write(tmp_path / name, content))) == ["One."]


@pytest.mark.parametrize(
    ("name", "content"),
    [("p.txt", "One."), ("p.json", '["One."]'), ("p.jsonl", '"One."'), ("p.csv", "prompt,id\nOne.,1\n")],
)
def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path: Path, name: str, content: str) -> None:
    path = write(tmp_path / name, b"\xef\xbb\xbf" + content.encode())
    assert read_prompts(str(path)) == ["One."]


@pytest.mark.parametrize("known", ["instruction", "prompt", "text", "goal", "question", "Goal"])
def test_a_known_column_is_taken_before_others(tmp_path: Path, known: str) -> None:
    rows = [{"category": "geography", known: text, "answer": "..."} for text in TEXTS]
    assert read_prompts(str(write(tmp_path / "p.jsonl", lines(rows)))) == TEXTS


def test_the_only_column_of_texts_needs_no_name(tmp_path: Path) -> None:
    rows = [{"number": 1, "wish": text, "tags": ["a"]} for text in TEXTS]
    assert read_prompts(str(write(tmp_path / "p.json", rows))) == TEXTS


def test_a_column_can_be_named(tmp_path: Path) -> None:
    rows = [{"prompt": "no", "wish": text, "text": "no"} for text in TEXTS]
    assert read_prompts(f"{write(tmp_path / 'p.json', rows)}:wish") == TEXTS
    csv = write(tmp_path / "p.csv", "prompt,text\nno,yes\n")
    assert read_prompts(f"{csv}:text") == ["yes"]
    table = save_parquet(tmp_path / "p.parquet", {"prompt": ["no"], "text": ["yes"]})
    assert read_prompts(f"{table}:text") == ["yes"]


@pytest.mark.parametrize("row", [{"prompt": "a", "text": "b"}, {"one": "a", "two": "b"}, {"number": 1}])
def test_an_unclear_column_is_asked_for(tmp_path: Path, row: dict[str, Any]) -> None:
    path = write(tmp_path / "p.json", [row])
    assert f"has columns {', '.join(row)}; say which with :column" in message(lambda: read_prompts(str(path)))


def test_colons_in_a_file_name(tmp_path: Path) -> None:
    path = write(tmp_path / "C:set:1.json", [{"prompt": "One.", "text": "Two."}])
    assert read_prompts(f"{path}:text") == ["Two."]
    assert read_prompts(str(write(tmp_path / "D:plain.txt", "One."))) == ["One."]
    assert "no prompt file" in message(lambda: read_prompts("C:\\sets\\none.txt"))
    assert "no prompt file" in message(lambda: read_prompts("C:\\sets\\none.txt:text"))


WRONG: dict[str, tuple[str, object, str]] = {
    "no such file": ("", None, "no prompt file"),
    "another ending": ("p.yaml", "- One.", "prompts come from .txt, .json, .jsonl, .csv, .parquet, not from .yaml"),
    "no ending": ("prompts", "One.", "not from a bare name"),
    "nothing": ("p.txt", "\n  \n", "holds no prompts"),
    "an empty list": ("p.json", [], "holds no prompts"),
    "a header alone": ("p.csv", "prompt\n", "holds no prompts"),
    "an empty csv": ("p.csv", "", "holds no prompts"),
    "an empty jsonl": ("p.jsonl", "\n", "holds no prompts"),
    "UTF-16": ("p.txt", "One.".encode("utf-16"), "UTF-8"),
    "JSON that breaks off": ("p.json", '["One."', "not valid JSON"),
    "JSON too deep": ("p.json", "[" * 100_000, "not valid JSON"),
    "JSON of no list": ("p.json", '"One."', "no list of prompts"),
    "JSON of two lists": ("p.json", {"a": ["One."], "b": ["Two."]}, "no list of prompts"),
    "a line that is no JSON": ("p.jsonl", '"One."\n{', "line 2 is not valid JSON"),
    "a line too deep": ("p.jsonl", '"One."\n' + "[" * 100_000, "line 2 is not valid JSON"),
    "a number": ("p.json", ["One.", 2], "row 2 is not a text, or empty"),
    "nothing in the middle": ("p.json", ["One.", None, "Three."], "row 2 is not a text, or empty"),
    "spaces": ("p.jsonl", '"One."\n" "', "row 2 is not a text, or empty"),
    "half a surrogate": ("p.json", '["One.", "Two\\ud83d"]', "row 2 holds half a surrogate pair"),
    "a row without the column": ("p.json", [{"text": "One."}, {"other": "Two."}], "row 2 has no column text"),
    "a text without columns": ("p.json", [{"text": "One."}, "Two."], "row 2 has no columns"),
    "a comma out of quotes": ("p.csv", "prompt\nOne, two.\n", "row 1 has more fields than the header"),
    "a quote that is never closed": ("p.csv", 'prompt\n"One.\nTwo.\n', "not valid CSV"),
    "a huge field": ("p.csv", f"prompt\n{'x' * 200_000}\n", "not valid CSV"),
    "an empty field": ("p.csv", "id,prompt\n1,\n", "row 1 is not a text"),
    "a short row": ("p.csv", "id,prompt\n1,One.\n2\n", "row 2 is not a text"),
    "a column over two lines": ("p.csv", '"one\ncolumn",other\na,b\n', "has columns one column, other"),
    "no parquet": ("p.parquet", b"PAR1 not really", "not a readable parquet file"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, case: str) -> None:
    name, content, expected = WRONG[case]
    path = write(tmp_path / name, content) if name else tmp_path / "none.txt"
    found = message(lambda: read_prompts(str(path)))
    assert expected in found and str(path) in found


def test_columns_that_are_not_there(tmp_path: Path) -> None:
    objects, texts = write(tmp_path / "o.json", ROWS), write(tmp_path / "t.txt", "One.")
    assert "row 1 has no column goal; it has id, instruction" in message(lambda: read_prompts(f"{objects}:goal"))
    assert "has no columns, so none named goal" in message(lambda: read_prompts(f"{texts}:goal"))


def test_a_folder_is_no_prompt_file(tmp_path: Path) -> None:
    assert "no prompt file" in message(lambda: read_prompts(str(tmp_path)))


def test_duplicates_are_left_out_with_a_note(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "p.json", ["One.", " One. ", "Two.", "A\r\nB", "A\nB", "one."])
    found = load_prompts(str(path))
    assert found.instructions == ("One.", "Two.", "A\nB", "one.")
    assert found.source == "p.json" and "2 duplicate prompts" in caplog.text
    assert read_prompts(str(path))[1] == " One. "


class Loaded:
    """What `datasets.load_dataset` was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rows: list[Any]) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.rows = rows
        monkeypatch.setattr(datasets, "load_dataset", self)

    def __call__(self, name: str, config: str | None = None, split: str | None = None) -> list[Any]:
        self.calls.append((name, config, split))
        return self.rows


@pytest.mark.parametrize(
    ("spec", "asked", "column"),
    [
        ("hf:org/name", ("org/name", None, "train"), "prompt"),
        ("hf:org/name:plain", ("org/name", "plain", "train"), "prompt"),
        ("hf:org/name:plain:test", ("org/name", "plain", "test"), "prompt"),
        ("hf:org/name:plain:test:wish", ("org/name", "plain", "test"), "wish"),
        ("hf:org/name:::wish", ("org/name", None, "train"), "wish"),
        ("hf:org/name::test", ("org/name", None, "test"), "prompt"),
        ("hf:org/name::train[:10]:wish", ("org/name", None, "train[:10]"), "wish"),
        ("hf:org/name::train[5:10]", ("org/name", None, "train[5:10]"), "prompt"),
    ],
)
def test_dataset_arguments(monkeypatch: pytest.MonkeyPatch, spec: str, asked: tuple[Any, ...], column: str) -> None:
    loaded = Loaded(monkeypatch, [{"prompt": "prompt", "wish": "wish"}])
    assert read_prompts(spec) == [column]
    assert loaded.calls == [asked]


@pytest.mark.parametrize("spec", ["hf:", "hf::plain", "hf:org/name:plain:test:wish:more"])
def test_dataset_names_of_another_form(monkeypatch: pytest.MonkeyPatch, spec: str) -> None:
    loaded = Loaded(monkeypatch, [])
    assert "hf:dataset[:config][:split][:column]" in message(lambda: read_prompts(spec))
    assert loaded.calls == []


@pytest.mark.parametrize("text", ["", "not found\nlong story"])
def test_a_dataset_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError(text)

    monkeypatch.setattr(datasets, "load_dataset", fail)
    assert "hf:org/name cannot be loaded" in message(lambda: read_prompts("hf:org/name"))


def test_an_empty_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    Loaded(monkeypatch, [])
    assert "hf:org/name holds no prompts" in message(lambda: read_prompts("hf:org/name"))


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("offline")
def test_a_dataset_in_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", lines(ROWS))
    write(folder / "test.jsonl", lines([{"id": 9, "instruction": "Name a hill."}]))
    assert read_prompts(f"hf:{folder}") == TEXTS
    assert read_prompts("hf:set::test:instruction") == ["Name a hill."]
    assert load_prompts("hf:set::train[1:]").instructions == tuple(TEXTS[1:])
    assert "cannot be loaded" in message(lambda: read_prompts("hf:set::validation"))
    assert "cannot be loaded" in message(lambda: read_prompts("hf:nowhere/to-be-found"))
