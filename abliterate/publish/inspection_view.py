"""`abliterate inspect`: what a checkpoint is, what it claims, and what its files say to that."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from abliterate.publish.figures import claim_of, percent, significant, sizes
from abliterate.publish.plan_view import simple_table
from abliterate.publish.summary import fact_table

SCHEMA = "abliteration-inspection/1"


class _Check(Protocol):
    @property
    def claim(self) -> str:
        """What was looked at."""

    @property
    def holds(self) -> bool | None:
        """None where it could not be checked."""

    @property
    def said(self) -> str:
        """What was found."""


class Inspected(Protocol):
    """An inspection, as far as it is shown."""

    @property
    def name(self) -> str:
        """Hub id or folder."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """From headers."""

    @property
    def unknown(self) -> str | None:
        """Why the architecture is not known."""

    @property
    def manifest(self) -> Mapping[str, Any] | None:
        """What it claims."""

    @property
    def checks(self) -> Sequence[_Check]:
        """Of its claims."""

    @property
    def holds(self) -> bool:
        """Whether no claim is refuted."""


def print_inspection(found: Inspected) -> None:
    """The table."""
    Console(highlight=False, markup=False, emoji=False).print(inspection_view(found))


def inspection_record(found: Inspected) -> dict[str, Any]:
    """For scripts."""
    return {
        "schema": SCHEMA,
        "name": found.name,
        "facts": dict(found.facts),
        "unknown": found.unknown,
        "claims": None if found.manifest is None else claims_of(found.manifest),
        "checks": [{"claim": c.claim, "holds": c.holds, "said": c.said} for c in found.checks],
        "holds": None if found.manifest is None else found.holds,
    }


def claims_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says, without its long lists."""
    base, edit, certificate = manifest["base"], manifest["edit"], manifest["certificate"]
    evaluation = manifest["evaluation"]
    return {
        "base": {key: base[key] for key in ("id", "source", "revision", "commit", "model_type")},
        "recipe": manifest["recipe"].get("name"),
        "direction": manifest["direction"]["source"],
        "edit": {"writers": len(edit["writers"]), "strength": edit["strength"], "head": edit["head"]},
        "certificate": {key: certificate[key] for key in ("holds", "exact", "claim")},
        "evaluation": None if evaluation is None else {key: evaluation[key] for key in ("base", "edited")},
        "tool": dict(manifest["tool"]),
        "warnings": list(manifest["warnings"]),
    }


def inspection_view(found: Inspected) -> RenderableType:
    """Facts, claims, checks."""
    facts: dict[str, RenderableType] = {"checkpoint": Text(found.name), **_facts(found.facts)}
    if found.unknown is not None:
        facts["writers"] = Text(f"not known: {found.unknown}", "yellow")
    if found.manifest is None:
        facts["claims"] = Text("none: there is no abliteration.json, so there is nothing to check", "yellow")
        return fact_table(facts)
    facts |= _claims(claims_of(found.manifest))
    return Group(fact_table(facts), Text(), _checks(found.checks), Text(), _verdict(found.holds))


def _facts(facts: Mapping[str, Any]) -> dict[str, RenderableType]:
    dtypes = ", ".join(
        f"{dtype} {percent(count / max(1, facts['parameters']))}" for dtype, count in facts["dtypes"].items()
    )
    said: dict[str, RenderableType] = {
        "size": Text(
            f"{sizes(facts['bytes'])} in {_count(facts['shards'], 'shard')}, {_count(facts['tensors'], 'tensor')}, "
            f"{facts['parameters']:,} parameters"
        ),
        "dtype": Text(dtypes),
        "architecture": Text(str(facts["model_type"])),
    }
    if facts["writers"] is not None:
        head = "tied head" if facts["tied"] else "head of its own"
        said["architecture"] = Text(
            f"{facts['model_type']}, {facts['layers']} layers, {facts['hidden_size']} wide, {facts['writers']} "
            f"residual writers, {head}"
        )
    return said


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number != 1)}"


def _claims(claims: Mapping[str, Any]) -> dict[str, RenderableType]:
    base, edit, certificate = claims["base"], claims["edit"], claims["certificate"]
    at = f" at {base['commit'] or base['revision']}" if base["commit"] or base["revision"] else ""
    strength = "by layer" if edit["strength"] is None else f"{edit['strength']:g}"
    facts: dict[str, RenderableType] = {
        "claims": Text(f"recipe {claims['recipe']} on {base['id']}{at}, by version {claims['tool'].get('abliterate')}"),
        "  edit": Text(f"{edit['writers']} tensors, strength {strength}, head {edit['head']}"),
        "  certificate": Text(("holds: " if certificate["holds"] else "does not hold: ") + claim_of(certificate)),
        "  evaluation": Text(_evaluation(claims["evaluation"])),
    }
    if claims["warnings"]:
        facts["  warnings"] = Text("\n".join(map(str, claims["warnings"])), "yellow")
    return facts


def _evaluation(evaluation: Mapping[str, Any] | None) -> str:
    if evaluation is None:
        return "not measured"
    before, after = (percent(evaluation[key].get("refusal_rate_substring")) for key in ("base", "edited"))
    kl = significant(evaluation["edited"].get("kl_first_token"))
    return f"harmful prompts refused, by phrase: {before} before, {after} after; KL at the first token {kl} nats"


def _checks(checks: Sequence[_Check]) -> Table:
    table = simple_table()
    for name in ("check", "", "found"):
        table.add_column(name, overflow="fold")
    words = {
        True: Text("holds", "green"),
        False: Text("does not hold", "bold red"),
        None: Text("not checked", "yellow"),
    }
    for check in checks:
        table.add_row(Text(check.claim), words[check.holds], Text(check.said))
    return table


def _verdict(holds: bool) -> Text:
    if holds:
        return Text(
            "The files bear the claims out, as far as weights alone can; `abliterate verify` runs the model too."
        )
    return Text("The files do not bear the claims out.", "bold red")
