"""`python -m tests.fuzz.headers`: coverage-guided fuzzing of what reads a checkpoint's files, for as long as told.

Needs atheris (`pip install -e .[fuzz]`). Every input goes through `checks`, which say what must hold. The first one
that breaks a rule ends the run with a traceback, and is left in the current folder as crash-HASH.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["abliterate.checkpoint", "json"]):
    import json  # noqa: F401, I001
    from abliterate.checkpoint import files, header  # noqa: F401

from tests.fuzz.checks import TARGETS, assert_confined, confined
from tests.fuzz.seeds import seeds

LIMITS = ("-max_len=4096", "-rss_limit_mb=600", "-timeout=10", "-use_value_profile=1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", choices=sorted(TARGETS), default="header")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--corpus", type=Path, help="a folder to start from and to keep what covers something new in")
    given, own = parser.parse_known_args()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as made:
        place = Path(made)
        corpus = given.corpus or place / "corpus"
        corpus.mkdir(parents=True, exist_ok=True)
        for number, content in enumerate(seeds(given.target)):
            (corpus / f"seed-{number}").write_bytes(content)
        limits = [f"-max_total_time={given.seconds}", *LIMITS]

        def once(content: bytes) -> None:
            TARGETS[given.target](place, content)
            assert_confined()

        with confined(place):
            atheris.Setup([sys.argv[0], *limits, *own, str(corpus)], once)
            atheris.Fuzz()


if __name__ == "__main__":
    main()
