"""The machine: processor, devices, memory and disks, as commands would find them."""

import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import psutil

from abliterate.doctor.report import Fact, Finding, Section, anonymous
from abliterate.errors import first_line

LITTLE_MEMORY = 2 << 30
"""Below this not even small models are converted in comfort: libraries and activations take 1 GB."""
LITTLE_DISK = 1 << 30
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "fma", "f16c", "asimd", "sve", "bf16", "i8mm")
"""Of processors, those that decide how fast and in which dtype torch computes."""
VARIABLES = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PYTORCH_ALLOC_CONF")
_CPUINFO = Path("/proc/cpuinfo")


def system() -> Section:
    """The operating system and the processor."""
    model, flags = cpu_details()
    cores = psutil.cpu_count(logical=False)
    facts: dict[str, Fact] = {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": model or platform.processor() or "unknown",
        "cores": f"{_usable_cores()} usable of {psutil.cpu_count()} ({cores or 'unknown'} physical)",
        "flags": " ".join(flags) or "none known",
    }
    return Section("system", facts | {name: os.environ[name] for name in VARIABLES if name in os.environ})


def cpu_details() -> tuple[str | None, tuple[str, ...]]:
    """Name and flags of the processor, where the system tells them."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None, ()
    said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    known = set((said.get("flags") or said.get("Features") or "").split())
    return said.get("model name"), tuple(flag for flag in FLAGS if flag in known)


def devices() -> Section:
    """What models can run on, and in which dtype they would."""
    try:
        import torch

        from abliterate.calibration.load import cpu_has_bfloat16
    except Exception:  # is told among the versions
        return Section("devices", {"torch": "does not load"})
    bfloat16 = "bfloat16 is native" if cpu_has_bfloat16() else "bfloat16 is not native: auto computes in float32"
    capability = torch.backends.cpu.get_cpu_capability()
    facts: dict[str, Fact] = {"cpu": f"{torch.get_num_threads()} threads, {capability}, {bfloat16}"}
    findings: list[Finding] = []
    built = torch.version.cuda or getattr(torch.version, "hip", None)
    facts["cuda"] = f"torch is built for {built}" if built else "torch is built without it"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts |= _gpu(index)
    elif built and _driver():
        hint = "update the driver, or install a torch built for it (https://pytorch.org/get-started/locally)"
        findings.append(Finding("note", "there is an NVIDIA driver, but torch sees no GPU", hint))
    facts["mps"] = "available" if torch.backends.mps.is_available() else "not available"
    return Section("devices", facts, tuple(findings))


def _gpu(index: int) -> dict[str, Fact]:
    import torch

    free, total = torch.cuda.mem_get_info(index)
    name = f"cuda:{index}"
    return {name: torch.cuda.get_device_name(index), f"{name}_free_bytes": free, f"{name}_total_bytes": total}


def _driver() -> bool:
    return Path("/proc/driver/nvidia/version").exists()


def memory() -> Section:
    """What `--memory auto` would go by, and who sets the limit."""
    total = psutil.virtual_memory().total
    try:
        from abliterate.calibration.memory import limits

        left = limits()
    except Exception as error:  # torch is loaded there
        return Section("memory", {"total_bytes": total, "limits": f"not known: {anonymous(first_line(error))}"})
    auto = max(0, min(left.values()))
    facts: dict[str, Fact] = {"total_bytes": total, "auto_bytes": auto, "swap_bytes": psutil.swap_memory().total}
    facts |= {f"left_by_{name.replace(' -', '_')}_bytes": size for name, size in left.items()}
    facts["limited_by"] = min(left, key=lambda name: left[name])
    if auto >= LITTLE_MEMORY:
        return Section("memory", facts)
    hint = "close other programs, or raise the limit; --memory streamed holds one layer at a time"
    return Section("memory", facts, (Finding("note", "little memory is left", hint),))


def disks() -> Section:
    """Free space where results, temporary files and downloads go."""
    facts: dict[str, Fact] = {}
    findings: list[Finding] = []
    places: dict[str, Callable[[], Path]] = {"this_folder": Path.cwd, "temporary_files": _temporary}
    for name, place in places.items():
        try:
            folder = place()
            facts[name], facts[f"{name}_free_bytes"] = anonymous(folder), shutil.disk_usage(folder).free
        except OSError as error:
            facts[name] = f"not usable: {anonymous(first_line(error))}"
            findings.append(
                Finding("broken", f"{_spaced(name)}: {facts[name]}", "set TMPDIR to a folder that can be written to")
            )
            continue
        if int(facts[f"{name}_free_bytes"] or 0) < LITTLE_DISK:
            findings.append(
                Finding("note", f"less than 1 GB is free for {_spaced(name)} ({facts[name]})", "free some space")
            )
    return Section("disk", facts, tuple(findings))


def _spaced(name: str) -> str:
    return name.replace("_", " ")


def _temporary() -> Path:
    """The folder, once a file could be made in it."""
    with tempfile.TemporaryFile():
        return Path(tempfile.gettempdir())


def _usable_cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
