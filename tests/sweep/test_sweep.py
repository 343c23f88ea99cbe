"""The representative third of the sweep, and the probe beside the table; `make architectures` runs all of it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

import pytest

from abliterate.architecture.writer import Plan
from abliterate.checkpoint.files import Checkpoint
from abliterate.edit.cut import Cut
from abliterate.edit.edits import build_edits
from abliterate.edit.projections import Projection
from tests.sweep.beside import Beside, beside_table
from tests.sweep.page import page, supported_on
from tests.sweep.pool import each
from tests.sweep.run import CERTIFIED, EXACT, FAILED, INEXACT, PULLED_BACK, REFUSED, Outcome, run_case
from tests.sweep.twins import Case, cases

CI = [name for name, case in cases().items() if case.ci]
PROBED = [name for name in CI if (case := cases()[name]).text and case.kind == "causal" and not case.refused]
ONLY_BY_HAND = {
    "deepseek_v4": "model.norm.weight",  # see `twins.save_twin`
    "inkling2_text": "attn_res.attn_queries",  # one tensor a layer, outside of the layers
    "mbart": "encoder_attn",
    "mllama": "tokens alone do not run",
    "moss_transcribe_diarize": "multi_modal_projector",
    "phi4_multimodal": "embed_tokens_extend",
}
"""Cases of which gradients of tokens do not show everything, and what the probe then says."""


@dataclass(frozen=True)
class Found:
    """What became of a case, and what the probe says of it."""

    name: str
    outcome: Outcome
    beside: Beside | None


def look(case: Case, seed: int) -> Found:
    return Found(case.name, run_case(case, seed), beside_table(case, seed) if case.name in PROBED else None)


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest) -> Mapping[str, Found]:
    """Of the cases whose tests were picked, side by side."""
    tests = [getattr(item, "callspec", None) for item in request.session.items if item.path == request.path]
    picked = {name for test in tests if test is not None for name in test.params.values()}
    chosen = [case for name, case in cases().items() if name in picked and case.ci]
    return {found.name: found for found in each(look, chosen, os.cpu_count() or 1)}


@pytest.mark.parametrize("swept", CI)
def test_exact_or_refused_with_the_reason(swept: str, found: Mapping[str, Found]) -> None:
    case, outcome = cases()[swept], found[swept].outcome
    assert outcome.outcome != FAILED, outcome.reason
    if case.refused:
        assert outcome.outcome in (REFUSED, INEXACT) and case.refused in outcome.reason
        return
    assert outcome.outcome == (PULLED_BACK if case.pulled_back else CERTIFIED)
    assert outcome.before is not None and outcome.before > 0.1
    assert outcome.after is not None and outcome.after <= EXACT


@pytest.mark.parametrize("probed", PROBED)
def test_the_probe_finds_what_the_table_says(probed: str, found: Mapping[str, Found]) -> None:
    beside, pulled_back = found[probed].beside, cases()[probed].pulled_back
    assert beside is not None
    if probed in ONLY_BY_HAND or pulled_back:
        assert ("passes gains" if pulled_back else ONLY_BY_HAND[probed]) in beside.refused
    else:
        assert not beside.refused and not beside.differences


def test_the_page_says_what_was_found() -> None:
    certified = Outcome("llama", CERTIFIED, "llama", "llama", "plain", 9, 0.44, 6.8e-8, 1.03e-6)
    why = "model type xglm is not supported: a | b"
    inexact = Outcome("xglm", INEXACT, "xglm", before=0.43, after=0.03, reason=why)
    said = page([inexact, certified])
    assert said == page([certified, inexact])
    assert "| `llama` | plain | 9 | 0.4 | 7e-08 | 1e-06 |  |" in said
    assert r"| `xglm` | a \| b | 0.4 → 0.03 |" in said
    assert supported_on(said) == ["llama"]


def test_what_is_left_is_seen_without_the_certificate(monkeypatch: pytest.MonkeyPatch) -> None:
    def weaker(checkpoint: Checkpoint, plan: Plan, cut: Cut, untie: bool) -> dict[str, Projection]:
        return build_edits(checkpoint, plan, Cut.uniform(cut.main, plan.num_layers, 0.9), untie)

    monkeypatch.setattr("abliterate.rewriting.build_edits", weaker)
    assert "does not hold" in run_case(cases()["llama"]).reason
    monkeypatch.setattr("abliterate.certify.certificate.Certificate.holds", True)
    blind = run_case(cases()["llama"])
    assert blind.outcome == FAILED and "of the direction is left, and the certificate holds" in blind.reason


def test_failures_do_not_pass_for_outcomes() -> None:
    wrong = run_case(Case("llama", refused="for a reason that it has not"))
    assert wrong.outcome == FAILED and "should be refused" in wrong.reason
    assert run_case(Case("no such type")).outcome == FAILED
