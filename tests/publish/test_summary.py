import copy
import io
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType

from abliterate.architecture.writer import Plan, Role, Runtime, Step, TensorRole, Writer
from abliterate.evaluation.harness import Benchmark
from abliterate.evaluation.sets import Evaluation, Samples
from abliterate.publish import summary
from abliterate.publish.evidence import score_text
from abliterate.publish.figures import percent, ranges, significant, sizes, visible
from abliterate.publish.plan_view import plan_table
from abliterate.publish.summary import closing_table, compare_table, selection_table, writers_table

Manifest = dict[str, Any]
Change = Callable[[str, Any], Manifest]
GOLDEN = Path(__file__).parent / "golden"


def _text(renderable: RenderableType, **options: Any) -> str:
    file = io.StringIO()
    Console(file=file, width=80, highlight=False, markup=False, **options).print(renderable)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def _same(name: str, text: str) -> None:
    """Equal to the golden file; ABLITERATE_WRITE_GOLDEN=1 writes it anew."""
    path = GOLDEN / name
    if os.environ.get("ABLITERATE_WRITE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


@pytest.fixture
def plan() -> Plan:
    """Three layers of a model with output norms; the last has no MLP."""
    writers = [Writer("model.embed_tokens.weight", "embedding", 1, None)]
    named: list[tuple[str, Role, str]] = [("model.embed_tokens.weight", "writer", "embedding")]
    for i in range(3):
        layer = f"model.layers.{i}"
        norm = f"{layer}.post_attention_layernorm.weight"
        writers.append(Writer(f"{layer}.self_attn.o_proj.weight", "attention", 0, i, (Step("scale", norm, 1.0),)))
        if i < 2:
            writers.append(Writer(f"{layer}.mlp.down_proj.weight", "mlp", 0, i))
            named.append((f"{layer}.mlp.down_proj.weight", "writer", "MLP out"))
        named += [
            (f"{layer}.self_attn.o_proj.weight", "writer", "attention out"),
            (f"{layer}.self_attn.q_proj.weight", "reader", "reads the stream"),
            (norm, "norm", f"gain after layers.{i}.self_attn"),
        ]
    named.append(("rotary.inv_freq", "outside", "buffer"))
    roles = tuple(TensorRole(*each) for each in named)
    return Plan(
        "gemma3_text",
        "gemma3",
        1152,
        3,
        True,
        "model.embed_tokens.weight",
        "lm_head.weight",
        ("tie_word_embeddings",),
        tuple(writers),
        roles,
        Runtime("Gemma3ForCausalLM", tuple(f"model.layers.{i}" for i in range(3))),
    )


def test_golden_closing(manifest: Manifest, gemma_manifest: Manifest) -> None:
    gemma_manifest["warnings"] = ["no chat template: refusals were not measured"]
    texts = (
        _text(closing_table(manifest, "Pico-out")),
        _text(closing_table(gemma_manifest)),
        _text(writers_table(gemma_manifest["edit"]["writers"])),
    )
    _same("closing.txt", "\n".join(texts))


def test_golden_selection(manifest: Manifest) -> None:
    _same("selection.txt", _text(selection_table(manifest["selection"])))


def test_golden_plan(plan: Plan) -> None:
    whole = {tensor.name: 3_000_000 for tensor in plan.roles}
    _same("plan.txt", _text(plan_table(plan)) + "\n" + _text(plan_table(plan, whole)))


def test_plan_accounts_for_every_tensor(plan: Plan) -> None:
    lines = _text(plan_table(plan)).splitlines()
    counts = [
        int(line.split()[-1]) for line in lines if line.split() and line.split()[-1].isdigit() and ".weight" in line
    ]
    assert sum(counts) + 1 == len(plan.roles), "the buffer besides"
    assert lines[-1] == "13 tensors: 6 writers, 3 readers, 3 norms, 1 outside"
    assert "  layers 0–1" in lines
    only = replace(plan, roles=tuple(tensor for tensor in plan.roles if tensor.role == "writer"))
    assert "kept" not in _text(plan_table(only))


def test_groups_do_not_hide_differences(plan: Plan) -> None:
    """The same name with another axis or gain is a row of its own."""
    other = replace(plan.writers[1], gain=())
    text = _text(plan_table(replace(plan, writers=(plan.writers[0], other, *plan.writers[2:]))))
    assert text.count("model.layers.N.self_attn.o_proj.weight") == 2


def test_what_stands_between_a_writer_and_the_stream(plan: Plan) -> None:
    layer = "model.layers.1"
    steps = (Step("scale", f"{layer}.outer.weight", 1.0), Step("scale", f"{layer}.inner.weight"), Step("center"))
    for gain, words in (
        (steps[:1], "(1 + outer.weight)"),
        (steps[1:2], "inner.weight"),
        (steps[:2], "(1 + outer.weight) * inner.weight"),
        (steps, "(1 + outer.weight) * inner.weight, less the mean over channels"),
    ):
        text = " ".join(_text(plan_table(replace(plan, writers=(replace(plan.writers[1], gain=gain),)))).split())
        assert f"gain {words} kept" in text


def test_a_plan_says_what_is_unusual(plan: Plan) -> None:
    def said(**changes: Any) -> str:
        return " ".join(_text(plan_table(replace(plan, **changes))).split())

    plain = said()
    assert not any(word in plain for word in ("not exact", "gradients", "layer by layer", "image", "kept as they are"))
    assert "not exact: it turns" in said(inexact="it turns")
    assert "not in the table: its writers were found by gradients" in said(probed=True)
    assert "the direction is pulled back layer by layer" in said(boundaries=((), (), (), ()))
    assert "layers 0–1 only run when there is an image" in said(sometimes=(0, 1))
    odd = TensorRole("model.odd", "unknown", "not in the table")
    text = said(roles=(*plan.roles, odd))
    assert "not in the table, kept as they are: model.odd" in text and "1 unknown" in text


def test_nothing_is_wider_than_the_terminal_or_coloured_when_piped(manifest: Manifest) -> None:
    manifest["certificate"]["writers"]["worst"]["tensor"] = "model." + "x" * 200 + ".weight"
    text = _text(closing_table(manifest, "/a/" + "b" * 150))
    assert max(map(len, text.splitlines())) <= 80 and "\x1b" not in text
    assert "x" * 30 in text and text.replace("\n", "").replace(" ", "").count("b" * 150) == 1
    assert "\x1b[" in _text(closing_table(manifest), force_terminal=True, color_system="standard")


def test_failed_certificate(manifest: Manifest) -> None:
    certificate = manifest["certificate"]
    certificate.update(holds=False, exact=False, claim="does not hold: the [bold]direction[/INST] is back")
    certificate["writers"]["failed"] = [f"layer.{i}.weight" for i in range(7)]
    certificate["stream"].update(holds=False, first_failure="the input of layer 3")
    text = _text(closing_table(manifest))
    assert "certificate  does not hold\n             the [bold]direction[/INST] is back\n" in text
    assert "layer.4.weight and 2 more" in " ".join(text.split()) and "back at the input of layer 3" in " ".join(
        text.split()
    )
    certificate.update(claim="not exact: strength 0.5 leaves part")
    assert "certificate  not exact, nothing is certified\n" in _text(closing_table(manifest))


def test_relaxed_pick(change: Change) -> None:
    relaxed = change("selection.relaxed", True)
    assert "KL bound relaxed" in _text(closing_table(relaxed))
    assert "picked (KL bound relaxed)" in _text(selection_table(relaxed["selection"]))


def test_selection_is_ranked(manifest: Manifest) -> None:
    selection = copy.deepcopy(manifest["selection"])
    selection["candidates"].reverse()
    odd = {
        "position": -9,
        "layer": 1,
        "bypass": float("nan"),
        "induce": 1.0,
        "kl": 0.0,
        "prompts": 4,
        "status": "screened",
    }
    selection["candidates"].insert(70, odd)
    rows = [line.split() for line in _text(selection_table(selection, most=150)).splitlines()[2:-1]]
    assert [row[:2] for row in rows[:5]] == [["-1", "14"], ["-1", "15"], ["-1", "13"], ["-2", "13"], ["-2", "14"]]
    dropped = [float(row[2]) for row in rows if row[-2:] == ["dropped", "early"] and row[2] != "–"]
    assert dropped == sorted(dropped) and len(dropped) > 40
    assert len(rows) == 150 and rows[-1][2:] == ["–", "–", "–", "0", "layer", "too", "late"]


def test_comparison_leaves_out_what_was_not_measured(manifest: Manifest) -> None:
    base = manifest["evaluation"]["base"]
    text = _text(compare_table({"org/one": base}))
    assert "org/one" in text and "KL from the base" not in text and "by judge" not in text
    assert "98.4 % [91.7, 99.7]" in text and "3.042 [" in text and "–" not in text
    assert "64 harmful, 64 harmless and 64 look-alike prompts, answers of up to 32 tokens; loss and KL" in " ".join(
        text.split()
    )


def test_an_older_manifest_is_shown_with_counts(older_manifest: Manifest) -> None:
    older = older_manifest["evaluation"]
    text = _text(compare_table({"before": older["base"], "after": older["edited"]}))
    assert "98.4 % (63/64)" in text and "0.0413\n" in text and "[" not in text and "look-alike" not in text


@dataclass(frozen=True)
class _Report:
    name: str
    evaluation: Evaluation
    baseline_name: str | None = None
    baseline: Evaluation | None = None
    benchmarks: tuple[Benchmark, ...] = ()
    baseline_benchmarks: tuple[Benchmark, ...] = ()


def test_printing(manifest: Manifest, plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    evaluation = Evaluation(**manifest["evaluation"]["base"])
    assert evaluation.samples == Samples(), "a manifest has no samples"
    summary.print_conversion(manifest, "Pico-out")
    assert "written      Pico-out" in capsys.readouterr().out
    summary.print_selection(manifest["selection"])
    assert "picked" in capsys.readouterr().out
    summary.print_plan(plan)
    assert "13 tensors" in capsys.readouterr().out
    summary.print_certificate(manifest["certificate"], ["a.safetensors"], True)
    assert "not those of the manifest: a.safetensors" in capsys.readouterr().out
    summary.print_certificate(manifest["certificate"], [], False)
    assert "no manifest to compare with" in capsys.readouterr().out
    summary.print_certificate(manifest["certificate"], [], True, False)
    shown = " ".join(capsys.readouterr().out.split())
    assert "weights not compared: their hashes were left out (--no-hash)" in shown
    summary.print_evaluation(_Report("out", evaluation))
    assert capsys.readouterr().out.split("\n")[0].split() == ["out"]
    summary.print_evaluation(_Report("same", evaluation, "same", evaluation))
    assert capsys.readouterr().out.split("\n")[0].split() == ["same", "(baseline)", "same"]
    scores = (Benchmark("arc", "acc", 0.25, 0.05, 75), Benchmark("mmlu", "acc", 0.5, None, None))
    summary.print_evaluation(_Report("out", evaluation, "base", evaluation, scores, scores[:1]))
    told = capsys.readouterr().out.splitlines()
    assert next(line for line in told if "arc" in line).split() == ["arc,", "acc", *["0.250", "[0.152,", "0.348]"] * 2]
    assert score_text(Benchmark("arc", "acc", 0.25, 0.16, 8)) == "0.250 [0.0715, 0.591]", "never above 1"
    assert score_text(Benchmark("arc", "perplexity", 12.0, 1.0, 8)) == "12.000 [10.040, 13.960]"
    assert next(line for line in told if "mmlu" in line).split() == ["mmlu,", "acc", "–", "0.500"]


def test_figures() -> None:
    values = [0, 0.0413, 12.34, 6.9e-6, 123456, 1e9, -4.499, 0.00012345, 9.999, None, float("nan"), float("inf")]
    texts = ["0", "0.0413", "12.3", "6.90e-6", "123456", "1.00e9", "-4.50", "1.23e-4", "10.0", "–", "–", "–"]
    assert [significant(value) for value in values] == texts
    assert [percent(r) for r in (0, 1, 0.984375, 0.9996, 0.0001, None)] == [
        "0 %",
        "100 %",
        "98.4 %",
        "99.96 %",
        "0.01 %",
        "–",
    ]
    assert percent(0.984375, 64) == "98.4 % (63/64)"
    assert ranges([3, 1, 2, 7, 9, 8, 5]) == "1–3, 5, 7–9" and ranges([]) == ""
    assert sizes(0) == "0 B" and sizes(269060552) == "257 MiB" and sizes(1023 * 2**30) == "0.999 TiB"
    assert visible("\n\u200b a") == "'\\n\\u200b a'" and visible("\udce2") == "'\\udce2'"
