"""Certifies files on disk: their bytes for the writers, a forward pass in fp32 for the stream."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from abliterate.calibration.chat import ChatFormat, make_chat_format
from abliterate.calibration.load import Changes, has_tokenizer, load_tokenizer
from abliterate.calibration.model import LanguageModel
from abliterate.calibration.pictures import picture_inputs
from abliterate.calibration.prompts import builtin
from abliterate.certify.certificate import Certificate, TextKind
from abliterate.certify.stream import StreamResidual, joined, measure_picture, measure_stream
from abliterate.certify.weights import tolerance, writer_residuals
from abliterate.checkpoint.files import Checkpoint
from abliterate.edit.cut import Cut
from abliterate.edit.edits import Projectors
from abliterate.errors import CalibrationError
from abliterate.prompting import encode, encode_plain, neutral_paragraphs
from abliterate.subject import RunOptions, Subject, load_model

log = logging.getLogger(__name__)

STREAM_PROMPTS, RANDOM_LENGTH = 16, 32


@dataclass(frozen=True)
class StreamText:
    """What runs through the model for the stream part.

    Attributes:
        prompts: token ids. `kind`: what they are.
        picture: inputs with a picture, for models that take some.
        unseen: why no picture runs through a model that takes some; None where one does, or there is nothing to see.
    """

    prompts: Sequence[Sequence[int]]
    kind: TextKind
    picture: Mapping[str, Tensor] | None = None
    unseen: str | None = None


@dataclass(frozen=True)
class Tongue:
    """How text becomes tokens: the tokenizer, and the chat format; either may be missing (a base model, a bare one)."""

    tokenizer: Any | None
    chat: ChatFormat | None


def tongue_of(subject: Subject, options: RunOptions, thinking: str = "auto") -> Tongue:
    """The checkpoint's tokenizer and chat format; no chat format where it has no template and none is asked for.

    Raises:
        CalibrationError: there is a tokenizer, or a template was asked for, and it cannot be used.
    """
    try:
        tokenizer = load_tokenizer(subject.folder, options.trust_remote_code)
    except CalibrationError:
        if options.template is not None or has_tokenizer(subject.folder):
            raise
        return Tongue(None, None)
    if options.template is None and not getattr(tokenizer, "chat_template", None):
        return Tongue(tokenizer, None)
    chat = make_chat_format(tokenizer, options.template, options.system_prompt, thinking=thinking)  # type: ignore[arg-type]
    return Tongue(tokenizer, chat)


def stream_text(subject: Subject, tongue: Tongue, trust_remote_code: bool = False) -> StreamText:
    """Held-out prompts in the chat format, else neutral text, else seeded random tokens; and a picture, if it sees."""
    text = _text(subject, tongue)
    if not subject.plan.sees:
        return text
    try:
        return replace(text, picture=picture_inputs(subject.folder, trust_remote_code))
    except CalibrationError as error:
        log.warning("no picture runs through the model: %s", error)
        return replace(text, unseen=str(error))


def _text(subject: Subject, tongue: Tongue) -> StreamText:
    if tongue.chat is not None:
        half = STREAM_PROMPTS // 2
        sets = (builtin("harmful").test, builtin("harmless").test)
        return StreamText([tokens for prompts in sets for tokens in encode(tongue.chat, prompts)[:half]], "chat")
    if tongue.tokenizer is not None:
        return StreamText(encode_plain(tongue.tokenizer, neutral_paragraphs()[:STREAM_PROMPTS]), "plain")
    rows = subject.checkpoint.tensors[subject.plan.embedding].shape[0]
    ids = torch.randint(0, rows, (STREAM_PROMPTS, RANDOM_LENGTH), generator=torch.Generator().manual_seed(0))
    return StreamText(ids.tolist(), "random")


def certify_stream(
    subject: Subject, options: RunOptions, text: StreamText, direction: Tensor, changes: Changes | None = None
) -> StreamResidual:
    """The stream part, in fp32; on the CPU where the device has no room for that. `changes` are made to weights."""
    try:
        model = load_model(subject, options, dtype="float32", changes=changes)
        return run_stream(model, subject, options, text, direction)
    except torch.OutOfMemoryError:
        log.warning("the device has no room for the weights in float32: the certificate is measured on the CPU")
    model = load_model(subject, replace(options, device="cpu"), dtype="float32", changes=changes)
    return run_stream(model, subject, options, text, direction)


def run_stream(
    model: LanguageModel, subject: Subject, options: RunOptions, text: StreamText, direction: Tensor
) -> StreamResidual:
    """Runs prompts, and the picture where there is one, through a loaded model and measures."""
    pulled = Projectors(subject.checkpoint, subject.plan.hidden_size, direction).boundaries(subject.plan)
    found = measure_stream(model, text.prompts, direction, options.progress, pulled)
    if text.picture is None:
        return found
    return joined(found, measure_picture(model, text.picture, direction, options.progress, pulled))


def assemble(
    edited: Subject,
    base: Checkpoint | None,
    cut: Cut,
    text: StreamText,
    stream: StreamResidual,
    stream_before: StreamResidual | None,
) -> Certificate:
    """Reads every stored writer, and holds both parts to the tolerances of what they are stored in (DESIGN 3.5)."""
    writers = writer_residuals(edited.checkpoint, edited.plan, cut, base)
    bound = max(tolerance(dtype, edited.plan.hidden_size, "stream") for dtype in edited.dtypes)
    return Certificate(writers, stream, stream_before, bound, text.kind, cut.leaves, edited.plan.inexact)
