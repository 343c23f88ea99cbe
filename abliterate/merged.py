"""What an adapter does once it is merged: measured on its stored files, without writing a merged checkpoint."""

from dataclasses import dataclass
from pathlib import Path

from abliterate.adapter.files import CONFIG, WEIGHTS
from abliterate.adapter.making import Adapter
from abliterate.adapter.merging import Merge, read_merge
from abliterate.architecture.blueprint import Blueprint
from abliterate.certify.certificate import Certificate
from abliterate.certify.stream import StreamResidual
from abliterate.certify.weights import tolerance, writer_residuals
from abliterate.evaluation.metrics import evaluate_model
from abliterate.evaluation.sets import Measured
from abliterate.job import BaseFindings, Job
from abliterate.proving import certify_stream
from abliterate.stages import Stages
from abliterate.subject import load_model


@dataclass(frozen=True)
class Merged:
    """What the base is with the adapter merged into it, in the dtype that it is stored in.

    Attributes:
        certificate: of the writers that the adapter holds, and of the stream.
        evaluation: None where nothing is evaluated.
    """

    certificate: Certificate
    evaluation: Measured | None


def prove_merged(
    job: Job, blueprint: Blueprint, findings: BaseFindings, adapter: Adapter, folder: Path, stages: Stages
) -> Merged:
    """Reads the adapter's two files and merges them into the base's weights as these are read or loaded.

    Nothing of the base is written: memory and disk are those of running the base.

    Raises:
        AbliterateError: the base cannot be read or run.
    """
    checkpoint, content = job.subject.checkpoint, [(folder / name).read_bytes() for name in (CONFIG, WEIGHTS)]
    merge = read_merge(content[0], content[1], adapter.targets, checkpoint, blueprint)
    certificate = _certificate(job, findings, merge, stages)
    if findings.data is None:
        return Merged(certificate, None)
    return Merged(certificate, stages.stage("evaluation after", Measured, lambda: _evaluated(job, findings, merge)))


def _certificate(job: Job, findings: BaseFindings, merge: Merge, stages: Stages) -> Certificate:
    subject, cut, text = job.subject, findings.cut, findings.text
    stream = stages.stage(
        "stream after",
        StreamResidual,
        lambda: certify_stream(subject, job.options, text, cut.main, merge.parameters),
    )
    writers = writer_residuals(subject.checkpoint, subject.plan, cut, subject.checkpoint, merge.tensors)
    bound = max(tolerance(dtype, subject.plan.hidden_size, "stream") for dtype in subject.dtypes)
    return Certificate(writers, stream, findings.stream, bound, text.kind, cut.leaves, subject.plan.inexact)


def _evaluated(job: Job, findings: BaseFindings, merge: Merge) -> Measured:
    assert findings.data is not None and findings.evaluation is not None
    model = load_model(job.subject, job.options, tokenizer=job.tongue.tokenizer, changes=merge.parameters)
    return evaluate_model(model, findings.data, findings.evaluation, job.options.progress, "after")
