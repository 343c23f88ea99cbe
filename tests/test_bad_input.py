"""Everything that can be wrong: one line that says what, the documented exit code, and nothing left behind."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import GatedRepoError
from safetensors.torch import load_file, save_file

from abliterate.checkpoint import output, rewrite, shard
from tests import pico
from tests.commandline import Ran, names, run, run_here, snapshot, start

INDEX = "model.safetensors.index.json"
WORK = ".out.abliterate-work"
WRITER = "model.layers.1.mlp.down_proj.weight"
PROMPTS = [f"Say the number {number} aloud" for number in range(60)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sharded, with a tied head that is untied, and files to carry over: every stage of writing has something to do."""
    folder = pico.save(tmp_path_factory.mktemp("bad") / "base", "llama", tied=True, shards=2)
    (folder / "README.md").write_text("# Base\n")
    return folder


@pytest.fixture(scope="module")
def direction(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico.direction_file(tmp_path_factory.mktemp("direction") / "r.safetensors")


@pytest.fixture(scope="module")
def undisturbed(base: Path, direction: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a conversion gives that nothing stops."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert run_here(*conversion(base, out, direction, "-q")) == Ran(0, "", "")
    return snapshot(out)


@pytest.fixture
def model(base: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(base, tmp_path / "model")


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """An empty folder for OUT."""
    folder = tmp_path / "room"
    folder.mkdir()
    return folder


def told(ran: Ran, *words: str) -> None:
    """One line on stderr that has these words in it (patterns), exit code 1, nothing on stdout."""
    assert re.fullmatch(r"error: [^\n]+\n", ran.err), ran.err
    assert (ran.code, ran.out) == (1, "")
    for word in words:
        assert re.search(word, ran.err), ran.err


def conversion(model: Path | str, out: Path, direction: Path, *more: str | Path) -> Sequence[str | Path]:
    """A conversion that needs no calibration."""
    return ("convert", model, out, "--direction", direction, "--no-evaluate", *more)


def only_bin(model: Path) -> None:
    for path in model.glob("*.safetensors*"):
        path.unlink()
    (model / "pytorch_model.bin").write_bytes(b"\x80\x02")


def first_shard(model: Path) -> Path:
    return sorted(model.glob("model-*.safetensors"))[0]


def change_index(name: str) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        index = json.loads((model / INDEX).read_text())
        index["weight_map"][WRITER] = name
        (model / INDEX).write_text(json.dumps(index))

    return change


def change_config(**values: Any) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        config = json.loads((model / "config.json").read_text()) | values
        (model / "config.json").write_text(json.dumps(config))

    return change


def change_header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def rewrite_header(model: Path) -> None:
        path = first_shard(model)
        data = path.read_bytes()
        end = int.from_bytes(data[:8], "little") + 8
        header = json.loads(data[8:end])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])

    return rewrite_header


def overlap(header: dict[str, Any]) -> None:
    first, second = sorted((e for n, e in header.items() if n != "__metadata__"), key=lambda e: e["data_offsets"][0])[
        :2
    ]
    size = second["data_offsets"][1] - second["data_offsets"][0]
    second["data_offsets"] = [first["data_offsets"][1] - 4, first["data_offsets"][1] - 4 + size]


def corrupt_header(model: Path) -> None:
    with first_shard(model).open("r+b") as file:
        file.seek(20)
        file.write(b"\xff\x00{{")


def nan(name: str) -> Callable[[Path], None]:
    def put(model: Path) -> None:
        shard = next(
            model / home for key, home in json.loads((model / INDEX).read_text())["weight_map"].items() if key == name
        )
        tensors = load_file(shard)
        tensors[name].view(-1)[7] = torch.nan
        save_file(tensors, shard, {"format": "pt"})

    return put


def rename(name: str, new: str) -> Callable[[Path], None]:
    def put(model: Path) -> None:
        index = json.loads((model / INDEX).read_text())
        shard = index["weight_map"].pop(name)
        index["weight_map"][new] = shard
        (model / INDEX).write_text(json.dumps(index))
        stored = load_file(model / shard)
        save_file({new if key == name else key: tensor for key, tensor in stored.items()}, model / shard)

    return put


DAMAGE: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no folder": (shutil.rmtree, ("model' is not a folder here, and not a Hub id",)),
    "no config": (lambda m: (m / "config.json").unlink(), (r"has no config\.json", "download it whole")),
    "config cut short": (lambda m: os.truncate(m / "config.json", 20), (r"config\.json is not valid JSON", "again")),
    "only .bin": (only_bin, (r"no safetensors weights, only pytorch_model\.bin", "save_pretrained")),
    "a shard is missing": (lambda m: first_shard(m).unlink(), (f"{INDEX} names the shard model-00001", "download it")),
    "a shard outside": (change_index("../x.safetensors"), (f"{INDEX} names '../x.safetensors'", "not a plain name")),
    "a shard cut short": (
        lambda m: os.truncate(first_shard(m), first_shard(m).stat().st_size - 100),
        ("model-00001", "truncated", "download it again"),
    ),
    "a header cut short": (lambda m: os.truncate(first_shard(m), 100), ("model-00001", "truncated or corrupt")),
    "a corrupt header": (corrupt_header, ("model-00001.* has a corrupt header", "download it again")),
    "overlapping tensors": (change_header(overlap), ("model-00001.*: tensor .* overlaps the tensor before it",)),
    "NaN in a writer": (nan(WRITER), (f"tensor {WRITER} holds NaN or infinite values", "download them again")),
    "NaN in the embedding": (nan("model.embed_tokens.weight"), (r"embed_tokens\.weight holds NaN",)),
    "an unknown architecture": (
        change_config(model_type="strange"),
        (r"model type strange is not known to transformers \d\S+; a newer release of transformers may know it",),
    ),
    "an architecture that is refused": (
        change_config(model_type="rwkv"),
        ("model type rwkv is not supported: what its channel mix writes",),
    ),
    "no architecture": (change_config(model_type=None), ("names no model_type",)),
    "quantized": (change_config(quantization_config={"quant_method": "gptq"}), ("with 'gptq'", "unquantized")),
    "another width": (
        change_config(hidden_size=64),
        (r"has shape \[131, 48\]; llama with this config.json has it as \[131, 64\]",),
    ),
    "another depth": (
        change_config(num_hidden_layers=2),
        (r"tensor model\.layers\.2\..* is not accounted for: llama with this config.json has no such tensor",),
    ),
    "a deeper config": (change_config(num_hidden_layers=4), (r"tensor model\.layers\.3\..* is missing",)),
    "a tensor that nobody knows": (
        rename(WRITER, "model.layers.1.mystery.weight"),
        (r"model\.layers\.1\.mystery\.weight \[48, 72\] is not accounted for",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
@pytest.mark.parametrize("before", [{}, {"config.json": b"{}", "sub/kept": b"1"}], ids=["new", "overwriting"])
def test_a_damaged_model(model: Path, room: Path, direction: Path, case: str, before: dict[str, bytes]) -> None:
    damage, words = DAMAGE[case]
    damage(model)
    for name, content in before.items():
        (room / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (room / "out" / name).write_bytes(content)
    told(run_here(*conversion(model, room / "out", direction, "--overwrite")), *words)
    assert snapshot(room) == {f"out/{name}": content for name, content in before.items()}
    assert names(room) == (["out"] if before else [])


@pytest.mark.parametrize("command", ["plan", "evaluate", "verify", "direction"])
def test_every_command_refuses_a_damaged_model(model: Path, room: Path, command: str) -> None:
    corrupt_header(model)
    told(
        run_here(command, model, *(["-o", room / "r.safetensors"] if command == "direction" else [])), "corrupt header"
    )
    assert names(room) == []


def test_a_model_that_is_not_there(room: Path, direction: Path) -> None:
    """In a process of its own: the Hub client is offline from the start."""
    ran = run(*conversion("org/name", room / "out", direction))
    told(ran, "org/name is not a folder here", "since HF_HUB_OFFLINE is set: unset it")
    assert names(room) == []


def test_a_gated_model(room: Path, direction: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        answer: Any = SimpleNamespace(headers={}, request=None)
        raise GatedRepoError("403 for url https://huggingface.co/x?token=hf_sEcReT", response=answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    ran = run_here(*conversion("org/name", room / "out", direction))
    told(ran, "org/name is gated: accept its terms on its Hub page, then log in with `hf auth login`")
    assert "sEcReT" not in ran.err and names(room) == []


def test_out_is_not_empty(base: Path, room: Path, direction: Path) -> None:
    (room / "out").mkdir()
    (room / "out" / "thesis.txt").write_text("mine")
    told(run_here(*conversion(base, room / "out", direction)), "out is not empty", "--overwrite")
    told(run_here(*conversion(base, room / "out", direction, "--overwrite")), "holds no checkpoint", "choose another")
    assert snapshot(room) == {"out/thesis.txt": b"mine"} and names(room) == ["out"]


def test_out_and_model_inside_one_another(model: Path, tmp_path: Path, direction: Path) -> None:
    before = snapshot(tmp_path)
    told(
        run_here(*conversion(model, model / "out", direction)), "lies inside the checkpoint that is read", "another OUT"
    )
    for more in ((), ("--overwrite",)):
        told(run_here(*conversion(model, tmp_path, direction, *more)), "lies inside OUT")
        told(run_here(*conversion(model, model, direction, *more)), "is the checkpoint that is read")
    assert snapshot(tmp_path) == before and names(tmp_path) == ["model"]


def test_out_cannot_be_a_folder(base: Path, room: Path, direction: Path) -> None:
    (room / "file").write_bytes(b"mine")
    told(run_here(*conversion(base, room / "file", direction)), "file is a file; OUT names a folder to make")
    told(run_here(*conversion(base, room / "file" / "out", direction)), "file is a file, so .* cannot be made in it")
    told(run_here(*conversion(base, Path("/"), direction, "--overwrite")), "lies inside OUT")
    assert snapshot(room) == {"file": b"mine"}


def prompts(path: Path, count: int) -> Path:
    path.write_text("\n".join(PROMPTS[:count]))
    return path


def test_too_few_prompts(base: Path, room: Path, tmp_path: Path, direction: Path) -> None:
    few = prompts(tmp_path / "few.txt", 6)
    for command in (("direction", base, "-o", room / "r"), conversion(base, room / "out", direction)):
        told(run_here(*command, "--harmful", few), r"too few prompts in .*few\.txt: 6 .*are needed")
    assert names(room) == []


def test_the_same_prompts_twice(base: Path, room: Path, tmp_path: Path) -> None:
    one, other = prompts(tmp_path / "a.txt", 60), tmp_path / "b.txt"
    other.write_text("\n".join(f"{text.upper()}!" for text in PROMPTS))
    ran = run_here("direction", base, "-o", room / "r", "--harmful", one, "--harmless", other)
    told(ran, "the harmful and the harmless prompts are the same; they must differ")
    other.write_text("\n".join(PROMPTS[:1] + [f"Write down {number}" for number in range(59)]))
    ran = run_here("direction", base, "-o", room / "r", "--harmful", one, "--harmless", other)
    told(ran, "1 prompts are both in the harmful and in the harmless set; take them out")
    assert names(room) == []


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("gone.txt", None, r"no prompt file .*gone\.txt"),
        ("a.doc", b"x", r"prompts come from \.txt, .*, not from \.doc"),
        ("a.txt", b"", "holds no prompts"),
        ("a.txt", b"\xff\xfe", "cannot be read as UTF-8"),
        ("a.json", b'{"a": [', "not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n{', "line 2 is not valid JSON"),
        ("a.csv", b"a,b\nx,y\n", "has columns a, b; say which"),
        ("a.jsonl", b'{"text": 3}', "has columns text; say which"),
    ],
)
def test_prompt_files(base: Path, room: Path, tmp_path: Path, name: str, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    told(run_here("direction", base, "-o", room / "r", "--harmless", tmp_path / name), words)
    assert names(room) == []


def saved(**tensors: torch.Tensor) -> Callable[[Path], None]:
    return lambda path: save_file(tensors, path)


DIRECTIONS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "no direction file .*r"),
    "a folder": (lambda path: path.mkdir(), "no direction file .*r"),
    "of another width": (saved(direction=torch.ones(47)), r"direction has shape \[47\]; the model's hidden size is 48"),
    "of two directions": (saved(direction=torch.ones(2, 48)), r"direction has shape \[2, 48\]"),
    "zero": (saved(direction=torch.zeros(48)), "direction is zero"),
    "not finite": (saved(direction=torch.full((48,), torch.nan)), "direction is not finite"),
    "of another name": (saved(r=torch.ones(48)), "has no tensor named direction, only r"),
    "empty": (lambda path: path.touch(), "is not a safetensors file"),
    "text": (lambda path: path.write_text("a direction, once\nupon a time"), "is not a safetensors file"),
    "cut short": (
        lambda path: (saved(direction=torch.ones(48))(path), os.truncate(path, 150)),
        "not a safetensors file",
    ),
}


@pytest.mark.parametrize("case", DIRECTIONS)
def test_directions(base: Path, room: Path, tmp_path: Path, case: str) -> None:
    make, words = DIRECTIONS[case]
    make(tmp_path / "r")
    told(run_here(*conversion(base, room / "out", tmp_path / "r")), words)
    told(run_here("verify", base, "--direction", tmp_path / "r"), words)
    assert names(room) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("edit: {colour: red}", r"unknown key edit\.colour; allowed: head, directions"),
        ('"a\\nb": 3', "unknown key a b; allowed"),
        ("edit: {strength: 3}", r"edit\.strength is 3; allowed"),
        ("edit: [", "not readable as YAML"),
        (None, r"no recipe file .*own\.yaml"),
    ],
)
def test_recipes(base: Path, room: Path, tmp_path: Path, direction: Path, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / "own.yaml").write_text(text)
    told(run_here(*conversion(base, room / "out", direction, "--recipe", tmp_path / "own.yaml")), words)
    told(run_here("recipes", tmp_path / "own.yaml"), words)
    told(run_here("recipes", "nope"), "no recipe named nope; shipped recipes: ")
    assert names(room) == []


def test_a_device_that_is_not_there(base: Path, room: Path, direction: Path) -> None:
    absent = "mps" if torch.cuda.is_available() else "cuda"
    ran = run_here(*conversion(base, room / "out", direction, "--device", absent))
    told(ran, f"device {absent} is not available here; use --device auto or cpu")
    assert names(room) == []


def test_a_direction_file_that_cannot_be_made(base: Path, room: Path) -> None:
    told(run_here("direction", base, "-o", room / "no" / "r"), "no is not a folder, so r cannot be written there; make")
    assert names(room) == []


def test_a_model_that_cannot_speak(base: Path, room: Path) -> None:
    told(run_here("convert", base, room / "out"), "no usable tokenizer in .*base")
    told(run_here("evaluate", base), "base has no tokenizer, so there is nothing to evaluate it on")
    assert names(room) == []


USAGE = (
    (),
    ("nope",),
    ("convert", "m"),
    ("convert", "m", "o", "more"),
    ("convert", "m", "o", "--nope"),
    ("convert", "m", "o", "--device", "abacus"),
    ("convert", "m", "o", "--dtype", "int8"),
    ("convert", "m", "o", "--batch-size", "0"),
    ("convert", "m", "o", "--seed", "-1"),
    ("convert", "m", "o", "-q", "-v"),
    ("plan", "m", "-q", "-v"),
    ("verify", "m", "-v", "-q"),
    ("evaluate",),
    ("direction", "m"),
    ("direction", "m", "-o", "."),
)


@pytest.mark.parametrize("words", USAGE, ids=" ".join)
def test_wrong_usage(room: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]) -> None:
    monkeypatch.chdir(room)
    ran = run_here(*words)
    assert (ran.code, ran.out) == (2, "") and names(room) == []
    assert ran.err.startswith("Usage: ") and "Traceback" not in ran.err


def test_wrong_usage_of_a_process(room: Path) -> None:
    ran = run("convert", "m", cwd=room)
    assert (ran.code, ran.out) == (2, "") and names(room) == []
    assert ran.err.startswith("Usage: ") and ran.err.endswith("Error: Missing argument 'OUT'.\n")


def test_a_process_that_fails(model: Path, room: Path, direction: Path) -> None:
    """After writing has begun."""
    nan(WRITER)(model)
    told(run(*conversion(model, room / "out", direction)), f"tensor {WRITER} holds NaN")
    assert names(room) == []


def test_files_of_a_limited_size(base: Path, room: Path, direction: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    ran = run(*conversion(base, room / "out", direction), preexec_fn=limit)
    told(ran, r"disk full \(File too large\): [\d,]+ bytes are needed in .*; free space or choose another OUT")
    assert names(room) == []


@pytest.fixture
def small_disk(tmp_path: Path, base: Path) -> Iterator[Path]:
    """A file system that has room for the weights, but not for all else."""
    size = sum(path.stat().st_size for path in base.glob("*.safetensors")) + 131 * 48 * 4 + (1 << 15)
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    options = ["-t", "tmpfs", "-o", f"size={size}", "none", str(place)]
    if mount is None or subprocess.run([mount, *options], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_small_disk(model: Path, small_disk: Path, direction: Path) -> None:
    (model / "figure.png").write_bytes(bytes(1 << 17))
    told(run_here(*conversion(model, small_disk / "out", direction)), r"disk full \(No space left on device\)")
    assert names(small_disk) == [WORK]  # with shards that are done
    shutil.rmtree(small_disk / WORK)
    (small_disk / "more").write_bytes(bytes(1 << 17))
    ran = run_here(*conversion(model, small_disk / "out", direction))
    told(ran, r"disk full: [\d,]+ bytes are needed in .* and [\d,]+ are free")
    assert names(small_disk) == ["more"]


Patch = Callable[[pytest.MonkeyPatch, BaseException], None]


def raising(place: Any, name: str) -> Patch:
    """Has every call of a function fail."""

    def patch(monkeypatch: pytest.MonkeyPatch, raised: BaseException) -> None:
        def fail(*_: object, **__: object) -> None:
            raise raised

        monkeypatch.setattr(place, name, fail)

    return patch


def raising_for(method: str, file: str) -> Patch:
    """Has a method of Path fail for the staged file of one name."""

    def patch(monkeypatch: pytest.MonkeyPatch, raised: BaseException) -> None:
        real = getattr(Path, method)

        def fail(path: Path, *given: Any, **named: Any) -> Any:
            if path.name == file and path.parent.parent.name == WORK:
                raise raised
            return real(path, *given, **named)

        monkeypatch.setattr(Path, method, fail)

    return patch


STAGES: dict[str, Patch] = {
    "the folder": raising(output, "held"),
    "an edited tensor": raising(shard, "write_all"),
    "a copied tensor": raising(shard, "copy_range"),
    "the index": raising(rewrite, "_write_index"),
    "the flush": raising(rewrite, "sync"),
    "the files carried over": raising(shutil, "copyfile"),
    "the config": raising_for("write_bytes", "config.json"),
    "the manifest": raising_for("write_bytes", "abliteration.json"),
    "the direction": raising_for("write_bytes", "refusal_direction.safetensors"),
    "the card": raising_for("write_text", "README.md"),
    "the last flush": raising(output, "sync"),
    "the rename": raising(output.Staging, "_swap"),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "raised", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=["full", "^C"]
)
def test_a_full_disk_or_ctrl_c_at_every_stage(
    base: Path,
    room: Path,
    direction: Path,
    undisturbed: dict[str, bytes],
    stage: str,
    raised: BaseException,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is finished by then is kept, and the same command goes on from there to the same bytes."""
    before = {"config.json": b"{}"}
    (room / "out").mkdir()
    (room / "out" / "config.json").write_bytes(b"{}")
    with monkeypatch.context() as patch:
        STAGES[stage](patch, raised)
        over = run_here(*conversion(base, room / "out", direction, "--overwrite"))
        new = run_here(*conversion(base, room / "new" / "out", direction))
    kept = stage not in ("the folder", "an edited tensor", "a copied tensor")
    for ran in (over, new):
        if isinstance(raised, OSError):
            told(ran, "No space left on device", str(room))
        else:
            word = "run the same command again to continue" if kept else "nothing was written"
            assert (ran.code, ran.out, ran.err.strip()) == (130, "", f"interrupted: {word}")
    assert names(room) == ([WORK, "new", "out"] if kept else ["out"]) and snapshot(room / "out") == before
    for out, more in ((room / "out", ["--overwrite"]), (room / "new" / "out", [])):
        assert run_here(*conversion(base, out, direction, "-q", *more)) == Ran(0, "", "")
        assert names(out.parent) == (["new", "out"] if more and kept else ["out"]) and snapshot(out) == undisturbed


def begun(process: "subprocess.Popen[str]", room: Path) -> None:
    """Waits until the run has begun to write."""
    end = time.monotonic() + 100
    while not any(room.glob(f"{WORK}/out/*")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.001)


def test_ctrl_c(base: Path, room: Path, direction: Path) -> None:
    with start(*conversion(base, room / "out", direction)) as process:
        begun(process, room)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    kept = (room / WORK / "journal.json").exists()
    word = "run the same command again to continue" if kept else "nothing was written"
    assert (out, err.strip()) == ("", f"interrupted: {word}")
    assert process.returncode in (130, -signal.SIGINT)  # the same to a shell; Python itself chooses
    assert names(room) == ([WORK] if kept else [])


def test_a_killed_run(base: Path, room: Path, direction: Path, undisturbed: dict[str, bytes]) -> None:
    with start(*conversion(base, room / "out", direction)) as process:
        begun(process, room)
        process.kill()
    assert names(room) == [WORK]
    assert run_here(*conversion(base, room / "out", direction, "-q")) == Ran(0, "", "")
    assert names(room) == ["out"] and snapshot(room / "out") == undisturbed


@pytest.fixture
def ordinary_user(base: Path, direction: Path) -> Iterator[Path]:
    """A folder with a model and a direction, read by someone whom permissions hold for: they do not for root."""
    with tempfile.TemporaryDirectory() as name:
        folder, root = Path(name), os.geteuid() == 0
        shutil.copytree(base, folder / "model")
        shutil.copy(direction, folder / "r.safetensors")
        (folder / "room").mkdir()
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755)
            if root:
                os.chown(path, 65534, 65534)
        if root:
            os.setresuid(65534, 65534, 0)
        try:
            yield folder
        finally:
            if root:
                os.setresuid(0, 0, 0)


@pytest.mark.parametrize(
    ("closed", "words"),
    [
        ("model/config.json", r"config\.json cannot be read: Permission denied"),
        ("model/README.md", r"README\.md cannot be read: Permission denied"),
        ("model/model.safetensors.index.json", r"index\.json cannot be read: Permission denied"),
        ("model", "model.*Permission denied"),
        ("room", "room.*Permission denied"),
    ],
)
def test_what_may_not_be_read_or_written(ordinary_user: Path, closed: str, words: str) -> None:
    (ordinary_user / closed).chmod(0)
    model, room = ordinary_user / "model", ordinary_user / "room"
    told(run_here(*conversion(model, room / "out", ordinary_user / "r.safetensors")), words)
    room.chmod(0o755)
    assert names(room) == []


def test_a_direction_that_may_not_be_read_is_wrong_usage(ordinary_user: Path) -> None:
    (ordinary_user / "r.safetensors").chmod(0)
    ran = run_here(
        *conversion(ordinary_user / "model", ordinary_user / "room" / "out", ordinary_user / "r.safetensors")
    )
    assert (ran.code, ran.out) == (2, "") and "r.safetensors' is not readable" in ran.err
    assert names(ordinary_user / "room") == []
