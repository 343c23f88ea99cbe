"""Results on the terminal: tables that fit 80 columns, and are plain text when piped."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from abliterate.architecture.writer import Plan
from abliterate.errors import some
from abliterate.evaluation.harness import Benchmark
from abliterate.evaluation.sets import Evaluation
from abliterate.publish.candidates import SHOWN, ranked, score_names, verdict
from abliterate.publish.evidence import caption, metric_rows, score_text
from abliterate.publish.figures import MISSING, claim_of, significant, visible, writer_groups
from abliterate.publish.plan_view import Sized, note, plan_table, simple_table, tensor_sizes

Record = Mapping[str, Any]
_SHOWN_NAMES = 5


class Report(Protocol):
    """One model's evaluation, and its baseline's where there is one."""

    @property
    def name(self) -> str:
        """Of the model."""

    @property
    def evaluation(self) -> Evaluation:
        """What it does."""

    @property
    def baseline_name(self) -> str | None:
        """Of the model it is compared with."""

    @property
    def baseline(self) -> Evaluation | None:
        """What that one does."""

    @property
    def benchmarks(self) -> Sequence[Benchmark]:
        """Scores of the model."""

    @property
    def baseline_benchmarks(self) -> Sequence[Benchmark]:
        """Scores of its baseline."""


def closing_table(manifest: Record, folder: str | None = None) -> RenderableType:
    """What a conversion did: before and after, the pick, the edit, the certificate, and where the result is."""
    evaluation = manifest["evaluation"]
    parts: list[RenderableType] = []
    if evaluation is not None:
        parts += [compare_table({"before": evaluation["base"], "after": evaluation["edited"]}), Text()]
    facts = {
        "direction": _pick_line(manifest),
        "edit": _edit_line(manifest["edit"]),
        **certificate_facts(manifest["certificate"]),
    }
    if evaluation is None:
        facts["evaluation"] = Text("not measured")
    if manifest["warnings"]:
        facts["warnings"] = Text("\n".join(manifest["warnings"]), "yellow")
    if folder is not None:
        facts["written"] = Text(folder)
    return Group(*parts, fact_table(facts))


def compare_table(evaluations: Mapping[str, Record]) -> Table:
    """Metrics of one or more models side by side, by the models' names; what none was measured on is left out."""
    table = simple_table(Text(caption(list(evaluations.values())[-1]), "dim"))
    table.add_column("")
    for name in evaluations:
        table.add_column(Text(name), justify="right", overflow="fold")
    for _, label, texts in metric_rows(list(evaluations.values())):
        table.add_row(Text(label), *map(Text, texts))
    return table


def benchmark_table(scores: Mapping[str, Sequence[Benchmark]]) -> Table:
    """Scores of one or more models side by side, by the models' names, in the order of the last one's."""
    table = simple_table(Text("scores of lm-evaluation-harness, 95 % intervals", "dim"))
    table.add_column("")
    for name in scores:
        table.add_column(Text(name), justify="right", overflow="fold")
    found = [{(each.task, each.metric): score_text(each) for each in column} for column in scores.values()]
    for key in found[-1]:
        table.add_row(Text(", ".join(key)), *(Text(column.get(key, MISSING)) for column in found))
    return table


def selection_table(selection: Record, most: int = SHOWN) -> Table:
    """The best candidates, the pick first, with the filter that each of the others fails."""
    table = simple_table(Text(_searched(selection, most), "dim"))
    for name in ("position", "layer", *score_names(selection), "prompts"):
        table.add_column(name, justify="right")
    table.add_column("")
    for row in ranked(selection, most):
        scores = [significant(row[key]) for key in ("bypass", "induce", "kl")]
        cells = [str(row["position"]), str(row["layer"]), *scores, str(row["prompts"])]
        style = "bold" if row["status"] == "picked" else ""
        table.add_row(*map(Text, cells), Text(verdict(row, selection)), style=style)
    return table


def writers_table(writers: Sequence[Record]) -> Table:
    """The edited tensors, those that differ by layer alone in one row, with the largest share that is left of r."""
    table = simple_table()
    table.add_column("tensors", overflow="fold")
    for name in ("#", "before", "after", "tolerance"):
        table.add_column(name, justify="right")
    table.add_column("")
    for group in writer_groups(writers):
        shares = map(significant, (group.before, group.after, group.tolerance))
        label = Text(group.pattern)
        note(label, "" if group.form == "plain" else group.form)
        table.add_row(label, str(group.count), *map(Text, shares), _holds(group.holds))
    return table


