"""Model types that the table does not know: probed on a tiny twin, and used when they have proved exact on it."""

import functools
import json
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from abliterate.architecture.blueprint import blueprint_of, quiet, read_blueprint
from abliterate.architecture.conversion import quiet_transformers
from abliterate.architecture.entry import Entry
from abliterate.architecture.plan import plan_architecture
from abliterate.architecture.prepared import some_tokens
from abliterate.architecture.probe import Probe, probe
from abliterate.architecture.probed import entry_of
from abliterate.architecture.shrink import HIDDEN
from abliterate.architecture.table import read_family
from abliterate.architecture.twin import build_twin, twin_config
from abliterate.architecture.writer import Plan
from abliterate.calibration.model import LanguageModel
from abliterate.calibration.tour import find_stream, run
from abliterate.certify.stream import measure_stream
from abliterate.certify.weights import FULL_PRECISION
from abliterate.checkpoint.files import Checkpoint, open_checkpoint
from abliterate.checkpoint.rewrite import rewrite_checkpoint
from abliterate.edit.edits import Projectors, build_edits
from abliterate.errors import AbliterateError, ArchitectureError, RefusedError

log = logging.getLogger(__name__)

_PROMPTS = 4


@dataclass(frozen=True)
class ProbedEntry:
    """What the probe found.

    Attributes:
        entry: as the table has it, by its family's name.
        residual: max abs(h . r) / norm(h) left in the twin that was converted with the entry; `before`: of the twin.
    """

    entry: Mapping[str, Any]
    residual: float
    before: float

    def as_entry(self, inexact: str | None = None) -> Entry:
        """The entry as plans take it; `inexact`: why no direction is exact."""
        ((name, content),) = self.entry.items()
        family = read_family(name, content, {})
        return Entry(family, family.outside, inexact=inexact, probed=True)

    def text(self) -> str:
        """The entry as a file of families/ would have it."""
        return yaml.safe_dump(dict(self.entry), sort_keys=False, width=118, default_flow_style=None)


def probed_entry(checkpoint: Checkpoint, trust_remote_code: bool = False) -> Entry:
    """The entry for a model type that is not in the table.

    Raises:
        ArchitectureError: no tiny twin can be built, or no edit of it is exact.
    """
    return probe_type(checkpoint, trust_remote_code).as_entry()


def probe_type(checkpoint: Checkpoint, trust_remote_code: bool = False) -> ProbedEntry:
    """Builds a tiny twin of the checkpoint's config, finds its writers by gradients, converts it, and measures.

    Raises:
        ArchitectureError: as `probed_entry`.
    """
    return _probed(checkpoint.folder, json.dumps(checkpoint.config, sort_keys=True), trust_remote_code)


def inexact_entry(checkpoint: Checkpoint, trust_remote_code: bool, refusal: RefusedError, wanted: bool) -> Entry:
    """The entry for an architecture on which no direction is exact, as far as the probe finds its writers.

    Args:
        refusal: why.
        wanted: it is to be converted all the same.

    Raises:
        RefusedError: it is not wanted; the message says what would stay of the direction.
    """
    try:
        probed = _probed(checkpoint.folder, json.dumps(checkpoint.config, sort_keys=True), trust_remote_code, True)
    except AbliterateError:
        raise refusal from None
    left = f"{probed.residual:.1g} of the stream's norm would stay along the direction ({probed.before:.1g} before)"
    if not wanted:
        raise RefusedError(
            f"{refusal}; on a tiny twin {left}. --inexact converts all the same, and certifies nothing", refusal.why
        )
    return probed.as_entry(inexact=refusal.why)


@functools.lru_cache(maxsize=2)
def _probed(folder: Path, config: str, trust_remote_code: bool, inexact: bool = False) -> ProbedEntry:
    content = json.loads(config)
    real = read_blueprint(folder, content, trust_remote_code)
    model_type = str(content["model_type"])
    log.info("model type %s: probing a tiny twin, because the table has no exact edit for it", model_type)
    model_class = type(real.model)
    twin, found = _probe_twin(real.model.config, model_class)
    with tempfile.TemporaryDirectory() as place, quiet_transformers(), quiet():
        twin.save_pretrained(Path(place) / "twin")
        saved = open_checkpoint(Path(place) / "twin")
        shapes = {name: info.shape for name, info in saved.tensors.items()}
        blueprint = blueprint_of(twin.config, model_class)
        entry = entry_of(model_type, found, shapes, blueprint, unused_parameters(twin), inexact)
        family = read_family(model_type, entry, {})
        plan = plan_architecture(saved, entry=Entry(family, family.outside, probed=True), blueprint=blueprint)
        residual, before = _residuals(saved, plan, model_class, Path(place) / "edited")
    if not inexact and not residual <= FULL_PRECISION:
        raise ArchitectureError(
            f"model type {model_type} is not in the table, and what the probe found leaves {residual:.2g} of the "
            "stream's norm along the direction on a tiny twin: no edit could be called exact"
        )
    return ProbedEntry({model_type: entry}, residual, before)


def _probe_twin(config: Any, model_class: Any) -> tuple[Any, Probe]:
    """A twin and what was found on it; some classes only run where the heads together are as wide as the stream."""
    first: ArchitectureError | None = None
    for overrides in ({}, {"head_dim": HIDDEN // 4}):
        try:
            twin = build_twin(twin_config(config, overrides), model_class)
            return twin, probe(twin)
        except ArchitectureError as error:
            first = first or error
    assert first is not None
    raise first


def unused_parameters(model: Any) -> set[str]:
    """Run-time names of parameters that tokens do not bring to use: their module does not run, no gradient comes."""
    ran: set[str] = set()
    hooks = [
        module.register_forward_hook(lambda _m, _a, _o, name=name: ran.add(name))
        for name, module in model.named_modules()
    ]
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.is_floating_point()}
    try:
        model.requires_grad_(True)
        inputs = {"input_ids": some_tokens(model, HIDDEN, 0), "use_cache": False}
        total = run(model, inputs).logits.float().sum()
        gradients = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    finally:
        model.requires_grad_(False)
        for hook in hooks:
            hook.remove()
    silent = {name for name, gradient in zip(named, gradients, strict=True) if gradient is None}
    return {name for name in silent if name.rpartition(".")[0] not in ran}


def _residuals(checkpoint: Checkpoint, plan: Plan, model_class: Any, out: Path) -> tuple[float, float]:
    """Converts a twin as any checkpoint, loads what was written, and measures a random direction in it and before."""
    made = torch.Generator().manual_seed(1)
    direction = torch.nn.functional.normalize(torch.randn(plan.hidden_size, generator=made, dtype=torch.float64), dim=0)
    out.mkdir()
    rewrite_checkpoint(checkpoint, out, build_edits(checkpoint, plan, direction), hash_files=False)
    (out / "config.json").write_bytes((checkpoint.folder / "config.json").read_bytes())
    pulled = Projectors(checkpoint, plan.hidden_size, direction).boundaries(plan)
    worst = []
    for folder in (out, checkpoint.folder):
        model = model_class.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
        resident = LanguageModel(model, None, find_stream(model, plan), model.get_output_embeddings(), _PROMPTS)
        prompts = some_tokens(model, HIDDEN, 1)[:_PROMPTS].tolist()
        worst.append(measure_stream(resident, prompts, direction, pulled=pulled).worst)
    return worst[0], worst[1]
