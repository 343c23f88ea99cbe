"""Looks at everything, in the order in which it is told."""

from collections.abc import Callable

from abliterate.doctor.hub import hub
from abliterate.doctor.machine import devices, disks, memory, system
from abliterate.doctor.report import Examination, Section
from abliterate.doctor.software import extras, fast_path, software

PARTS: tuple[Callable[[], Section], ...] = (software, extras, system, devices, memory, disks, hub, fast_path)


def examine() -> Examination:
    """What a bug report should say. Works where libraries do not load, and says so."""
    return Examination(tuple(part() for part in PARTS))
