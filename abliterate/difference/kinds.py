"""The kind of edit, named from what was measured, with the evidence; or unknown, where that does not decide."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from abliterate.difference.coverage import coverage, ranks
from abliterate.difference.evidence import directions_of, percent, projecting, rank_of, together, where
from abliterate.difference.findings import Findings
from abliterate.difference.tensors import TensorDifference
from abliterate.errors import some

Kind = Literal[
    "identical", "dtype", "quantised", "projection", "steering", "layered-projection", "norm-preserving", "lora",
    "fine-tune", "vocabulary", "vectors", "rounding", "different-model", "unknown",
]  # fmt: skip
UNIFORM = 0.03
"""Strengths that lie no further apart, or from 1, are one, or 1."""
MOST, HALF = 0.8, 0.5
RELATED = 0.5
"""Weights of one origin have a larger cosine than that; those of strangers about 0."""
ADDED = 0.05
"""From this share of far moves on, small steps were added. Of light training it is 0.07 and more, of rounding 0."""
KEPT = 0.2
"""Norms were kept where they changed by less than that share of what a projection alone would have done."""


@dataclass(frozen=True)
class Verdict:
    """The kind of edit.

    Attributes:
        kind: one word for scripts. `title`: one line for people. `evidence`: what says so, a sentence each.
        strength: of a projection, the median; None of other kinds.
    """

    kind: Kind
    title: str
    evidence: tuple[str, ...] = ()
    strength: float | None = None


def decide(found: Findings) -> Verdict:
    """The first rule that holds says what it is."""
    for rule in _RULES:
        verdict = rule(found)
        if verdict is not None:
            return verdict
    counts = {state: sum(t.state == state for t in found.changed) for state in ("low-rank", "full-rank", "rounding")}
    said = [f"{count} {state}" for state, count in counts.items() if count]
    said += [f"{sum(t.state == 'incomparable' for t in found.changed)} that cannot be compared"]
    lost = [f"{len(names)} {word}" for names, word in _losses(found) if names]
    evidence = ("changed matrices: " + ", ".join(said), "tensors: " + (", ".join(lost) or "all in both"))
    return Verdict("unknown", "unknown: the differences fit no kind that is known", evidence)


def _losses(found: Findings) -> Sequence[tuple[Sequence[object], str]]:
    pairing = found.pairing
    return (pairing.missing, "missing"), (pairing.extra, "extra"), (pairing.reshaped, "of another shape")


def _different(found: Findings) -> Verdict | None:
    pairing, comparable = found.pairing, [pair for pair in found.pairing.pairs if not pair.resized]
    total = len(pairing.pairs) + len(pairing.missing) + len(pairing.reshaped)
    if len(comparable) < HALF * total:
        lost = len(pairing.missing) + len(pairing.reshaped)
        said = f"{lost} of {total} tensors are missing or of another shape"
        return Verdict("different-model", "another model: it has other tensors", (said,))
    matrices = found.matrices
    if len(matrices) < HALF * sum(len(pair.shape) > 1 for pair in comparable) or not matrices:
        return None
    cosine = statistics.median(tensor.cosine for tensor in matrices)
    if cosine >= RELATED:
        return None
    said = f"the median cosine of a matrix with its counterpart is {cosine:.3f}; of models of one origin it is near 1"
    return Verdict("different-model", "another model of the same shape: its weights are not related", (said,))


def _identical(found: Findings) -> Verdict | None:
    if found.changed or not found.complete:
        return None
    cast = [tensor for tensor in found.tensors if tensor.state == "cast"]
    stored = [tensor for tensor in found.tensors if tensor.dtypes[0] != tensor.dtypes[1]]
    head = {None: "", "untied": "; the head is untied", "tied": "; the head is tied"}[found.pairing.head]
    if cast:
        to = ", ".join(sorted({str(tensor.cast) for tensor in cast}))
        said = (
            f"{len(cast)} tensors are the other side's rounded to {to}, value by value; the rest have the same values"
        )
        return Verdict("dtype", f"the same weights, rounded to {to}{head}", (said,))
    if stored:
        pairs = ", ".join(sorted({f"{a} to {b}" for a, b in (tensor.dtypes for tensor in stored)}))
        said = f"{len(stored)} tensors changed dtype ({pairs}) and no value"
        return Verdict("dtype", f"the same values, stored in another dtype ({pairs}){head}", (said,))
    return Verdict("identical", f"identical weights{head}", (f"all {len(found.tensors)} tensors have the same values",))


def _vocabulary(found: Findings) -> Verdict | None:
    resized = [tensor for tensor in found.tensors if tensor.resized]
    whole = [tensor for tensor in found.changed if not _is_vocabulary(tensor)]
    pairing = found.pairing
    if whole or pairing.missing or pairing.extra or pairing.reshaped:
        return None
    if not resized and (not found.changed or all(_projects(tensor) for tensor in found.changed)):
        return None
    said = [f"only {', '.join(t.name for t in found.changed) or 'sizes'} changed; every other tensor is the same"]
    said += [_resized(found, tensor) for tensor in resized]
    said += [f"{t.name}: {t.changed_rows} of {t.shape[0]} rows differ" for t in found.changed]
    return Verdict("vocabulary", "the vocabulary: embedding or head alone changed", tuple(said))


def _is_vocabulary(tensor: TensorDifference) -> bool:
    return tensor.role in ("embedding", "head")


def _resized(found: Findings, tensor: TensorDifference) -> str:
    pair = next(pair for pair in found.pairing.pairs if (pair.name, pair.other) == (tensor.name, tensor.other))
    return f"{tensor.name} has {pair.edited.shape[0]} rows instead of {pair.base.shape[0]}"


def _quantised(found: Findings) -> Verdict | None:
    looks = [tensor for tensor in found.matrices if tensor.bits and tensor.state != "low-rank"]
    if not looks or len(looks) < HALF * len(found.matrices):
        return None
    bits = statistics.mode(tensor.bits or 0 for tensor in looks)
    way = "errors fill half a step of their group evenly, or groups hold no more values than so many bits have"
    said = f"{len(looks)} of {len(found.matrices)} changed matrices: {way}"
    size = percent(tensor.relative for tensor in looks)
    return Verdict(
        "quantised",
        f"quantised to about {bits} bits and stored in full again",
        (said, f"differences are {size} of the weights"),
    )


def _projection(found: Findings) -> Verdict | None:
    matrices = [tensor for tensor in found.matrices if tensor.state != "rounding"]
    strong = [tensor for tensor in matrices if _projects(tensor)]
    norms = [tensor for tensor in found.vectors if tensor.role == "norm"]
    if not strong or len(strong) < MOST * len(matrices) or norms:
        return None
    kept = [t for t in strong if t.columns is not None and t.fit and t.columns <= KEPT * t.fit.norm_change]
    if len(kept) >= MOST * len(strong):
        return _norm_preserving(found, strong)
    if any(tensor.state != "low-rank" for tensor in matrices):
        return None
    return _plain_projection(found, strong)


def _norm_preserving(found: Findings, strong: Sequence[TensorDifference]) -> Verdict:
    change = statistics.median(t.columns or 0.0 for t in strong)
    expected = statistics.median(t.fit.norm_change for t in strong if t.fit)
    evidence = [
        f"norms along the stream's axis changed by {change:.2g}, where a projection alone would have by {expected:.2g}",
        *projecting(found, strong),
    ]
    strength = _strength(strong)
    title = f"norm-preserving projection of {directions_of(found)}{_strongly(strength)}"
    return Verdict("norm-preserving", title, (*evidence, *where(strong)), strength)


def _plain_projection(found: Findings, strong: Sequence[TensorDifference]) -> Verdict:
    strengths, strength = [t.fit.strength for t in strong if t.fit], _strength(strong)
    evidence = (*projecting(found, strong), *where(strong))
    shared = found.shared
    together = shared is not None and (shared.one or shared.few)
    if together and _spread(strengths) <= UNIFORM:
        if abs(strength - 1) <= UNIFORM:
            title = f"rank-{rank_of(found)} projection: {directions_of(found)} removed"
            return Verdict("projection", title, evidence, strength)
        what = "adds to" if strength < 0 else "takes out part of" if strength < 1 else "reverses part of"
        title = f"rank-{rank_of(found)} edit of strength {strength:.2f}: {what} {directions_of(found)}"
        return Verdict("steering", title, evidence, strength)
    low, high = min(strengths), max(strengths)
    same = f"{directions_of(found)}, " if together else "each matrix its own direction, "
    rows = sum(t.fit is not None and t.fit.form == "rows" for t in strong)
    # no recipe of this program keeps the lengths of rows; else formula, layers and strengths may be those of both
    made = "merged LoRA of projections (as Heretic makes them)"
    made += "" if rows >= MOST * len(strong) else ", or a recipe by layer"
    title = f"{made}: rank {ranks(strong)}, {same}strengths {low:.2f} to {high:.2f}"
    return Verdict("layered-projection", title, evidence, strength)


def _lora(found: Findings) -> Verdict | None:
    matrices = [tensor for tensor in found.matrices if tensor.state != "rounding"]
    if not matrices or any(tensor.state != "low-rank" for tensor in matrices):
        return None
    projecting = sum(_projects(tensor) for tensor in matrices)
    said = [
        f"all {len(matrices)} changed matrices differ by rank {ranks(matrices)}, with nothing left but rounding",
        f"{projecting} of them are projections of the base's weights; the others were learned or written",
    ]
    if found.vectors:
        said.append(f"{len(found.vectors)} vectors changed too")
    title = f"merged LoRA: rank {ranks(matrices)} in {coverage(matrices)}"
    return Verdict("lora", title, (*said, *together(found), *where(matrices)))


def _fine_tune(found: Findings) -> Verdict | None:
    full = [tensor for tensor in found.matrices if tensor.state == "full-rank"]
    light = [tensor for tensor in found.matrices if tensor.far is not None and tensor.far >= ADDED]
    if not full or len(full) + len(light) < HALF * len(found.matrices):
        return None
    noise = [tensor.tail for tensor in full if tensor.tail is not None]
    said = [
        f"{len(full)} of {len(found.matrices)} changed matrices differ by full rank, by "
        f"{percent(t.relative for t in full)} of their size",
        f"cosine with the base {statistics.median(t.cosine for t in full):.5f}",
        f"what their leading singular values leave has {statistics.median(noise):.3g} times the energy of rounding"
        if noise
        else "",
    ]
    if light:
        said.append(f"in {len(light)} more, small weights alone moved further than rounding moves them")
    if found.vectors:
        said.append(f"{len(found.vectors)} vectors (norms, biases) changed too")
    title = f"fine-tuned: full-rank differences in {coverage(full)}"
    return Verdict("fine-tune", title, (*filter(None, said), *where(full)))


def _below_rounding(found: Findings) -> Verdict | None:
    if not found.matrices or any(tensor.state != "rounding" for tensor in found.matrices) or not found.complete:
        return None
    said = f"{len(found.matrices)} matrices differ, none as a whole by more than rounding of both sides can do"
    far = statistics.median(tensor.far or 0.0 for tensor in found.matrices)
    moved = f"of the weights that changed, {percent([far])} moved by more than two of their own steps"
    if far < ADDED:
        why = f"{moved}: so it is where weights were stored anew through another format"
        return Verdict("rounding", "differences no larger than rounding", (said, why))
    why = (
        f"{moved}: rounding moves a weight by a share of itself, what is added moves small weights as far as large ones"
    )
    title = "fine-tuned by very small steps: below rounding in all but small weights"
    return Verdict("fine-tune", title, (said, why, "of which rank they are, rounding hides", *where(found.matrices)))


def _only_vectors(found: Findings) -> Verdict | None:
    added = [name for name in found.pairing.extra if name.endswith("bias")]
    if found.matrices or not (found.vectors or added) or len(added) != len(found.pairing.extra):
        return None
    names = [tensor.name for tensor in found.vectors] + added
    said = (
        f"no matrix differs; {len(found.vectors)} vectors changed, {len(added)} biases were added",
        *together(found),
    )
    return Verdict("vectors", f"vectors alone: {some(names)}; as steering vectors in biases, or tuned norms", said)


def _spread(strengths: Sequence[float]) -> float:
    """Between the 5th and the 95th percentile, so that a small matrix that rounding has spoilt does not decide."""
    ordered = sorted(strengths)
    cut = len(ordered) // 20
    return ordered[-1 - cut] - ordered[cut]


def _projects(tensor: TensorDifference) -> bool:
    return tensor.fit is not None and tensor.fit.projects and tensor.rank > 0


def _strength(tensors: Sequence[TensorDifference]) -> float:
    return statistics.median(t.fit.strength for t in tensors if t.fit)


def _strongly(strength: float) -> str:
    return "" if abs(strength - 1) <= UNIFORM else f", strength {strength:.2f}"


_RULES: Sequence[Callable[[Findings], Verdict | None]] = (
    _different, _identical, _only_vectors, _vocabulary, _quantised, _projection, _lora, _below_rounding, _fine_tune,
)  # fmt: skip
