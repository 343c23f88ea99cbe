"""What `abliterate diff --json` says, as a plain nested mapping."""

from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from abliterate.difference.removal import Removed
from abliterate.difference.shared import Shared
from abliterate.difference.tensors import TensorDifference
from abliterate.differing import Difference, Likeness

SCHEMA = "abliteration-diff/1"
_NOT_SAID = ("out", "weights")


def difference_record(found: Difference) -> dict[str, Any]:
    """The record; tensors that are the same are counted, not listed."""
    pairing = found.pairing
    return {
        "schema": SCHEMA,
        "base": {"name": found.base, "bytes": found.sizes[0], "dtypes": list(found.dtypes[0])},
        "edited": {"name": found.edited, "bytes": found.sizes[1], "dtypes": list(found.dtypes[1])},
        "model_types": list(found.model_types),
        "verdict": asdict(found.verdict),
        "stream": {"hidden_size": found.hidden_size, "by_plan": found.by_plan, "why_not": found.why_not},
        "tensors": {
            "compared": len(found.tensors),
            "same": sum(tensor.state == "same" for tensor in found.tensors),
            "changed": [tensor_record(tensor) for tensor in found.tensors if tensor.state != "same"],
            "missing": list(pairing.missing),
            "extra": list(pairing.extra),
            "reshaped": [asdict(tensor) for tensor in pairing.reshaped],
            "renamed": None if pairing.renamed is None else list(pairing.renamed),
            "head": pairing.head,
        },
        "shared": None if found.shared is None else _shared(found.shared),
        "removed": _removed(found.removed),
        "file": None if found.likeness is None else _likeness(found.likeness),
        "files": asdict(found.files),
        "claims": None if found.claims is None else dict(found.claims),
    }


def tensor_record(tensor: TensorDifference) -> dict[str, Any]:
    """One pair, without its directions."""
    said = {field.name: getattr(tensor, field.name) for field in fields(tensor) if field.name not in _NOT_SAID}
    return {**said, "fit": None if tensor.fit is None else asdict(tensor.fit)}


def _shared(shared: Shared) -> dict[str, Any]:
    return {
        "tensors": shared.tensors,
        "form": shared.form,
        "dimensions": shared.dimensions,
        "is_least": shared.is_least,
        "shares": list(shared.shares),
        "least_cosine": shared.cosines[0],
        "median_cosine": shared.cosines[1],
        "direction": shared.direction.tolist(),
    }


def _removed(writers: Sequence[Removed]) -> list[dict[str, Any]]:
    return [asdict(writer) for writer in writers]


def _likeness(likeness: Likeness) -> dict[str, Any]:
    said = {field.name: getattr(likeness, field.name) for field in fields(likeness)}
    return {**said, "removed": _removed(likeness.removed)}
