"""Compare recipes on prompts of your own, and take the one that costs least.

    python examples/compare_recipes.py MODEL DIR --harmful mine.txt --harmless hers.jsonl:prompt

Prompt files are .txt (one a line), .json, .jsonl, .csv or .parquet, with a column after a colon. They are split into
prompts to learn from, to choose by, and to measure on; the recipe says how many of each.
"""

import argparse

import abliterate


def main() -> None:
    """Compares and prints one line a recipe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("out", help="folder of the report")
    parser.add_argument("--recipes", default="refusal,projected,norm-preserving", help="names or files")
    parser.add_argument("--harmful", help="prompts to refuse; built in if not given")
    parser.add_argument("--harmless", help="prompts to answer; built in if not given")
    arguments = parser.parse_args()
    recipes = [
        abliterate.load_recipe(name).replacing("calibration", harmful=arguments.harmful, harmless=arguments.harmless)
        for name in arguments.recipes.split(",")
    ]
    report = abliterate.compare(arguments.model, recipes, arguments.out)
    for row in report.comparison.rows:
        refused = "-" if row.refusals is None else f"{row.refusals.value:.1%} refused"
        cost = "-" if row.kl is None else f"KL {row.kl.value:.3f} ({row.kl.low:.3f} to {row.kl.high:.3f})"
        print(f"{row.recipe:<18} {refused:<15} {cost}{'  <- best' if row.best else ''}")
    print(f"wrote {report.folder}/comparison.html")


if __name__ == "__main__":
    main()
