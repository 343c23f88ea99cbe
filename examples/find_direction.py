"""Find the refusal direction of a model, and plot what ablating each layer's direction does to refusals.

    python examples/find_direction.py MODEL --out scores.png

Every candidate has three scores (see docs/how-it-works.md). Those that the screen dropped early are measured on a part
of the prompts, and drawn smaller.
"""

import argparse

from matplotlib.figure import Figure

import abliterate
from abliterate import FoundDirection


def main() -> None:
    """Finds, prints, plots."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("--recipe", default="refusal")
    parser.add_argument("--out", default="scores.png")
    arguments = parser.parse_args()
    found = abliterate.find_direction(arguments.model, recipe=arguments.recipe)
    show(found)
    plot(found).savefig(arguments.out, dpi=150)
    print(f"wrote {arguments.out}")


def show(found: FoundDirection) -> None:
    """The pick and why."""
    choice = found.selection.choice
    pick = choice.pick
    print(f"picked position {pick.position}, layer {pick.layer}: {choice.reason}")
    print(f"bypass {pick.bypass:.2f}, induce {pick.induce:.2f}, KL {pick.kl:.4f}")
    print(f"refusal score without ablation: {found.selection.baseline_harmful:.2f} on harmful prompts")
    print(f"refusals start with: {', '.join(found.refusal_tokens.texts)}")


def plot(found: FoundDirection) -> Figure:
    """Bypass score by layer, a line a position."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    measured = [c for c in found.selection.choice.candidates if c.bypass is not None]
    most = max(c.prompts for c in measured)
    for position in sorted({c.position for c in measured}):
        line = sorted((c for c in measured if c.position == position), key=lambda c: c.layer)
        layers, scores = [c.layer for c in line], [c.bypass for c in line]
        axes.plot(layers, scores, lw=1, label=f"position {position}")
        axes.scatter(layers, scores, s=[4 + 20 * c.prompts / most for c in line])
    axes.axhline(found.selection.baseline_harmful, color="0.6", ls="--", label="nothing ablated")
    axes.set(xlabel="layer that the direction is from", ylabel="mean refusal score, harmful prompts")
    axes.legend(fontsize="small")
    return figure


if __name__ == "__main__":
    main()
