"""Take a concept other than refusal out of a model: answering in French.

    python examples/other_concept.py MODEL OUT

Any two sets of prompts that differ in one thing have a difference of means. What is asked here is whether the model
still answers French prompts in French without it. See french.yaml beside this file for what stands for what.
"""

import argparse
from pathlib import Path

import abliterate

HERE = Path(__file__).parent


def main() -> None:
    """Converts, and says what became of the concept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("out", help="folder to make")
    parser.add_argument("--recipe", default=str(HERE / "french.yaml"))
    arguments = parser.parse_args()
    prompts = {"harmful": HERE / "prompts/french.txt", "harmless": HERE / "prompts/english.txt"}
    recipe = abliterate.load_recipe(arguments.recipe)
    recipe = recipe.replacing("calibration", **{kind: str(path) for kind, path in prompts.items()})
    result = abliterate.convert(arguments.model, arguments.out, recipe=recipe)
    selection, figures = result.manifest["selection"], result.manifest["evaluation"]
    pick = selection["pick"]
    print(f"direction from position {pick['position']}, layer {pick['layer']}")
    print(f"log-odds of a French start, French prompts: {selection['baseline']['harmful']:.2f} -> {pick['bypass']:.2f}")
    print(
        f"the same, English prompts, direction added: {selection['baseline']['harmless']:.2f} -> {pick['induce']:.2f}"
    )
    print(f"KL on English prompts: {figures['edited']['kl_first_token']:.3f} nats")
    print(result.certificate.claim)


if __name__ == "__main__":
    main()
