"""One case of the sweep: a random twin, converted through the public interface, and measured on its own."""

import json
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import abliterate
from abliterate import Conversion, Plan, RunOptions
from abliterate.architecture.writer import Path as StepPath
from abliterate.calibration.hooks import Steer, steered
from abliterate.calibration.load import load_resident
from abliterate.checkpoint.files import open_checkpoint
from abliterate.edit.edits import Projectors
from abliterate.errors import AbliterateError
from tests import pico
from tests.sweep.measure import Bearings, NotSeenError, Residual, stream_residual
from tests.sweep.twins import HIDDEN, Case, class_of, save_twin, token_ids

EXACT = 1e-6
"""What may be left of the direction in the stream."""
EQUAL = 1e-4
"""How far logits may be from those of run-time ablation, in shares of the largest."""
CERTIFIED, PULLED_BACK, INEXACT, REFUSED, FAILED = "certified", "pulled back", "inexact", "refused", "FAILED"
OFFER = "--inexact converts all the same"
"""What a refusal says where the user may insist."""


class SweepError(Exception):
    """Something is not as the conversion promised."""


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Attributes:
        outcome: certified; pulled back: certified with a direction that turns from layer to layer; refused; inexact:
            refused, and converted without a claim when the user insists; FAILED.
        model_type: as the twin's config.json names it. `family`: of the table's entry for its text decoder.
        how: what stands between the writers and the stream, in words.
        writers: how many tensors are edited.
        before, after: the residual in the stream of the base, and of the conversion.
        hooks: how far its logits are from those of run-time ablation, in shares of the largest; None where the edit
            does not promise that they are the same.
        notes: what else there is to say of it.
        reason: of a refusal or a failure.
    """

    name: str
    outcome: str
    model_type: str = ""
    family: str = ""
    how: str = ""
    writers: int = 0
    before: float | None = None
    after: float | None = None
    hooks: float | None = None
    notes: tuple[str, ...] = ()
    reason: str = ""
    seconds: float = 0.0


def run_case(case: Case, seed: int = 0) -> Outcome:
    """Builds the twin, converts it, and measures; whatever goes wrong is in the outcome."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        try:
            outcome = _checked(case, _Run(case, Path(place), seed).outcome())
        except Exception as error:  # of transformers, of torch, of the code under test
            outcome = Outcome(case.name, FAILED, reason=f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")
    return replace(outcome, seconds=time.monotonic() - start)


def _checked(case: Case, outcome: Outcome) -> Outcome:
    """The outcome held against what `cases.yaml` expects."""
    expected = PULLED_BACK if case.pulled_back else REFUSED if case.refused else CERTIFIED
    found = REFUSED if outcome.outcome == INEXACT else outcome.outcome
    said = f": {outcome.reason}" if outcome.reason else ""
    if found != expected:
        return replace(outcome, outcome=FAILED, reason=f"{found}, and should be {expected}{said}")
    if case.refused and case.refused not in outcome.reason:
        return replace(outcome, outcome=FAILED, reason=f"should be refused for “{case.refused}”{said}")
    return outcome


class _Run:
    """One twin and its direction, in a folder of its own."""

    def __init__(self, case: Case, place: Path, seed: int) -> None:
        self._case, self._place = case, place
        self._base = save_twin(case, place / "twin", seed)
        self._r, self._direction = pico.unit(HIDDEN, seed), pico.direction_file(place / "r.safetensors", HIDDEN, seed)
        self._tokens = token_ids(case, seed)
        named = json.loads((self._base / "config.json").read_text())["model_type"]
        self._found = Outcome(case.name, REFUSED, named)

    def outcome(self) -> Outcome:
        """See `run_case`."""
        try:
            conversion = self._convert(RunOptions())
        except AbliterateError as error:
            return self._refused(str(error))
        if not conversion.holds:
            raise SweepError(conversion.certificate.claim)
        plan = abliterate.plan(str(self._base))
        found = self._measured(conversion, plan)
        if not (found.after or 0.0) <= EXACT:
            raise SweepError(f"{found.after:.1e} of the direction is left, and the certificate holds")
        hooks = self._hook_difference(conversion, plan)
        if hooks is not None and not hooks <= EQUAL:
            raise SweepError(f"logits are {hooks:.1e} from those of run-time ablation")
        return replace(found, outcome=PULLED_BACK if plan.boundaries else CERTIFIED, hooks=hooks)

    def _convert(self, options: RunOptions) -> Conversion:
        out = self._place / "out"
        return abliterate.convert(
            str(self._base), out, direction=self._direction, options=options, evaluate=False, overwrite=True
        )

    def _refused(self, reason: str) -> Outcome:
        """A refusal says why in one line; where it says that --inexact converts, that is tried."""
        if "\n" in reason:
            raise SweepError(f"refused on more than one line: {reason}")
        refused = replace(self._found, reason=reason.replace(str(self._base), "the checkpoint"))
        if OFFER not in reason:
            return refused
        conversion = self._convert(RunOptions(inexact=True))
        found = self._measured(conversion, abliterate.plan(str(self._base), inexact=True))
        if conversion.certificate.holds or (found.after or 0.0) <= EXACT:
            raise SweepError(f"no direction should be exact, and {found.after:.1e} of it is left")
        return replace(found, outcome=INEXACT, reason=refused.reason)

    def _measured(self, conversion: Conversion, plan: Plan) -> Outcome:
        """What the files hold, and the stream before and after."""
        check_files(self._base, conversion.folder, plan)
        before, after = (self._residual(folder, plan).value for folder in (self._base, conversion.folder))
        return replace(
            self._found,
            family=plan.family,
            how=how(plan),
            writers=len(plan.writers),
            notes=_notes(plan),
            before=before,
            after=after,
        )

    def _residual(self, folder: Path, plan: Plan) -> Residual:
        try:
            return stream_residual(self._load(folder), self._tokens, self._bearings(plan))
        except NotSeenError as error:
            raise SweepError(str(error)) from error

    def _load(self, folder: Path) -> Any:
        """The stored weights in a model, every parameter filled and every tensor used."""
        model, report = class_of(self._case).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        wrong = {kind: sorted(map(str, names))[:3] for kind, names in report.items() if names}
        if wrong:
            raise SweepError(f"transformers does not load it whole: {wrong}")
        return model.eval()

    def _bearings(self, plan: Plan) -> Bearings:
        """r at every decoder layer's input and output; where the skip path has gains, as the plan pulls it back."""
        pulled = Projectors(open_checkpoint(self._base), plan.hidden_size, self._r).boundaries(plan)
        at = self._r.double().expand(len(plan.runtime.layers) + 1, -1) if pulled is None else pulled
        return {name: (at[i], at[i + 1]) for i, name in enumerate(plan.runtime.layers)}

    def _hook_difference(self, conversion: Conversion, plan: Plan) -> float | None:
        """How far the logits are from the base's under run-time ablation; None where they may differ."""
        if not self._case.hooks or plan.boundaries or any(writer.gain for writer in plan.writers):
            return None
        tied = plan.shares_edit and plan.untying is None
        base = load_resident(self._base, plan, device=torch.device("cpu"), dtype=torch.float32, tied_head=tied)
        edited = self._load(conversion.folder)
        with torch.inference_mode():
            actual = edited(input_ids=self._tokens, use_cache=False).logits
            with steered(base.stream, [Steer(ablate=self._r)] * len(self._tokens)):
                expected = base.model(input_ids=self._tokens, use_cache=False).logits
        return float((actual - expected).abs().max() / expected.abs().max())


def check_files(base: Path, out: Path, plan: Plan) -> None:
    """Every tensor keeps its name, shape and dtype, and its bits unless it is a writer; only heads are added.

    Raises:
        SweepError: one does not.
    """
    before, after = _tensors(base), _tensors(out)
    odd = (set(after) ^ set(before)) - {name for _, name in plan.untying or ()}
    if odd or not set(before) <= set(after):
        raise SweepError(f"names differ: {sorted(odd)[:3]}")
    edited = {writer.tensor for writer in plan.edited}
    for name, old in before.items():
        new = after[name]
        if old.shape != new.shape or old.dtype != new.dtype:
            raise SweepError(f"{name} was {old.dtype} {list(old.shape)} and is {new.dtype} {list(new.shape)}")
        same = torch.equal(_bits(old), _bits(new))
        if not same and name not in edited:
            raise SweepError(f"{name} is no writer and differs")
        if same and name in edited - {plan.head} and old.any():
            raise SweepError(f"{name} is a writer and is as it was")


def _tensors(folder: Path) -> dict[str, Tensor]:
    files = [path for path in folder.glob("*.safetensors") if not path.name.startswith("refusal_direction")]
    return {name: tensor for path in files for name, tensor in load_file(path).items()}


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def how(plan: Plan) -> str:
    """What stands between the writers and the stream, in words."""
    words = {_gain(writer.gain) for writer in plan.writers}
    order = ("plain", "gain w", "gain 1+w", "product of gains", "centred gain", "span")
    named = [word for word in order if word in words]
    gains = named if named == ["plain"] else [word for word in named if word != "plain"]
    return ", ".join([*gains, *(["pulled back"] if plan.boundaries else [])])


def _gain(path: StepPath) -> str:
    kinds = [step.kind for step in path]
    if "taps" in kinds:
        return "span"
    if "center" in kinds:
        return "centred gain"
    if len(kinds) > 1:
        return "product of gains"
    return "plain" if not path else "gain 1+w" if path[0].offset else "gain w"


def _notes(plan: Plan) -> tuple[str, ...]:
    beside = sum(writer.kind == "projector" for writer in plan.writers)
    said = {
        "found by the probe": plan.probed,
        "head stays tied": plan.shares_edit and plan.untying is None,
        f"{beside} of the writers for images or sounds": beside > 0,
        "some layers run only with an image": bool(plan.sometimes),
    }
    return tuple(words for words, so in said.items() if so)
