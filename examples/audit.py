"""Audit a model: how concentrated refusal is, and what removing it would cost. No weights are written.

python examples/audit.py MODEL DIR
"""

import argparse

import abliterate
from abliterate import AuditSize


def main() -> None:
    """Audits and prints the verdict."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("out", help="folder of the report")
    parser.add_argument("--recipe", default="refusal")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--directions", type=int, default=8)
    arguments = parser.parse_args()
    size = AuditSize(arguments.prompts, arguments.directions)
    report = abliterate.audit_model(arguments.model, arguments.out, recipe=arguments.recipe, size=size)
    for sentence in report.record["verdict"]:
        print(f"- {sentence}")
    print(f"wrote {report.folder}/audit.html")


if __name__ == "__main__":
    main()
