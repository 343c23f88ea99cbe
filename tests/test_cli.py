"""The command line: what it takes, what it prints where, and how it ends."""

import json
import logging
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from abliterate import __version__, cli, terminal
from abliterate.errors import AbliterateError
from abliterate.publish.manifest import manifest_schema
from abliterate.recipe import load_recipe, recipes_folder
from tests import pico
from tests.commandline import names, run, run_here, snapshot, start

COMMON = {"--device", "--dtype", "--batch-size", "--seed", "--trust-remote-code", "--json", "-v", "-q", "--revision"}
PROMPTS = {"--recipe", "--harmful", "--harmless", "--look-alike", "--system-prompt", "--template"}
OPTIONS = {
    "convert": COMMON
    | PROMPTS
    | {"--direction", "--dry-run", "--overwrite", "--no-evaluate", "--no-hash", "--exhaustive"}
    | {"--push-to", "--private", "--public", "--cache-limit", "--drop-shards", "--adapter", "--patch"},
    "direction": COMMON | PROMPTS | {"-o", "--exhaustive", "--cache-limit"},
    "plan": {"--revision", "--json", "-v", "-q"},
    "verify": COMMON | {"--direction", "--template", "--cache-limit"},
    "evaluate": COMMON
    | PROMPTS
    | {"--cache-limit", "--baseline", "--judge", "--tasks", "--task-path", "--save-completions"},
    "audit": COMMON
    | PROMPTS
    | {"--cache-limit", "-o", "--exhaustive", "--prompts", "--directions", "--overwrite", "--memory"},
    "compare": COMMON
    | (PROMPTS - {"--recipe"})
    | {"--cache-limit", "-o", "--recipes", "--convert", "--overwrite", "--inexact", "--max-new-tokens"},
    "push": {"--private", "--public", "--revision", "--create-pr", "--dry-run", "--json", "-v", "-q"},
    "patch": {
        "--cache-limit",
        "-o",
        "--whole",
        "--overwrite",
        "--revision",
        "--trust-remote-code",
        "--json",
        "-v",
        "-q",
    },
    "apply": {"--cache-limit", "--overwrite", "--revision", "--trust-remote-code", "--json", "-v", "-q"},
    "recipes": {"--json"},
    "doctor": {"--json"},
    "completion": set(),
    "diff": {
        "--cache-limit",
        "--direction",
        "--save-direction",
        "--overwrite",
        "--trust-remote-code",
        "--json",
        "-v",
        "-q",
    },
    "inspect": {"--cache-limit", "--revision", "--base", "--trust-remote-code", "--json", "-v", "-q"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico.save(tmp_path_factory.mktemp("cli") / "base", "llama", tied=True, shards=2)


@pytest.fixture(scope="module")
def given_direction(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Options of a conversion that calibrates nothing."""
    return (
        "--direction",
        str(pico.direction_file(tmp_path_factory.mktemp("direction") / "r.safetensors")),
        "--no-evaluate",
    )


@pytest.fixture(scope="module")
def converted(base: Path, given_direction: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "out"
    assert run_here("convert", base, out, *given_direction, "-q").code == 0
    return out


@pytest.mark.parametrize("command", OPTIONS)
def test_help_names_every_option(command: str) -> None:
    ran = run_here(command, "--help")
    assert (ran.code, ran.err) == (0, "")
    found = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", ran.out))
    assert OPTIONS[command] <= found, OPTIONS[command] - found
    assert run_here(command, "-h") == ran
    assert all(len(line) <= 100 for line in ran.out.splitlines())


def test_help_names_every_command() -> None:
    ran = run_here("--help")
    assert (ran.code, ran.err) == (0, "")
    assert set(OPTIONS) <= set(ran.out.split()) and set(OPTIONS) == set(cli.cli.commands)


def test_version() -> None:
    ran = run_here("--version")
    assert (ran.code, ran.out, ran.err) == (0, f"abliterate, version {__version__}\n", "")


def test_recipes() -> None:
    ran = run_here("recipes")
    assert (ran.code, ran.err) == (0, "") and ran.out.split()[0] == "refusal"
    everything = run_here("recipes", "--json")
    assert json.loads(everything.out)["refusal"] == load_recipe("refusal").as_dict()


def test_one_recipe(tmp_path: Path) -> None:
    shown = run_here("recipes", "refusal")
    assert (shown.code, shown.err) == (0, "")
    assert shown.out.rstrip() == (recipes_folder() / "refusal.yaml").read_text(encoding="utf-8").rstrip()
    assert json.loads(run_here("recipes", "refusal", "--json").out) == yaml.safe_load(shown.out)
    (tmp_path / "own.yaml").write_text("edit: {strength: 0.5}")
    assert json.loads(run_here("recipes", tmp_path / "own.yaml", "--json").out)["edit"]["strength"] == 0.5


def test_plan(base: Path) -> None:
    before = snapshot(base)
    ran = run_here("plan", base)
    assert (ran.code, ran.err) == (0, "")
    for text in ("llama", "model.embed_tokens.weight", "o_proj.weight", "down_proj.weight", "13 writers"):
        assert text in ran.out
    found = json.loads(run_here("plan", base, "--json").out)
    assert (found["model_type"], found["hidden_size"], found["num_layers"]) == ("llama", pico.HIDDEN, 3)
    assert len(found["writers"]) == 13
    assert snapshot(base) == before


def test_a_dry_run_writes_nothing(base: Path, given_direction: tuple[str, ...], tmp_path: Path) -> None:
    ran = run_here("convert", base, tmp_path / "a" / "out", *given_direction, "--dry-run")
    assert (ran.code, ran.err) == (0, "")
    assert "13 residual writers" in ran.out and ran.out.rstrip().endswith("nothing was written")
    as_json = run_here("convert", base, tmp_path / "out", *given_direction, "--dry-run", "--json")
    assert as_json.out == run_here("plan", base, "--json").out
    assert names(tmp_path) == []


def test_a_dry_run_refuses_what_a_conversion_would(
    base: Path, given_direction: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").touch()
    ran = run_here("convert", base, tmp_path / "out", *given_direction, "--dry-run")
    assert (ran.code, ran.out) == (1, "") and "is not empty" in ran.err
    assert run_here("convert", base, tmp_path / "out", *given_direction, "--dry-run", "--overwrite").code == 0
    assert names(tmp_path / "out") == ["config.json"]


def check_manifest(text: str, out: Path) -> dict[str, Any]:
    """One JSON document: where the result is, whether it holds, and the manifest that is also in the folder."""
    found: dict[str, Any] = json.loads(text)
    assert Path(found.pop("folder")) == out and found.pop("holds") is True
    jsonschema.validate(found, manifest_schema())
    assert found == json.loads((out / "abliteration.json").read_text())
    return found


def test_convert_in_pipes(base: Path, given_direction: tuple[str, ...], tmp_path: Path) -> None:
    """JSON alone on stdout, warnings alone on stderr."""
    model = shutil.copytree(base, tmp_path / "m")
    (model / "pytorch_model.bin").touch()
    ran = run("convert", model, tmp_path / "room" / "out", *given_direction, "--json")
    assert ran.err == "pytorch_model.bin is left out: unedited weights in another format\n"
    assert ran.code == 0
    found = check_manifest(ran.out, tmp_path / "room" / "out")
    assert found["certificate"]["holds"] is True and found["edit"]["head"] == "untied"
    assert found["base"]["id"] == "m" and found["evaluation"] is None
    assert names(tmp_path / "room") == ["out"]


def test_quiet_prints_nothing(base: Path, given_direction: tuple[str, ...], tmp_path: Path) -> None:
    ran = run_here("convert", base, tmp_path / "out", *given_direction, "-q")
    assert (ran.code, ran.out, ran.err) == (0, "", "")
    assert run_here("verify", tmp_path / "out", "-q").out == ""


@pytest.mark.parametrize(("flag", "level"), [("-v", logging.INFO), ("-q", logging.ERROR), (None, logging.WARNING)])
def test_how_much_is_said(base: Path, flag: str | None, level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr("abliterate.commands.plan.print_plan_as", lambda *_: seen.append(terminal.log.level))
    run_here("plan", base, *([flag] if flag else []))
    assert seen == [level]


def test_convert_for_people(base: Path, given_direction: tuple[str, ...], tmp_path: Path) -> None:
    ran = run_here("convert", base, tmp_path / "out", *given_direction)
    assert (ran.code, ran.err) == (0, "")
    assert "certificate  holds" in ran.out and str(tmp_path / "out") in "".join(ran.out.split())
    assert "\x1b" not in ran.out


def test_verify(converted: Path) -> None:
    ran = run_here("verify", converted, "--json")
    assert (ran.code, ran.err) == (0, "")
    found = json.loads(ran.out)
    assert found["holds"] is True and found["mismatches"] == [] and found["certificate"]["holds"] is True
    assert "certificate  holds" in run_here("verify", converted).out


@pytest.mark.parametrize("place", [-1, 8 + 2000])
def test_verify_after_a_byte_is_flipped(converted: Path, tmp_path: Path, place: int) -> None:
    changed = shutil.copytree(converted, tmp_path / "changed")
    shard = sorted(changed.glob("model-*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    header = int.from_bytes(data[:8], "little") + 8
    data[place if place < 0 else header + place] ^= 1
    shard.write_bytes(data)
    ran = run_here("verify", changed, "--json")
    assert ran.code == 1
    assert ran.err == f"error: files differ from the manifest: {shard.name}\n"
    found = json.loads(ran.out)
    assert found["holds"] is False and found["mismatches"] == [shard.name]


def test_verify_a_model_that_was_not_converted(base: Path, converted: Path) -> None:
    """The certificate fails on its own, without a manifest to tell."""
    ran = run_here("verify", base, "--direction", converted / "refusal_direction.safetensors")
    assert ran.code == 1 and ran.err.startswith("error: certificate failed: ")
    assert run_here("verify", base).err == (
        "error: base has no refusal_direction.safetensors to verify against; give --direction FILE\n"
    )


def test_a_certificate_that_fails_is_told(
    base: Path, given_direction: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from abliterate.edit import projections

    monkeypatch.setattr(projections.LocalProjection, "apply", lambda self, rows, block: block.clone())
    ran = run_here("convert", base, tmp_path / "out", *given_direction, "--json")
    assert ran.code == 1
    assert re.fullmatch(r"error: certificate failed: .*; see .*out\.failed\n", ran.err)
    assert names(tmp_path) == ["out.failed"]
    found = json.loads(ran.out)
    assert found["holds"] is False and Path(found["folder"]) == tmp_path / "out.failed"


def test_a_reader_that_goes_away() -> None:
    process = start("recipes", "refusal")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 1
    process.stderr.close()


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (AbliterateError("what\nis  wrong"), 1, "error: what is wrong\n"),
        (
            MemoryError(),
            1,
            "error: out of memory; --memory streamed, a smaller --batch-size or --dtype bfloat16 needs less\n",
        ),
        (
            RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
            1,
            "error: out of memory; --memory streamed, a smaller",
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
            1,
            "error: out of memory; --memory streamed, a smaller",
        ),
        (FileNotFoundError(2, "No such file or directory", "a.txt"), 1, "error: a.txt: No such file or directory\n"),
        (OSError("odd"), 1, "error: odd\n"),
        (KeyboardInterrupt(), 130, "\ninterrupted: nothing was written\n"),
    ],
)
def test_every_end_is_one_line(
    base: Path, monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: int, message: str
) -> None:
    def fail(*_: object) -> None:
        raise raised

    monkeypatch.setattr("abliterate.commands.plan.print_plan_as", fail)
    ran = run_here("plan", base)
    assert (ran.code, ran.out) == (code, "")
    assert ran.err.startswith(message) and ran.err.strip().count("\n") == 0


def test_a_fault_of_our_own_is_not_hidden(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a mistake in the code")

    monkeypatch.setattr("abliterate.commands.plan.print_plan_as", fail)
    with pytest.raises(RuntimeError, match="a mistake in the code"):
        run_here("plan", base)


def test_ctrl_c_waits_while_libraries_load() -> None:
    done = False
    with pytest.raises(KeyboardInterrupt), terminal.loading():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        done = True
    assert done and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_hashes_of_the_weights_can_be_left_out(base: Path, given_direction: tuple[str, ...], tmp_path: Path) -> None:
    """The manifest and the card say so, the command that is recorded does it again, and `verify` claims no match."""
    out = tmp_path / "out"
    assert run_here("convert", base, out, *given_direction, "--no-hash", "-q").code == 0
    manifest = json.loads((out / "abliteration.json").read_text())
    assert manifest["output"]["hashed"] is False and "--no-hash" in manifest["reproduce"]
    assert {shard["sha256"] for part in ("base", "output") for shard in manifest[part]["shards"]} == {None}
    card = " ".join((out / "README.md").read_text().split())
    assert "SHA-256 of the files of weights was left out (`--no-hash`)" in card and "by hash" not in card
    checked = run_here("verify", out, "--json")
    assert checked.code == 0 and json.loads(checked.out)["hashed"] is False
