"""What a command works on: a located checkpoint, its residual writers, and how its model is run."""

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from abliterate.architecture.blueprint import read_blueprint
from abliterate.architecture.entry import check_type, find_entry
from abliterate.architecture.plan import plan_architecture
from abliterate.architecture.writer import Plan
from abliterate.calibration.load import Changes, load_resident, load_tokenizer, pick_device, pick_dtype
from abliterate.calibration.memory import Need, Placement, need_of, place, place_fetched
from abliterate.calibration.model import LanguageModel
from abliterate.calibration.streaming import load_streamed
from abliterate.checkpoint.allowance import Allowance
from abliterate.checkpoint.files import Checkpoint, open_checkpoint
from abliterate.checkpoint.header import DTYPES
from abliterate.checkpoint.locate import Source, resolve
from abliterate.checkpoint.ondemand import Wanted, located_together
from abliterate.errors import RefusedError
from abliterate.probing import inexact_entry, probed_entry
from abliterate.progress import SILENT, Progress
from abliterate.sizes import parse_memory

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunOptions:
    """How models are run.

    Attributes:
        device: auto, cpu, cuda or mps. `dtype`: auto, float32, bfloat16 or float16, for calibration and evaluation;
            certificates always compute in float32.
        batch_size: prompts a forward pass; None chooses by device.
        seed: of the split of prompt sets.
        inexact: also convert where no direction is exact, without a claim.
        template: built-in chat template or Jinja file; None takes the model's own.
        system_prompt: None leaves it to the template.
        memory: where weights are while a model runs: auto, resident, streamed, or a size (see `parse_memory`).
        scratch: folder for what outgrows memory; None takes the system's for temporary files.
        cache_limit: bytes of a Hub model's shards that may be on the disk at once; None downloads it whole.
        max_new_tokens: of completions in evaluations; None leaves it to the recipe.
        hash_files: take sha256 of weights that are read and written.
    """

    device: str = "auto"
    dtype: str = "auto"
    batch_size: int | None = None
    seed: int = 0
    trust_remote_code: bool = False
    inexact: bool = False
    template: str | None = None
    system_prompt: str | None = None
    memory: str = "auto"
    scratch: Path | None = field(default=None, compare=False)
    cache_limit: int | None = None
    max_new_tokens: int | None = None
    hash_files: bool = True
    progress: Progress = field(default=SILENT, compare=False)


