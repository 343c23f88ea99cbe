from pathlib import Path

from abliterate.calibration.categories import categories_of
from abliterate.calibration.prompts import builtin


def test_every_builtin_prompt_has_a_category() -> None:
    for kind in ("harmful", "harmless"):
        known = categories_of(kind, "builtin")
        assert set(builtin(kind).all) == set(known)  # type: ignore[arg-type]
        assert 5 < len(set(known.values())) < 40


def test_of_files(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt,category\n" Do this ",one\nDo that,\nAnd so on,two\n')
    assert categories_of("harmful", f"{tmp_path / 'a.csv'}:prompt") == {"Do this": "one", "And so on": "two"}
    (tmp_path / "b.txt").write_text("Do this\nDo that\n")
    assert categories_of("harmful", str(tmp_path / "b.txt")) == {}
    (tmp_path / "c.jsonl").write_text('{"instruction": "x", "category": 3}\n{"instruction": "y", "category": "k"}\n')
    assert categories_of("harmful", str(tmp_path / "c.jsonl")) == {"y": "k"}
