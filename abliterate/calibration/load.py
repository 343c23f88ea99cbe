"""From a checkpoint folder to a model in memory, with nothing missing and nothing made up."""

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from abliterate.architecture.conversion import quiet_transformers
from abliterate.architecture.writer import Plan
from abliterate.calibration.model import LanguageModel
from abliterate.calibration.tour import find_stream
from abliterate.checkpoint.read import Change
from abliterate.errors import AbliterateError, ArchitectureError, CalibrationError, CheckpointError, first_line

log = logging.getLogger(__name__)
Changes = Mapping[str, Change]
"""By parameter of the running model, what its weights become once they are loaded."""
BLOCK_ELEMENTS = 1 << 24
"""Of a parameter, that are changed at once."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA, then MPS, then the CPU; a device that is not there is an error."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if available[kind]))
    if not available.get(name.partition(":")[0], False):
        raise AbliterateError(f"device {name} is not available here; use --device auto or cpu")
    return torch.device(name)


def pick_dtype(name: str, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """`auto` computes in the stored dtype where the device is fast at it, else in float32."""
    if name != "auto":
        return DTYPES[name]
    half = stored in (torch.bfloat16, torch.float16)
    fast = device.type != "cpu" or (stored == torch.bfloat16 and cpu_has_bfloat16())
    return stored if half and fast else torch.float32


def cpu_has_bfloat16() -> bool:
    """Whether the processor itself computes in bfloat16, so that `auto` does."""
    capabilities = getattr(torch.backends.cpu, "get_cpu_capability", lambda: "")()
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return bool(native) and "AVX512" in capabilities


def load_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    """The checkpoint's tokenizer.

    Raises:
        CalibrationError: there is none, or it cannot be read.
    """
    # transformers makes empty ones for some model types where there are no files.
    if not has_tokenizer(folder) and not trust_remote_code:
        raise CalibrationError(f"no usable tokenizer in {folder}: it has no tokenizer files")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # what the libraries raise for damaged files has no common base
        raise CalibrationError(f"no usable tokenizer in {folder}: {first_line(error)}") from error
    # Where no tokenizer's files are there, transformers makes an empty one for some families (Qwen, Gemma, GPT-2).
    if set(tokenizer("plain words", add_special_tokens=False)["input_ids"]) <= set(tokenizer.all_special_ids):
        raise CalibrationError(f"no usable tokenizer in {folder}: it has no vocabulary")
    return tokenizer


def has_tokenizer(folder: Path) -> bool:
    """Whether the checkpoint brings any file of a tokenizer."""
    patterns = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken")
    return any(path.is_file() for pattern in patterns for path in folder.glob(pattern))


def load_resident(
    folder: Path,
    plan: Plan,
    *,
    device: torch.device,
    dtype: torch.dtype,
    batch_size: int | None = None,
    trust_remote_code: bool = False,
    tied_head: bool = False,
    tokenizer: Any = None,
    spread: bool = False,
    changes: Changes | None = None,
) -> LanguageModel:
    """Loads the whole model.

    Args:
        folder: the checkpoint.
        plan: its residual writers.
        batch_size: prompts a forward pass; None takes 16 on a CPU and 32 elsewhere.
        tied_head: ablations also reach the head, as they do when a tied embedding is edited.
        tokenizer: None where nothing will be generated.
        spread: over all GPUs, as accelerate finds best.
        changes: made to the weights; see `Changes`.

    Raises:
        CheckpointError: weights are missing, unexpected, or of the wrong shape.
    """
    settings = {"device_map": "auto"} if spread else {}
    model = from_pretrained(folder, plan, dtype, trust_remote_code, **settings)
    if not spread:
        model = model.to(device)
    change(model, changes or {})
    stream = find_stream(model, plan, tied_head)
    return LanguageModel(model, tokenizer, stream, head_of(model, plan), batch_size or prompts_a_pass(device))


def change(model: nn.Module, changes: Changes, only: Collection[str] | None = None) -> None:
    """Changes parameters in place, in blocks of rows.

    Args:
        only: these parameters, of those that there are changes for.
    """
    for name in changes if only is None else [name for name in only if name in changes]:
        weights = model.get_parameter(name).data
        step = max(1, BLOCK_ELEMENTS // max(1, weights[0].numel()))
        for first in range(0, len(weights), step):
            rows = slice(first, min(len(weights), first + step))
            weights[rows] = changes[name](rows, weights[rows])


def prompts_a_pass(device: torch.device) -> int:
    """The batch size where none is asked for."""
    return 16 if device.type == "cpu" else 32


def from_pretrained(folder: Path, plan: Plan, dtype: torch.dtype, trust_remote_code: bool, **settings: Any) -> Any:
    """What transformers makes of a checkpoint, held against what it should be.

    Raises:
        CheckpointError: see `load_resident`.
    """
    known = getattr(transformers, plan.runtime.class_name, AutoModelForCausalLM)
    with quiet_transformers():
        try:
            model, report = known.from_pretrained(
                folder,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                local_files_only=True,
                output_loading_info=True,
                **settings,
            )
        except Exception as error:  # damaged weights and configs raise errors of many kinds, some of them plain ones
            reason = first_line(error)
            raise CheckpointError(f"transformers {transformers.__version__} cannot load {folder}: {reason}") from error
    for kind in ("missing_keys", "mismatched_keys"):
        if report.get(kind):
            names = ", ".join(sorted(map(str, report[kind]))[:3])
            raise CheckpointError(f"{folder} does not fill its own model: {kind.replace('_', ' ')} {names}")
    if report.get("unexpected_keys"):
        log.warning("%s holds %d tensors that transformers does not use", folder, len(report["unexpected_keys"]))
    return model.eval().requires_grad_(False)


def head_of(model: nn.Module, plan: Plan) -> nn.Module:
    """The output head; where the model does not own up to it, by its name."""
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        head = next((m for name, m in model.named_modules() if name.endswith("lm_head")), None)
    if head is None:
        raise ArchitectureError(f"{plan.runtime.class_name} has no output head: it generates no text")
    return head
