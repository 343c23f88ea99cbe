"""`abliterate audit` on pico models, which "refuse" with one of half of all tokens: files, resumption, errors."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from abliterate import auditing
from abliterate.audit import study as studying
from abliterate.audit.study import AuditSize
from abliterate.auditing import audit_model
from abliterate.errors import CalibrationError, OutputError
from abliterate.publish.audit_charts import audit_charts
from abliterate.subject import RunOptions
from tests import pico
from tests.commandline import names, run_here
from tests.publish.made_charts import Reader

WORDS = [chr(code) for code in range(40, 100)]
RECIPE = f"""
name: few
calibration: {{train: 16, validation: 6, test: 1}}
direction: {{filter: false, refusal_tokens: {json.dumps(WORDS)}, positions: 2}}
selection: {{max_kl: 1000000, min_induce: -1000000}}
"""
PLOTS = ("directions", "layers", "map", "similarity", "strength", "windows")
FEW = AuditSize(prompts=2, directions=3)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("audited")
    pico.save(folder / "base", "llama", tokenizer=True, shards=2)
    (folder / "few.yaml").write_text(RECIPE)
    return folder


def audited(place: Path, out: Path, **changes: Any) -> auditing.AuditReport:
    return audit_model(str(place / "base"), out, recipe=str(place / "few.yaml"), **{"size": FEW} | changes)


@pytest.fixture(scope="module")
def report(place: Path) -> auditing.AuditReport:
    return audited(place, place / "report")


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """No charts are drawn, which take most of the time; that they are the same is tested where they are made."""
    monkeypatch.setattr(auditing, "audit_plots", lambda _: {})
    monkeypatch.setattr(auditing, "audit_page", lambda _: "<p>")


def same(folder: Path, report: auditing.AuditReport) -> bool:
    return (folder / "audit.json").read_bytes() == (report.folder / "audit.json").read_bytes()


def test_the_folder_holds_the_report_and_nothing_else(place: Path, report: auditing.AuditReport) -> None:
    plots = {f"{name}.png" for name in (*PLOTS, *(["categories"] if report.record["categories"] else []))}
    assert set(names(report.folder)) == {"audit.json", "audit.html"} | plots
    assert json.loads((report.folder / "audit.json").read_text()) == report.record
    assert set(names(place)) == {"base", "few.yaml", "report"}
    page = (report.folder / "audit.html").read_text()
    assert report.record["verdict"][0] in Reader(page).text
    assert str(place) not in page and str(place) not in (report.folder / "audit.json").read_text()


def test_what_it_measured(report: auditing.AuditReport) -> None:
    record = report.record
    grid, steps = record["grid"], record["directions"]["steps"]
    assert [len(row) for row in grid["bypass"]] == [3, 3] and grid["positions"] == [-2, -1]
    assert grid["bypass"][0][0] is None, "the template's own tokens are the same in every prompt"
    assert record["base"]["prompts"] == 6 and record["base"]["refusal_rate"] > 0 and record["base"]["kl"] == 0
    assert [step["directions"] for step in steps] == [1, 2, 3]
    assert (steps[0]["position"], steps[0]["layer"]) == (record["pick"]["position"], record["pick"]["layer"])
    whole = record["strengths"]["doses"][-1]
    assert whole["strength"] == 1 and whole["score"] == pytest.approx(steps[0]["score"], abs=1e-4)
    assert whole["kl"] == pytest.approx(steps[0]["kl"], abs=1e-4)
    assert {(w["first"], w["last"]) for w in record["windows"]["tried"]} >= {(0, 0), (1, 1), (2, 2), (0, 2)}
    assert record["windows"]["base"]["prompts"] == 2
    assert record["reproduce"] == "abliterate audit base -o OUT --recipe few.yaml --prompts 2 --directions 3"


@pytest.mark.usefixtures("plain")
def test_streamed_and_in_memory_say_the_same(place: Path, report: auditing.AuditReport, tmp_path: Path) -> None:
    options = RunOptions(memory="streamed")
    assert same(audited(place, tmp_path / "out", options=options).folder, report)


@pytest.mark.usefixtures("plain")
def test_an_interrupted_run_goes_on(
    place: Path, report: auditing.AuditReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(studying, "sweep_strengths", interrupted)
        with pytest.raises(KeyboardInterrupt):
            audited(place, tmp_path / "out")
    assert names(tmp_path) == [".out.abliterate-work"]
    monkeypatch.setattr(studying, "measure_grid", _once(studying.measure_grid))
    done = audited(place, tmp_path / "out")
    assert same(done.folder, report) and names(tmp_path) == ["out"]


def _once(measure: Any) -> Any:
    """The grid, which may be read from the stages, but not measured again."""

    def read(sheet: Any, *rest: Any) -> Any:
        sheet.measure = None
        return measure(sheet, *rest)

    return read


def test_another_audit_does_not_go_on_with_that_work(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(studying, "search_windows", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            audited(place, tmp_path / "out")
    with pytest.raises(OutputError, match="unfinished work of another run"):
        audited(place, tmp_path / "out", size=AuditSize(1, 1))


@pytest.mark.usefixtures("plain")
def test_only_a_report_is_replaced(place: Path, report: auditing.AuditReport, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(report.folder, out)
    (out / "audit.json").write_text("{}")
    with pytest.raises(OutputError, match="is not empty"):
        audited(place, out)
    audited(place, out, overwrite=True)
    assert same(out, report) and names(out) == ["audit.html", "audit.json"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds no checkpoint and no report"):
        audited(place, tmp_path / "mine", overwrite=True)
    with pytest.raises(OutputError, match="lies inside the checkpoint"):
        audited(place, place / "base" / "report")
    assert names(tmp_path / "mine") == ["thesis.txt"]


@pytest.mark.usefixtures("plain")
def test_own_prompts_with_and_without_categories(place: Path, tmp_path: Path) -> None:
    kinds = ("garden", "kitchen")
    lines = [{"prompt": f"Tell me how to {n} the {kinds[n % 2]}", "category": kinds[n % 2]} for n in range(23)]
    for name, drop in (("with", ()), ("without", ("category",))):
        rows = [{key: value for key, value in line.items() if key not in drop} for line in lines]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        words = ("--recipe", place / "few.yaml", "--harmful", f"{tmp_path / name}.jsonl:prompt", "--prompts", "1")
        ran = run_here("audit", place / "base", "-o", tmp_path / name, *words, "--directions", "1", "--json", "-q")
        assert ran.code == 0, ran.err
        record = json.loads(ran.out)
        assert record["folder"] == str((tmp_path / name).resolve())
        left_out = any("not every harmful prompt has a `category`" in note for note in record["notes"])
        assert left_out == bool(drop)
        if not drop:
            assert record["categories"]["names"] == ["garden", "kitchen"]
            assert "categories" in audit_charts(record)


@pytest.mark.usefixtures("plain")
def test_the_command(place: Path, tmp_path: Path) -> None:
    words = ("-o", tmp_path / "out", "--recipe", place / "few.yaml", "--prompts", "2", "--directions", "3")
    ran = run_here("audit", place / "base", *words)
    assert ran.code == 0 and "wrote " in ran.out and "the direction at position" in ran.out
    again = run_here("audit", place / "base", *words)
    assert (again.code, again.out) == (1, "") and again.err.count("\n") == 1 and "is not empty" in again.err


def test_a_model_that_does_not_refuse_ends_in_one_line(place: Path, tmp_path: Path) -> None:
    ran = run_here("audit", place / "base", "-o", tmp_path / "out")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("error: the model refused ") and ran.err.count("\n") == 1
    assert names(tmp_path) == []


def test_no_refusal_by_score_ends_in_one_line(place: Path, tmp_path: Path) -> None:
    (tmp_path / "few.yaml").write_text(RECIPE.replace(json.dumps(WORDS), '["~"]'))
    with pytest.raises(CalibrationError, match="refuses none of 6 harmful validation prompts"):
        audit_model(str(place / "base"), tmp_path / "out", recipe=str(tmp_path / "few.yaml"), size=FEW)
