"""Versions: of Python, of what is required, of what is optional; and whether libraries load and do what they did."""

import importlib
import importlib.util
import platform
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import InvalidVersion, Version

import abliterate
from abliterate.doctor.report import Fact, Finding, Section, anonymous
from abliterate.errors import first_line

TESTED_PYTHON = ((3, 11), (3, 13))
TESTED = {"torch": "2.13", "transformers": "5.24"}
"""The newest minor versions that all tests of this release ran with."""
FIRST = ("torch", "transformers", "safetensors", "accelerate", "huggingface_hub")
EXTRAS = ("datasets", "parquet", "eval", "fast", "search")
"""For users; `dev` and `fuzz` are for developers."""
COMPANIONS = ("torchvision", "torchaudio")
"""Not required, but transformers loads them where they are, and one that was built for another torch breaks it."""


def software() -> Section:
    """Versions, and what is missing, too old, newer than what was tested, or does not load."""
    stated = requirements()
    facts: dict[str, Fact] = {
        "abliterate": abliterate.__version__,
        "python": platform.python_version(),
        **{name: _installed(name) for name in FIRST},
    }
    findings = [*_python(), *unmet(need for need in stated if need.marker is None), *newer()]
    if not stated:
        findings.append(
            Finding("note", "abliterate is not installed, so that its requirements are not known", "pip install .")
        )
    return Section("versions", facts, (*findings, *unloadable()))


def extras() -> Section:
    """Which optional packages are there."""
    facts: dict[str, Fact] = {}
    for extra in EXTRAS:
        for need in requirements():
            if need.marker is not None and need.marker.evaluate({"extra": extra}) and need.name != "abliterate":
                facts[extra] = _of(need)
    return Section("extras", facts)


def fast_path() -> Section:
    """Whether layers can be loaded one by one through transformers' own conversion; see `architecture.conversion`."""
    try:
        from abliterate.architecture.conversion import trouble

        reason = trouble()
    except Exception as error:  # libraries that do not load, for any reason
        reason = first_line(error)
    if reason is None:
        return Section("streaming", {"fast_path": "works"})
    hint = f"results are the same; pip install 'transformers=={TESTED['transformers']}.*' brings the fast path back"
    note = Finding("note", f"streamed weights load the slow way ({anonymous(reason)})", hint)
    return Section("streaming", {"fast_path": f"not usable: {anonymous(reason)}"}, (note,))


def requirements() -> list[Requirement]:
    """What this installation says that it needs; nothing where it runs from a source tree that is not installed."""
    try:
        return [Requirement(text) for text in requires("abliterate") or []]
    except (PackageNotFoundError, InvalidRequirement):
        return []


def unmet(needs: Iterable[Requirement]) -> list[Finding]:
    """Required packages that are missing or too old."""
    found = []
    for need in needs:
        installed = _installed(need.name)
        if installed is None:
            found.append(Finding("broken", f"{need.name} is missing", f"pip install '{need}'"))
        elif not need.specifier.contains(installed, prereleases=True):
            what = f"{need.name} {installed} is not supported; needed is {need.specifier}"
            found.append(Finding("broken", what, f"pip install '{need}'"))
    return found


def newer() -> list[Finding]:
    """Libraries of a minor version above the one that tests ran with."""
    found = []
    for name, tested in TESTED.items():
        installed = _installed(name)
        if installed is not None and _minor(installed) > _minor(tested):
            what = f"{name} {installed} is newer than what this release was tested with ({tested})"
            found.append(Finding("note", what, f"if something fails, try: pip install '{name}=={tested}.*'"))
    return found


def unloadable() -> list[Finding]:
    """Libraries that are there and cannot be imported."""
    found = []
    for name in ("torch", *COMPANIONS, "transformers"):
        if name in COMPANIONS and importlib.util.find_spec(name) is None:
            continue
        try:
            importlib.import_module(name)
        except Exception as error:  # binaries that do not fit raise errors of many kinds
            again = f"pip uninstall {name}" if name in COMPANIONS else f"pip install --force-reinstall {name}"
            found.append(Finding("broken", f"{name} does not load: {anonymous(first_line(error))}", again))
    return found


def _python() -> list[Finding]:
    first, last = TESTED_PYTHON
    if first <= sys.version_info[:2] <= last:
        return []
    what = f"Python {platform.python_version()} is not among those that were tested"
    return [Finding("note", what, f"use Python {first[0]}.{first[1]} to {last[0]}.{last[1]}")]


def _of(need: Requirement) -> str:
    installed = _installed(need.name)
    return f"{need.name} {installed}" if installed else f"not installed ({need.name})"


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _minor(text: str) -> tuple[int, ...]:
    try:
        return Version(text).release[:2]
    except InvalidVersion:
        return ()
