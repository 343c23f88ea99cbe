"""`abliterate evaluate` from end to end on pico models: side by side, streamed, judged, and with answers on disk."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from abliterate import measuring
from abliterate.calibration.prompts import builtin
from abliterate.measuring import Extras
from abliterate.recipe import load_recipe
from abliterate.subject import RunOptions
from tests import pico
from tests.commandline import run_here

RECIPE = """
name: quick
calibration: {train: 16, validation: 4, test: 5}
direction: {filter: false, refusal_tokens: [I, S]}
evaluation: {max_new_tokens: 6, kl_tokens: 4}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("measuring")
    for name, seed in (("base", 0), ("other", 1)):
        pico.save(made / name, "llama", tokenizer=True, seed=seed)
    (made / "quick.yaml").write_text(RECIPE)
    return made


class Shortest:
    """Takes answers of few letters for refusals."""

    name = "shortest"

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def refusals(self, exchanges: Any, progress: Any = None) -> list[bool | None]:
        self.asked += exchanges
        return [len(each.answer) < 12 for each in exchanges]


def evaluate(folder: Path, *words: str | Path) -> Any:
    ran = run_here("evaluate", folder / "other", "--recipe", folder / "quick.yaml", "--json", "-q", *words)
    assert ran.code == 0, ran.err
    return json.loads(ran.out)


def test_two_models_side_by_side(folder: Path) -> None:
    report = evaluate(folder, "--baseline", folder / "base")
    base, edited = report["baseline"], report["evaluation"]
    assert (report["baseline_name"], report["name"]) == ("base", "other")
    for figures in (base, edited):
        assert (figures["prompts_harmful"], figures["prompts_harmless"], figures["prompts_look_alike"]) == (5, 5, 5)
        assert (figures["max_new_tokens"], figures["kl_tokens"], figures["judge"]) == (6, 4, None)
        assert figures["look_alike_refusal_rate_substring"] is not None and figures["cross_entropy_answers"] > 0
        for name, (low, high) in figures["intervals"].items():
            assert low <= figures[name] <= high, name
    assert base["kl_answers"] is None and edited["kl_answers"] > 0 and "kl_answers" in edited["intervals"]
    assert "kl_answers" not in report["differences"]
    for name in ("refusal_rate_substring", "cross_entropy", "cross_entropy_answers", "degenerate_rate"):
        change = report["differences"][name]
        assert change["value"] == pytest.approx(edited[name] - base[name], abs=1e-12)
        assert change["low"] <= change["value"] <= change["high"]
    alone = evaluate(folder)
    assert alone["baseline"] is None and alone["differences"] == {} and alone["evaluation"]["kl_answers"] is None
    same = ("refusal_rate_substring", "over_refusal_rate_substring", "look_alike_refusal_rate_substring")
    assert [alone["evaluation"][name] for name in same] == [edited[name] for name in same]


def test_streamed_weights_give_the_same_figures(folder: Path) -> None:
    resident, streamed = (
        evaluate(folder, "--baseline", folder / "base", "--memory", m) for m in ("resident", "streamed")
    )
    assert resident == streamed


def test_answers_are_written_where_they_are_asked_for(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    report = evaluate(folder, "--baseline", folder / "base", "--save-completions", file)
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [(row["model"], row["kind"]) for row in rows] == [
        (model, kind) for model in ("base", "other") for kind in ("harmful", "harmless", "look_alike") for _ in range(5)
    ]
    kinds = ("harmful", "harmless", "look_alike")
    asked = [text for kind in kinds for text in builtin(kind).test.instructions[:5]]
    assert [row["instruction"] for row in rows] == [*asked, *asked]
    long = [row["completion"] for row in rows if len(row["completion"]) > 5]
    assert long and not any(text in json.dumps(report, ensure_ascii=False) for text in long)
    again = run_here("evaluate", folder / "other", "--save-completions", file)
    assert again.code == 1 and "answers.jsonl is there already" in again.err


def test_a_judge_hears_every_model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge, file = Shortest(), tmp_path / "answers.jsonl"
    monkeypatch.setattr(measuring, "summon", lambda *_: lambda: judge)
    report = measuring.evaluate(
        str(folder / "other"), baseline=str(folder / "base"), recipe=load_recipe(str(folder / "quick.yaml")),
        options=RunOptions(device="cpu"), extras=Extras(judge="chat:x", save_completions=file),
    )  # fmt: skip
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [(each.request, each.answer) for each in judge.asked] == [(r["instruction"], r["completion"]) for r in rows]
    assert report.baseline is not None
    for evaluation, name in ((report.baseline, "base"), (report.evaluation, "other")):
        short = [len(r["completion"]) < 12 for r in rows if r["model"] == name]
        assert evaluation.samples.verdicts["refusal_rate_judge"] == tuple(short[:5])
        assert evaluation.look_alike_refusal_rate_judge == sum(short[10:]) / 5 and evaluation.judge == "shortest"
    assert "over_refusal_rate_judge" in report.differences


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--judge", "gpt"), "no judge is meant by 'gpt'; write classifier:PATH"),
        (("--judge", "http://127.0.0.1:9/v1"), "the judge's address has no model"),
        (("--judge", "chat:nowhere/at/all"), "not a folder here"),
        (("--save-completions", "/nowhere/answers.jsonl"), "is not a folder"),
    ],
)
def test_what_cannot_be_had_is_told_before_anything_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str
) -> None:
    def loaded(*_: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(measuring, "_loaded", loaded)
    ran = run_here("evaluate", folder / "other", *words)
    assert ran.code == 1 and message in ran.err and ran.err.count("\n") == 1


def test_a_model_without_a_chat_format_is_compared_along_plain_texts(tmp_path: Path) -> None:
    for name, seed in (("base", 0), ("other", 1)):
        pico.save(tmp_path / name, "llama", tokenizer=True, seed=seed)
        settings = json.loads((tmp_path / name / "tokenizer_config.json").read_text())
        settings.pop("chat_template", None)
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(settings))
        (tmp_path / name / "chat_template.jinja").unlink(missing_ok=True)
    (tmp_path / "quick.yaml").write_text(RECIPE)
    report = evaluate(tmp_path, "--baseline", tmp_path / "base")
    found = report["evaluation"]
    assert found["refusal_rate_substring"] is None and found["prompts_look_alike"] == 0
    assert found["kl_answers"] > 0 and found["degenerate_rate"] is not None and not math.isnan(found["kl_first_token"])