def fact_table(facts: Mapping[str, RenderableType]) -> Table:
    """Names and what there is to say, in two columns."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in facts.items():
        table.add_row(Text(name), text)
    return table


def print_conversion(manifest: Record, folder: str) -> None:
    """The end of `abliterate convert`."""
    _print(closing_table(manifest, folder))


def print_selection(selection: Record) -> None:
    """The end of `abliterate direction`."""
    _print(selection_table(selection))


def print_plan(plan: Plan, checkpoint: Sized | None = None) -> None:
    """`abliterate plan`."""
    _print(plan_table(plan, tensor_sizes(checkpoint) if checkpoint is not None else None))


def print_certificate(certificate: Record, mismatches: Sequence[str], manifest: bool, hashed: bool = True) -> None:
    """`abliterate verify`: the certificate, and whether the files are those that the manifest names.

    Args:
        manifest: there is one. `hashed`: it has hashes of the weights.
    """
    files = Text("weights and direction as the manifest says" if manifest else "no manifest to compare with")
    if manifest and not hashed:
        files = Text("direction as the manifest says; weights not compared: their hashes were left out (--no-hash)")
    if mismatches:
        files = Text(f"not those of the manifest: {some(mismatches, _SHOWN_NAMES)}", "bold red")
    _print(fact_table({**certificate_facts(certificate), "files": files}))


def print_evaluation(report: Report) -> None:
    """`abliterate evaluate`."""
    named = {report.name: asdict(report.evaluation)}
    if report.baseline is not None:
        name = report.baseline_name or "baseline"
        named = {name if name != report.name else f"{name} (baseline)": asdict(report.baseline), **named}
    _print(compare_table(named))
    if report.benchmarks:
        columns = [report.baseline_benchmarks, report.benchmarks][-len(named) :]
        _print(Group(Text(), benchmark_table(dict(zip(named, columns, strict=True)))))


def _print(renderable: RenderableType) -> None:
    Console(highlight=False, markup=False, emoji=False).print(renderable)


def _searched(selection: Record, most: int) -> str:
    total, passes = len(selection["candidates"]), selection["forward_passes"]
    text = f"{min(most, total)} of {total} candidates; {passes:,} forward passes"
    return text if selection["method"] == "exhaustive" else f"{text} (all: {selection['exhaustive_forward_passes']:,})"


def _pick_line(manifest: Record) -> Text:
    selection = manifest["selection"]
    if selection is None:
        return Text("from a file")
    pick, tokens = selection["pick"], []
    if manifest["calibration"] is not None:
        tokens = manifest["calibration"]["chat"]["post_instruction_tokens"]
    token = f" {visible(tokens[pick['position']])}" if -pick["position"] <= len(tokens) else ""
    values = (pick[key] for key in ("bypass", "induce", "kl"))
    scores = ", ".join(f"{name} {significant(v)}" for name, v in zip(score_names(selection), values, strict=True))
    line = Text(f"position {pick['position']}{token}, layer {pick['layer']}: {scores}")
    return line.append("; KL bound relaxed", "bold yellow") if selection["relaxed"] else line


def _edit_line(edit: Record) -> Text:
    heads = {"tied": "tied head edited with the embedding", "untied": "head untied", "separate": "head untouched"}
    strength = "" if edit["strength"] == 1 else f", strength {edit['strength'] or 'by layer'}"
    added = f" ({', '.join(edit['added'])} added)" if edit["added"] else ""
    return Text(f"{len(edit['writers'])} tensors{strength}, {heads[edit['head']]}{added}")


def certificate_facts(certificate: Record, name: str = "certificate") -> dict[str, RenderableType]:
    """Lines about a certificate, which is called by that name."""
    writers, stream = certificate["writers"], certificate["stream"]
    partial = certificate["claim"].startswith("not exact")
    verdict = Text("not exact, nothing is certified", "yellow") if partial else _holds(certificate["holds"])
    facts: dict[str, RenderableType] = {name: verdict}
    if not certificate["holds"]:
        facts[""] = Text(claim_of(certificate))
    if (worst := writers["worst"]) is not None:
        measured = f"{significant(worst['residual_after'])} (tolerance {significant(worst['tolerance'])})"
        facts["  writers"] = Text(f"{writers['checked']} checked, worst {measured} {worst['tensor']}")
    if writers["failed"]:
        facts["  failed"] = Text(some(writers["failed"], _SHOWN_NAMES), "red")
    facts["  stream"] = _stream_line(stream) if stream is not None else Text("not measured")
    return facts


def _stream_line(stream: Record) -> Text:
    before = f", before {significant(stream['before'])}" if stream["before"] is not None else ""
    after, tolerance = significant(stream["after"]), significant(stream["tolerance"])
    return Text(f"{after} (tolerance {tolerance}{before}), {stream['tokens']} tokens").append(
        f"; back at {stream['first_failure']}" if stream["first_failure"] else "", "red"
    )


def _holds(holds: bool) -> Text:
    return Text("holds", "green") if holds else Text("does not hold", "bold red")
