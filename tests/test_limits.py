"""Commands that read models of the Hub under --cache-limit: within it, and to the same results as without."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from abliterate import auditing, conversion, measuring
from abliterate.checkpoint import patience
from abliterate.checkpoint.ondemand import located_together
from tests import hub_client, pico
from tests.commandline import run_here, snapshot
from tests.hub_server import COMMIT, Hub, serving
from tests.hub_watch import FETCHED, least, shards, watched

MODEL, EDITED = "org/pico", "org/pico@" + "e" * 40
WORDS = [chr(code) for code in range(35, 123) if chr(code) not in '\\"']
QUICK = f"""
name: {{name}}
extends: {{name}}
calibration: {{{{train: 8, validation: 2, test: 1}}}}
direction: {{{{filter: false, refusal_tokens: {json.dumps(WORDS)}, positions: 1}}}}
selection: {{{{max_kl: 1000000.0, min_induce: -1000000.0}}}}
evaluation: {{{{max_new_tokens: 2, kl_tokens: 2}}}}
"""


@dataclass(frozen=True)
class Place:
    """A base and what a conversion made of it; recipes; a patch."""

    base: Path
    edited: Path
    recipe: Path
    other: Path
    direction: Path
    patch: Path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("limits")
    made = Place(*(folder / name for name in ("pico", "edited", "a.yaml", "b.yaml", "r.safetensors", "a.patch")))
    pico.save(made.base, "llama", shards=4, tokenizer=True, num_hidden_layers=4, intermediate_size=400)
    pico.direction_file(made.direction, seed=1)
    made.recipe.write_text(QUICK.format(name="refusal"))
    made.other.write_text(QUICK.format(name="norm-preserving"))
    conversion.convert(str(made.base), made.edited, direction=made.direction, evaluate=False, patch=made.patch)
    return made


@pytest.fixture
def hub(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(patience, "WAITS", (0.0, 0.0))
    monkeypatch.setattr(measuring, "neutral_paragraphs", lambda: ["The loss is taken on a few words."])
    with serving(MODEL, place.base) as hub:
        hub.commits |= {COMMIT: place.base, EDITED.partition("@")[2]: place.edited}
        hub_client.use(hub, str(tmp_path / "home"), monkeypatch)
        yield hub


def both_ways(hub: Hub, home: Path, *words: str | Path, again: tuple[str | Path, ...] | None = None) -> tuple[Any, Any]:
    """The JSON of a command with the limit, the disk watched, and without; `again`: in other words."""
    with watched((home, FETCHED)) as most:
        ran = run_here(*words, "--json", "--cache-limit", f"{least(hub)}B")
    assert ran.code == 0, ran.err
    assert 0 < most[0] <= least(hub) < 0.7 * sum(shards(hub).values())
    assert not list((home / "hub").rglob("*.safetensors")) and not list((home / "abliterate").iterdir())
    plain = run_here(*(again or words), "--json", "-q")
    assert plain.code == 0, plain.err
    assert list((home / "hub").rglob("*.safetensors"))
    return json.loads(ran.out), json.loads(plain.out)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if "will be fetched" in record.message]


@pytest.mark.parametrize("two", [True, False])
def test_evaluate(hub: Hub, place: Place, tmp_path: Path, two: bool, caplog: pytest.LogCaptureFixture) -> None:
    words = ["evaluate", EDITED, "--baseline", MODEL] if two else ["evaluate", MODEL]
    one, other = both_ways(hub, tmp_path / "home", *words, "--recipe", place.recipe)
    assert one == other and one["evaluation"]["prompts_harmful"] == 1
    assert len(told(caplog)) == 1 + two


def test_a_judge_that_chats_has_the_limit_too(hub: Hub, place: Place, tmp_path: Path) -> None:
    words = ["evaluate", str(place.base), "--judge", f"chat:{EDITED}", "--recipe", place.recipe]
    one, other = both_ways(hub, tmp_path / "home", *words)
    assert one == other and "refusal_rate_judge" in json.dumps(one)


def test_audit(
    hub: Hub, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(auditing, "audit_plots", lambda _: {})
    monkeypatch.setattr(auditing, "audit_page", lambda _: "<p>")
    words = ["audit", MODEL, "--recipe", place.recipe, "--prompts", "1", "--directions", "2", "-o"]
    one, other = both_ways(hub, tmp_path / "home", *words, tmp_path / "one", again=(*words, tmp_path / "other"))
    assert one.pop("folder") != other.pop("folder") and one == other
    assert len(told(caplog)) == 1


def test_compare_and_convert_the_best(hub: Hub, place: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = ["compare", MODEL, "--recipes", f"{place.recipe},{place.other}", "--convert", "refusal", "-o"]
    one, other = both_ways(hub, tmp_path / "home", *words, tmp_path / "one", again=(*words, tmp_path / "other"))
    for found in (one, other):
        for row in found["rows"]:
            row.pop("seconds")
    assert one == other and len(told(caplog)) == 1
    assert snapshot(tmp_path / "one" / "refusal") == snapshot(tmp_path / "other" / "refusal")


def test_diff(hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one, other = both_ways(hub, tmp_path / "home", "diff", MODEL, EDITED)
    assert one == other and one["verdict"]["kind"] == "projection"
    assert len(told(caplog)) == 1 and "where there is a direction to measure" in told(caplog)[0]


def test_diff_with_a_folder(hub: Hub, place: Place, tmp_path: Path) -> None:
    one, other = both_ways(hub, tmp_path / "home", "diff", place.base, EDITED)
    assert one == other and one["verdict"]["kind"] == "projection"


def test_inspect(hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one, other = both_ways(hub, tmp_path / "home", "inspect", EDITED, "--base", MODEL)
    assert one == other and one["holds"] and len(told(caplog)) == 1


def test_patch_and_apply(hub: Hub, place: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = ["patch", MODEL, place.edited, "-o"]
    one, other = both_ways(hub, tmp_path / "home", *words, tmp_path / "one", again=(*words, tmp_path / "other"))
    assert one.pop("file") != other.pop("file") and one == other
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    shutil.rmtree(tmp_path / "home")
    words = ["apply", tmp_path / "one", MODEL]
    both_ways(hub, tmp_path / "home", *words, tmp_path / "out", again=(*words, tmp_path / "again"))
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "again") == snapshot(place.edited)
    assert len(told(caplog)) == 2


def test_adapter(hub: Hub, place: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = ["convert", MODEL, "--adapter", "peft", "--direction", place.direction, "--recipe", place.recipe]
    both_ways(
        hub,
        tmp_path / "home",
        words[0],
        words[1],
        tmp_path / "one" / "out",
        *words[2:],
        again=(words[0], words[1], tmp_path / "other" / "out", *words[2:]),
    )
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "other")
    assert len(told(caplog)) == 1


def test_a_limit_that_two_do_not_fit_into(hub: Hub, tmp_path: Path) -> None:
    ran = run_here("diff", MODEL, EDITED, "--cache-limit", f"{max(shards(hub).values())}B")
    assert ran.code == 1 and f"too little for {MODEL} and {EDITED}" in ran.err
    assert not list((tmp_path / "home/abliterate").glob("*/*/shards/*"))
    found = re.search(r"give (\S+) or more", ran.err)
    assert found
    assert run_here("diff", MODEL, EDITED, "--cache-limit", found[1], "-q").code == 0


def test_one_that_is_asked_for_twice_is_fetched_once(hub: Hub, tmp_path: Path) -> None:
    with located_together([(MODEL, None), (MODEL, COMMIT)], least(hub)) as (one, other):
        assert one is other and one.keeper is not None
    with watched((tmp_path / "home", FETCHED)) as most:
        ran = run_here("diff", MODEL, MODEL, "--json", "--cache-limit", f"{least(hub)}B")
    assert json.loads(ran.out)["verdict"]["kind"] == "identical" and 0 < most[0] <= least(hub)


def test_what_an_interrupted_run_left_of_both_counts(hub: Hub, tmp_path: Path) -> None:
    limit, wanted = least(hub), [(MODEL, None), (EDITED, None)]
    with pytest.raises(KeyboardInterrupt), located_together(wanted, 2 * limit) as sources:
        for source in sources:
            assert source.keeper is not None
            with source.keeper.hold([*shards(hub)][:2]):
                pass
        raise KeyboardInterrupt
    with watched((tmp_path / "home", FETCHED)) as most, located_together(wanted, limit):
        pass
    assert most[0] > limit, "the run that was stopped left more than that"
    with pytest.raises(KeyboardInterrupt), located_together(wanted, limit) as sources:
        left = sum(path.stat().st_size for path in (tmp_path / "home/abliterate").glob("*/*/shards/*"))
        assert left <= limit
        raise KeyboardInterrupt