@dataclass(frozen=True)
class Subject:
    """A checkpoint and the plan of its residual writers."""

    source: Source
    checkpoint: Checkpoint
    plan: Plan

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return self.source.folder

    @property
    def name(self) -> str:
        """See `Source`."""
        return self.source.name

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The stored dtypes of the residual writers, as safetensors names them."""
        return tuple(sorted({self.checkpoint.tensors[writer.tensor].dtype for writer in self.plan.writers}))

    @property
    def stored_dtype(self) -> torch.dtype:
        """What the embedding is stored in."""
        return DTYPES[self.checkpoint.tensors[self.plan.embedding].dtype]


def open_subject(
    model: str, revision: str | None = None, trust_remote_code: bool = False, inexact: bool = False
) -> Subject:
    """Locates the checkpoint, reads its headers, and finds its residual writers.

    Raises:
        CheckpointError: missing, gated, damaged or quantized.
        ArchitectureError: its residual writers are not known.
    """
    return subject_at(resolve(model, revision), trust_remote_code, inexact)


@contextmanager
def opened(
    model: str, revision: str | None, options: RunOptions, inexact: bool = False, allowance: Allowance | None = None
) -> Iterator[Subject]:
    """`open_subject`, and while this lasts, with a cache limit, its shards are fetched when they are asked for.

    Args:
        allowance: what the shards share with others, in place of a limit of their own.

    Raises:
        HubError: the Hub fails.
    """
    with opened_together([(model, revision)], options, inexact, allowance) as (subject,):
        yield subject


@contextmanager
def opened_together(
    models: Sequence[Wanted], options: RunOptions, inexact: bool = False, allowance: Allowance | None = None
) -> Iterator[list[Subject]]:
    """`opened` for several, which share the cache limit; see `located_together`."""
    with located_together(models, allowance or options.cache_limit, options.progress) as sources:
        yield [subject_at(source, options.trust_remote_code, inexact) for source in sources]


def subject_at(source: Source, trust_remote_code: bool = False, inexact: bool = False) -> Subject:
    """See `open_subject`."""
    checkpoint = open_checkpoint(source.folder, source.keeper)
    return Subject(source, checkpoint, plan_of(checkpoint, trust_remote_code, inexact))


def plan_of(checkpoint: Checkpoint, trust_remote_code: bool = False, inexact: bool = False) -> Plan:
    """The plan by the table; where that does not know the model type, by the gradient probe.

    Args:
        inexact: also where no direction is exact.

    Raises:
        ArchitectureError: see `plan_architecture` and `probed_entry`; of a type that cannot be exact, why, and how much
            of the direction would stay.
    """
    model_type = checkpoint.config.get("model_type")
    if not isinstance(model_type, str):
        return plan_architecture(checkpoint)
    try:
        check_type(model_type)
        blueprint = read_blueprint(checkpoint.folder, checkpoint.config, trust_remote_code)
        entry = find_entry(checkpoint.config, blueprint) or probed_entry(checkpoint, trust_remote_code)
    except RefusedError as refusal:
        entry = inexact_entry(checkpoint, trust_remote_code, refusal, inexact)
        blueprint = read_blueprint(checkpoint.folder, checkpoint.config, trust_remote_code)
    return plan_architecture(checkpoint, trust_remote_code, entry, blueprint)


def load_model(
    subject: Subject,
    options: RunOptions,
    *,
    dtype: str | None = None,
    tied_head: bool = False,
    tokenizer: Any = None,
    changes: Changes | None = None,
) -> LanguageModel:
    """Loads the weights as the options say; `dtype` overrides them, and `changes` are made to them."""
    device = pick_device(options.device)
    computing = pick_dtype(dtype or options.dtype, device, subject.stored_dtype)
    placement = placement_of(subject, options, computing, device)
    way = "streamed through memory layer by layer" if placement.streamed else "in memory"
    level = logging.WARNING if placement.streamed and options.memory == "auto" else logging.INFO
    log.log(level, "%s on %s in %s: weights %s (%s)", subject.name, device, computing, way, placement.reason)
    common: dict[str, Any] = {
        "device": device,
        "dtype": computing,
        "batch_size": options.batch_size,
        "trust_remote_code": options.trust_remote_code,
        "tied_head": tied_head,
        "tokenizer": tokenizer,
        "changes": changes,
    }
    if not placement.streamed:
        return load_resident(subject.folder, subject.plan, spread=placement.spread, **common)
    scratch = options.scratch or Path(tempfile.gettempdir())
    return load_streamed(subject.checkpoint, subject.plan, placement, scratch=scratch, **common)


def placement_of(
    subject: Subject, options: RunOptions, dtype: torch.dtype, device: torch.device, fetched: bool = False
) -> Placement:
    """Where the weights will be while the model runs, by what it needs and what there is.

    Args:
        fetched: as if its shards came and went, whether they do or not.
    """
    placing = place if subject.checkpoint.keeper is None and not fetched else place_fetched
    return placing(parse_memory(options.memory), _need(subject, options, dtype), device)


def _need(subject: Subject, options: RunOptions, dtype: torch.dtype) -> Need:
    blueprint = read_blueprint(subject.folder, subject.checkpoint.config, options.trust_remote_code)
    shapes = {name: shape for name, shape in blueprint.shapes.items() if name not in blueprint.aliases}
    return need_of(shapes, subject.plan.runtime.layers, dtype.itemsize)


def tokenizer_of(subject: Subject, options: RunOptions) -> Any:
    """The checkpoint's tokenizer."""
    return load_tokenizer(subject.folder, options.trust_remote_code)


def versions() -> dict[str, str]:
    """Versions of everything that the result may depend on."""
    import platform
    from importlib.metadata import version

    packages: Sequence[str] = ("abliterate", "torch", "transformers", "safetensors", "huggingface_hub")
    return {name: version(name) for name in packages} | {"python": platform.python_version()}
