"""Project the refusal direction out of a checkpoint, exactly, and prove it.

The command line's verbs are functions here: `convert`, `adapt`, `make_patch`, `apply_patch`, `find_direction`,
`plan`, `push`, `verify`, `evaluate`, `compare`, `audit_model`, `diff` and `inspect`. They are loaded when first used,
so that `import abliterate` costs nothing.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from abliterate.adapting import Adapted, adapt
    from abliterate.architecture.writer import Plan
    from abliterate.audit.study import AuditSize
    from abliterate.auditing import AuditReport, audit_model
    from abliterate.certify.certificate import Certificate
    from abliterate.comparing import compare
    from abliterate.conversion import Conversion, convert
    from abliterate.differing import Difference, diff
    from abliterate.errors import AbliterateError
    from abliterate.find import FoundDirection, find_direction
    from abliterate.hub.repository import Destination, destination
    from abliterate.inspecting import Inspection, inspect
    from abliterate.measuring import EvaluationReport, Extras, evaluate
    from abliterate.patch.applying import Applied, apply_patch
    from abliterate.patch.making import make_patch
    from abliterate.planning import plan
    from abliterate.progress import Progress
    from abliterate.pushing import Pushed, push
    from abliterate.recipe import Recipe, load_recipe
    from abliterate.subject import RunOptions
    from abliterate.verification import Verification, verify

__all__ = [
    "AbliterateError",
    "Adapted",
    "Applied",
    "AuditReport",
    "AuditSize",
    "Certificate",
    "Conversion",
    "Destination",
    "Difference",
    "EvaluationReport",
    "Extras",
    "FoundDirection",
    "Inspection",
    "Plan",
    "Progress",
    "Pushed",
    "Recipe",
    "RunOptions",
    "Verification",
    "adapt",
    "apply_patch",
    "audit_model",
    "compare",
    "convert",
    "destination",
    "diff",
    "evaluate",
    "find_direction",
    "inspect",
    "load_recipe",
    "make_patch",
    "plan",
    "push",
    "verify",
]

_HOMES = {
    "AbliterateError": "errors",
    "Adapted": "adapting",
    "Applied": "patch.applying",
    "AuditReport": "auditing",
    "AuditSize": "audit.study",
    "Certificate": "certify.certificate",
    "Conversion": "conversion",
    "Destination": "hub.repository",
    "Difference": "differing",
    "EvaluationReport": "measuring",
    "Extras": "measuring",
    "FoundDirection": "find",
    "Inspection": "inspecting",
    "Plan": "architecture.writer",
    "Progress": "progress",
    "Pushed": "pushing",
    "Recipe": "recipe",
    "RunOptions": "subject",
    "Verification": "verification",
    "adapt": "adapting",
    "apply_patch": "patch.applying",
    "audit_model": "auditing",
    "compare": "comparing",
    "convert": "conversion",
    "destination": "hub.repository",
    "diff": "differing",
    "evaluate": "measuring",
    "find_direction": "find",
    "inspect": "inspecting",
    "load_recipe": "recipe",
    "make_patch": "patch.making",
    "plan": "planning",
    "push": "pushing",
    "verify": "verification",
}

try:
    __version__ = version("abliterate")
except PackageNotFoundError:
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"abliterate.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'abliterate' has no attribute {name!r}")
