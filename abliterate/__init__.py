"""Project the refusal direction out of a checkpoint, exactly, and prove it.

The command line's verbs are functions here: `convert`, `find_direction`, `plan`, `verify`, `evaluate`, `audit_model`,
`diff` and `inspect`. They are loaded when first used, so that `import abliterate` costs nothing.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from abliterate.architecture.writer import Plan
    from abliterate.auditing import AuditReport, audit_model
    from abliterate.certify.certificate import Certificate
    from abliterate.conversion import Conversion, convert
    from abliterate.differing import Difference, diff
    from abliterate.errors import AbliterateError
    from abliterate.find import FoundDirection, find_direction
    from abliterate.inspecting import Inspection, inspect
    from abliterate.measuring import EvaluationReport, evaluate
    from abliterate.planning import plan
    from abliterate.progress import Progress
    from abliterate.recipe import Recipe, load_recipe
    from abliterate.subject import RunOptions
    from abliterate.verification import Verification, verify

__all__ = [
    "AbliterateError",
    "AuditReport",
    "Certificate",
    "Conversion",
    "Difference",
    "EvaluationReport",
    "FoundDirection",
    "Inspection",
    "Plan",
    "Progress",
    "Recipe",
    "RunOptions",
    "Verification",
    "audit_model",
    "convert",
    "diff",
    "evaluate",
    "find_direction",
    "inspect",
    "load_recipe",
    "plan",
    "verify",
]

_HOMES = {
    "AbliterateError": "errors",
    "AuditReport": "auditing",
    "Certificate": "certify.certificate",
    "Conversion": "conversion",
    "Difference": "differing",
    "EvaluationReport": "measuring",
    "FoundDirection": "find",
    "Inspection": "inspecting",
    "Plan": "architecture.writer",
    "Progress": "progress",
    "Recipe": "recipe",
    "RunOptions": "subject",
    "Verification": "verification",
    "audit_model": "auditing",
    "convert": "conversion",
    "diff": "differing",
    "evaluate": "measuring",
    "find_direction": "find",
    "inspect": "inspecting",
    "load_recipe": "recipe",
    "plan": "planning",
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
