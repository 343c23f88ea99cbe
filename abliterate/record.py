"""What is written down about a run: dataclasses of every room to the manifest's plain nested mapping."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from abliterate.architecture.writer import Writer
from abliterate.calibration.chat import ChatFormat
from abliterate.calibration.model import LanguageModel
from abliterate.calibration.prompts import PromptSplit
from abliterate.certify.certificate import Certificate, worst_writer
from abliterate.certify.stream import StreamResidual
from abliterate.certify.weights import WriterResidual
from abliterate.checkpoint.rewrite import ShardRecord
from abliterate.direction.means import Mean
from abliterate.direction.screening import Selection
from abliterate.edit.cut import Cut
from abliterate.evaluation.sets import Evaluation, differences
from abliterate.find import FoundDirection
from abliterate.publish.manifest import SCHEMA
from abliterate.subject import RunOptions, Subject, versions


@dataclass(frozen=True)
class DirectionRecord:
    """The direction that was used: hash of its file, where it comes from, its width."""

    sha256: str
    source: str
    hidden_size: int


@dataclass(frozen=True)
class EditRecord:
    """What the edit did beside the writers themselves."""

    head: str
    added: tuple[str, ...]
    config_changes: Mapping[str, Any]
    forms: Mapping[str, str]


def base_record(subject: Subject, shards: Sequence[ShardRecord]) -> dict[str, Any]:
    """The checkpoint that was read."""
    source = subject.source
    return {
        "id": subject.name,
        "source": "hub" if source.model_id else "local",
        "revision": source.revision,
        "commit": source.commit,
        "model_type": subject.plan.model_type,
        "dtype": sorted({info.dtype for info in subject.checkpoint.tensors.values()}),
        "shards": [
            {"name": header.path.name, "sha256": shard.sha256_in, "bytes": header.file_size}
            for header, shard in zip(subject.checkpoint.shards, shards, strict=True)
        ],
    }


def _prompts_record(split: PromptSplit, mean: Mean) -> dict[str, Any]:
    digest = hashlib.sha256("".join(p.sha256 for p in (split.train, split.validation, split.test)).encode())
    return {
        "source": split.train.source,
        "sha256": digest.hexdigest(),
        "train": len(split.train.instructions),
        "validation": len(split.validation.instructions),
        "kept": mean.kept,
    }


def _chat_record(chat: ChatFormat, tokenizer: Any) -> dict[str, Any]:
    return {
        "template_source": chat.source,
        "template_sha256": hashlib.sha256(chat.template.encode()).hexdigest(),
        "system_prompt": chat.system_prompt,
        "thinking": chat.thinking,
        "post_instruction_tokens": [tokenizer.decode([token]) for token in chat.post_instruction],
    }


def calibration_record(found: FoundDirection, model: LanguageModel, options: RunOptions) -> dict[str, Any]:
    """Prompts, chat format, refusal tokens, and how the model was run."""
    tokens = found.refusal_tokens
    return {
        "harmful": _prompts_record(found.prompts.harmful, found.directions.harmful),
        "harmless": _prompts_record(found.prompts.harmless, found.directions.harmless),
        "chat": _chat_record(found.chat, model.tokenizer),
        "refusal_tokens": {
            "source": tokens.source,
            "tokens": [{"id": i, "text": text} for i, text in zip(tokens.ids, tokens.texts, strict=True)],
        },
        "seed": options.seed,
        "device": model.device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "batch_size": model.batch_size,
    }


def selection_record(selection: Selection, thresholds: Mapping[str, Any]) -> dict[str, Any]:
    """Scores of every candidate, the pick and why."""
    choice = selection.choice
    pick = {key: value for key, value in asdict(choice.pick).items() if key not in ("prompts", "status")}
    return {
        "method": selection.method,
        "forward_passes": selection.passes,
        "exhaustive_forward_passes": selection.exhaustive_passes,
        "thresholds": dict(thresholds),
        "relaxed": choice.relaxed,
        "reason": choice.reason,
        "pick": pick,
        "candidates": [asdict(candidate) for candidate in choice.candidates],
        "baseline": {"harmful": selection.baseline_harmful, "harmless": selection.baseline_harmless},
    }


def _writer_record(residual: WriterResidual, writer: Writer, forms: Mapping[str, str]) -> dict[str, Any]:
    return {
        "tensor": residual.tensor,
        "kind": writer.kind,
        "axis": writer.axis,
        "form": forms.get(residual.tensor, "plain"),
        "gain": " * ".join(step.tensor for step in writer.gain if step.tensor) or None,
        "residual_before": residual.before,
        "residual_after": residual.after,
        "residual_wanted": residual.left,
        "strength": residual.strength,
        "tolerance": residual.tolerance,
        "holds": residual.holds,
    }


def removal_record(cut: Cut) -> dict[str, Any]:
    """How many directions are removed, whether layers have their own, and strengths where they are not all one."""
    strengths = None
    if cut.uniform_strength is None:
        strengths = {"outside": cut.stem, "layers": [[float(value) for value in row] for row in cut.strengths]}
    return {
        "directions": cut.bases.shape[1],
        "per_layer": len(cut.bases) > 1,
        "strengths": strengths,
        "norms": "kept" if cut.keep_norms else "free",
    }


def edit_record(subject: Subject, cut: Cut, edit: EditRecord, certificate: Certificate) -> dict[str, Any]:
    """Every writer with its residuals, and what else changed."""
    edited = {writer.tensor: writer for writer in subject.plan.edited}
    kept = [residual for residual in certificate.writers if residual.strength]
    return {
        "family": subject.plan.family,
        "probed": subject.plan.probed,
        "inexact": subject.plan.inexact,
        "head": edit.head,
        "strength": cut.uniform_strength,
        "removes": removal_record(cut),
        "writers": [_writer_record(residual, edited[residual.tensor], edit.forms) for residual in kept],
        "added": list(edit.added),
        "config_changes": dict(edit.config_changes),
    }


def certificate_record(certificate: Certificate) -> dict[str, Any]:
    """Both parts of the certificate."""
    worst = worst_writer(certificate.writers)
    return {
        "holds": certificate.holds,
        "exact": certificate.exact and certificate.holds,
        "claim": certificate.claim,
        "writers": {
            "checked": len(certificate.writers),
            "worst": None if worst is None else _worst_record(worst),
            "failed": [writer.tensor for writer in certificate.failed_writers],
        },
        "stream": _stream_record(certificate.stream, certificate),
    }


def _worst_record(worst: WriterResidual) -> dict[str, Any]:
    return {"tensor": worst.tensor, "residual_after": worst.after, "tolerance": worst.tolerance}


def _stream_record(stream: StreamResidual, certificate: Certificate) -> dict[str, Any]:
    return {
        "before": certificate.stream_before.worst if certificate.stream_before else None,
        "after": stream.worst,
        "tolerance": certificate.tolerance,
        "text": certificate.text,
        "tokens": stream.tokens,
        "layers": list(stream.layers),
        "holds": stream.holds(certificate.tolerance),
        "first_failure": stream.first_failure(certificate.tolerance) if certificate.exact else None,
    }


def evaluation_record(base: Evaluation, edited: Evaluation) -> dict[str, Any]:
    """Before and after, and what changed prompt by prompt; without the samples."""
    changes = {name: asdict(change) for name, change in differences(base, edited).items()}
    return {"base": figures_record(base), "edited": figures_record(edited), "differences": changes}


def figures_record(evaluation: Evaluation) -> dict[str, Any]:
    """An evaluation without the samples."""
    return {name: value for name, value in asdict(evaluation).items() if name != "samples"}


def output_shards(shards: Sequence[ShardRecord]) -> list[dict[str, Any]]:
    """Name, hash and size of every shard written."""
    return [{"name": shard.name, "sha256": shard.sha256_out, "bytes": shard.bytes} for shard in shards]


def finite(value: float | None) -> float | None:
    """The value, or None where it is not a finite number."""
    return value if value is not None and math.isfinite(value) else None


def tool_record() -> dict[str, str]:
    """Versions of what made the result."""
    wanted = ("abliterate", "torch", "transformers", "safetensors", "python")
    return {name: version for name, version in versions().items() if name in wanted}


def schema_record() -> str:
    """The manifest's schema name."""
    return SCHEMA
