"""`python -m tests.sweep`: converts a tiny twin of every architecture and says what is left of the direction."""

import os
import sys
from collections import Counter
from collections.abc import Sequence

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tests.sweep.page import PAGE, page, supported_on
from tests.sweep.pool import each
from tests.sweep.run import CERTIFIED, FAILED, PULLED_BACK, Outcome, run_case
from tests.sweep.streamed import Comparison, compare_streamed
from tests.sweep.twins import cases, skipped

_SLOWEST = 5


@click.command()
@click.argument("names", nargs=-1)
@click.option("--ci", is_flag=True, help="Only the representative subset.")
@click.option("--jobs", type=click.IntRange(1), default=os.cpu_count() or 1, show_default=True, help="Processes.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the twins' parameters and directions.")
@click.option(
    "--streamed", is_flag=True, help="Compare weights streamed layer by layer with weights in memory instead."
)
@click.option("--write", is_flag=True, help="Write docs/architectures.md; of the whole sweep only.")
def main(names: tuple[str, ...], ci: bool, jobs: int, seed: int, streamed: bool, write: bool) -> None:
    """Convert a tiny random twin of every architecture (or of those NAMED) and measure what is left."""
    unknown = sorted(set(names) - set(cases()))
    if unknown:
        raise click.UsageError(f"there is no case {', '.join(unknown)} in tests/sweep/cases.yaml")
    if write and (names or ci or seed or streamed):
        raise click.UsageError("--write needs the whole sweep, with seed 0")
    chosen = [case for name, case in cases().items() if (name in names or not names) and (case.ci or not ci)]
    if streamed:
        sys.exit(_show_streamed(sorted(each(compare_streamed, chosen, jobs, seed), key=lambda found: found.name)))
    outcomes = sorted(each(run_case, chosen, jobs, seed), key=lambda outcome: outcome.name)
    show(outcomes)
    lost = _lost(outcomes)
    for name in lost:
        click.echo(f"{name} is certified in {PAGE.name} and is not any more")
    failed = lost or any(outcome.outcome == FAILED for outcome in outcomes)
    if write and not failed:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page(outcomes), encoding="utf-8")
    sys.exit(1 if failed else 0)


def show(outcomes: Sequence[Outcome]) -> None:
    """The table, and the summary."""
    console = Console(width=None if sys.stdout.isatty() else 200)
    table = Table("type", "outcome", "how", "writers", "before", "after", "logits", "note", box=None)
    for found in outcomes:
        figures = ["" if value is None else f"{value:.1e}" for value in (found.before, found.after, found.hooks)]
        note = escape(found.reason or ", ".join(found.notes))
        table.add_row(found.name, found.outcome, found.how, str(found.writers or ""), *figures, note)
    console.print(table)
    counts = sorted((Counter(outcome.outcome for outcome in outcomes) + Counter({"not run": len(skipped())})).items())
    console.print(", ".join(f"{count} {name}" for name, count in counts))
    slowest = sorted(outcomes, key=lambda outcome: -outcome.seconds)[:_SLOWEST]
    console.print("slowest: " + ", ".join(f"{outcome.name} {outcome.seconds:.1f} s" for outcome in slowest))


def _show_streamed(compared: Sequence[Comparison]) -> int:
    """What differs, what could not be compared, and how many did not differ; the exit code."""
    for found in compared:
        if not found.same:
            click.echo(f"{found.name}: {'DIFFERS in ' if found.same is False else 'not compared: '}{found.said}")
    counts = Counter(found.same for found in compared)
    click.echo(f"{counts[True]} the same to the last bit, {counts[False]} different, {counts[None]} not compared")
    return 1 if counts[False] else 0


def _lost(outcomes: Sequence[Outcome]) -> list[str]:
    """Cases that the page says are certified, and that no longer are."""
    said = set(supported_on(PAGE.read_text("utf-8"))) if PAGE.is_file() else set()
    good = {CERTIFIED, PULLED_BACK}
    return [outcome.name for outcome in outcomes if outcome.name in said and outcome.outcome not in good]


if __name__ == "__main__":
    main()
