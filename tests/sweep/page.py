"""docs/architectures.md: what the sweep found, for people."""

import re
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

from tests.sweep.run import CERTIFIED, INEXACT, PULLED_BACK, REFUSED, Outcome
from tests.sweep.twins import skipped

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
_INTRO = """\
# Architectures

Every kind of language model that transformers {transformers} has, and what `abliterate convert` does with it.

**{summary}**

*Exact* means that nothing along the direction r is left in the stream: not at the input or the output of any layer, nor
in what the final norm reads. The residual is the largest |h·r|/‖h‖ over all of these places and over all tokens. It is
0 up to rounding, at most 1e-6 where weights are stored in 32 bits; in a model that was not converted, a few tenths.

How this page was made: for each type a tiny twin is built, of the same class and with the same switches as the released
models, but with few and narrow layers. Every one of its parameters is drawn at random, norms, biases and gates too,
because what is left at its default (a gain of 1, a bias of 0) hides mistakes. Transformers saves the twin,
`abliterate.convert` converts it with a random direction, transformers loads the result, and code that shares nothing
with the certificate measures it. Every tensor that does not write to the stream is compared bit by bit.
To make it again:

    make architectures

This is of transformers {transformers} and torch {torch}, on a CPU. `type:variant` is a type with another switch in its
config, `type@image_text_to_text` the class that also takes images; here only tokens run through it.
"""
_HOW = """\
In the order of `abliterate/architecture/families/`, where each type has an entry. What stands between the output of a
writer and the stream decides how the writer is edited:

- *plain*: nothing; the direction itself is projected out.
- *gain w*, *gain 1+w*: a norm with a weight in every channel; the direction times that gain is projected out.
- *product of gains*: several of those, one after the other.
- *centred gain*: a LayerNorm, which takes the mean over channels off as well; its bias writes too.
- *span*: a short convolution over tokens; what each of its taps makes of the direction is projected out.
- *pulled back*: the stream itself passes gains, so that r is another vector at every layer; each writer is edited along
  r as it is there.

*Writers* is how many tensors of the twin were edited. *Logits* is how far the converted twin's logits are from those of
the base with r ablated at run time at every writer, in shares of the largest: only where nothing stands between the
writers and the stream does the edit promise that they are the same.
"""
_REFUSED = """\
The reason that the message gives. Where there are two figures, `--inexact` converts all the same, with no claim: the
residual before, and what is left.
"""
_SKIPPED = "These cannot be built, or not without packages that are missing where this page was made."


def page(outcomes: Sequence[Outcome]) -> str:
    """The page's text, the same for the same outcomes."""
    ordered = sorted(outcomes, key=lambda outcome: outcome.name)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__.partition("+")[0]}
    refused = [_refusal(outcome) for outcome in ordered if outcome.outcome in (INEXACT, REFUSED)]
    parts = [
        _INTRO.format(summary=summary(ordered), **versions),
        *("## Supported\n", _HOW, *_supported([o for o in ordered if o.outcome in (CERTIFIED, PULLED_BACK)])),
        *("## Refused, and why\n", _REFUSED, *_table(("type", "why", "with --inexact"), refused)),
        *("## Not run, and why\n", f"{_SKIPPED}\n"),
        *_table(("type", "why"), [(f"`{name}`", why) for name, why in sorted(skipped().items())]),
    ]
    return "\n".join(parts).rstrip() + "\n"


def summary(outcomes: Sequence[Outcome]) -> str:
    """How many there are of each outcome."""
    counts = Counter(outcome.outcome for outcome in outcomes)
    refused = counts[REFUSED] + counts[INEXACT]
    exact = f"{counts[CERTIFIED]} exact, {counts[PULLED_BACK]} exact with the direction pulled back layer by layer"
    return f"{len(outcomes)} types and variants: {exact}, {refused} refused."


def supported_on(text: str) -> list[str]:
    """The names that a page says are converted exactly."""
    section = text.partition("## Supported\n")[2].partition("## Refused")[0]
    return re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)


def _supported(outcomes: Sequence[Outcome]) -> Iterator[str]:
    files = _files()
    for file, group in groupby(sorted(outcomes, key=lambda o: _file(o, files)), lambda o: _file(o, files)):
        yield f"### {file}\n"
        yield f"{_about(file)}\n"
        columns = ("type", "how", "writers", "before", "after", "logits", "note")
        yield from _table(columns, [_row(outcome) for outcome in group])


def _row(outcome: Outcome) -> tuple[str, ...]:
    figures = (outcome.before, outcome.after, outcome.hooks)
    return (f"`{outcome.name}`", outcome.how, str(outcome.writers), *map(_figure, figures), ", ".join(outcome.notes))


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.1g}"


def _refusal(outcome: Outcome) -> tuple[str, ...]:
    """Its reason without what is the same in every message."""
    why = outcome.reason.partition("; on a tiny twin")[0]
    why = re.sub(r"^model type \S+ is not supported: ", "", why).replace("|", r"\|")
    figures = f"{_figure(outcome.before)} → {_figure(outcome.after)}" if outcome.outcome == INEXACT else ""
    return f"`{outcome.name}`", why, figures


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield f"|{'---|' * len(columns)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""


def _files() -> Mapping[str, Mapping[str, Any]]:
    """What each file of the table says."""
    folder = resources.files("abliterate.architecture") / "families"
    names = sorted(file.name for file in folder.iterdir() if file.name.endswith(".yaml"))
    return {name: yaml.safe_load((folder / name).read_text("utf-8")) for name in names}


def _file(outcome: Outcome, files: Mapping[str, Mapping[str, Any]]) -> str:
    """The file with the entry for a type: the text decoder's own, or that of the model around it."""
    for name, entries in files.items():
        if outcome.model_type in entries.get(outcome.family, {}).get("types", ()):
            return name
    listed = (n for n, entries in files.items() if any(outcome.model_type in e["types"] for e in entries.values()))
    return next(listed, "not in the table")


def _about(file: str) -> str:
    """The comment that a file begins with."""
    path = resources.files("abliterate.architecture") / "families" / file
    if not path.is_file():
        return "Found by gradients on a tiny twin of their own."
    lines = path.read_text("utf-8").splitlines()
    count = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return textwrap.fill(" ".join(line.removeprefix("#").strip() for line in lines[:count]), 120)
