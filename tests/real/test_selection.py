"""The direction of the test subject: screened and exhaustive, in memory and streamed under a limit."""

import json
import os
import resource
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

RECIPE = """
name: fewer prompts
calibration: {{train: {}, validation: {}, test: 1}}
direction: {{positions: {}}}
"""
LIMIT = 800 << 20
"""Of memory: less than the subject and the libraries need together."""
LARGEST_LAYER = 3_540_096 * 4
"""Parameters of a decoder layer, in float32."""


@dataclass(frozen=True)
class Found:
    """A run of `abliterate direction`: what it says, its file, and the most memory of its own that it had."""

    selection: dict[str, Any]
    file: bytes
    anonymous: int
    said: str


def find(subject: Path, place: Path, *words: str, prompts: tuple[int, int, int], limit: int | None = None) -> Found:
    """With so many prompts of each set to train and to validate on, and positions to choose from."""
    place.mkdir()
    (place / "recipe.yaml").write_text(RECIPE.format(*prompts))
    out = place / "direction.safetensors"
    command = [sys.executable, "-m", "abliterate", "direction", str(subject), "-o", str(out), "--json", *words]

    def enter() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    process = subprocess.Popen(
        [*command, "--recipe", str(place / "recipe.yaml")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=enter,
        env=os.environ | {"TMPDIR": str(place)},
    )  # fmt: skip
    peak = [0]
    watcher = threading.Thread(target=_watch, args=(process.pid, peak))
    watcher.start()
    told, said = process.communicate()
    watcher.join()
    assert process.returncode == 0, said
    return Found(json.loads(told)["selection"], out.read_bytes(), peak[0], said)


def _watch(pid: int, peak: list[int]) -> None:
    while True:
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:
            return
        found = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), None)
        if found is None:
            return
        peak[0] = max(peak[0], found)
        time.sleep(0.02)


def test_the_screened_pick_is_the_exhaustive_one(subject: Path, tmp_path: Path) -> None:
    screened, exhaustive = (
        find(subject, tmp_path / name, *words, prompts=(32, 8, 1)).selection
        for name, words in (("screened", ()), ("exhaustive", ("--exhaustive",)))
    )
    assert (screened["method"], exhaustive["method"]) == ("screened", "exhaustive")
    places = [[found["pick"][key] for key in ("position", "layer")] for found in (screened, exhaustive)]
    assert places[0] == places[1]
    assert screened["forward_passes"] <= exhaustive["forward_passes"] / 2.5
    assert screened["relaxed"] == exhaustive["relaxed"]


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are the system's own")
def test_streamed_under_a_limit_the_direction_is_the_same(subject: Path, tmp_path: Path) -> None:
    """The limit alone has it streamed, and it stays far below what the weights take."""
    few, words = (12, 3, 1), ("--dtype", "float32")
    streamed = find(subject, tmp_path / "streamed", *words, prompts=few, limit=LIMIT)
    assert "streamed through memory layer by layer" in streamed.said
    resident = find(subject, tmp_path / "resident", *words, "--memory", "resident", prompts=few)
    assert streamed.file == resident.file and streamed.selection == resident.selection
    assert streamed.anonymous <= LARGEST_LAYER + 500e6 < resident.anonymous
