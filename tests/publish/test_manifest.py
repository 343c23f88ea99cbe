import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from abliterate.errors import CheckpointError
from abliterate.publish.manifest import MANIFEST_NAME, manifest_bytes, manifest_schema, read_manifest

Manifest = dict[str, Any]
Change = Callable[[str, Any], Manifest]
Validator = jsonschema.Draft202012Validator


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    jsonschema.Draft202012Validator.check_schema(manifest_schema())
    return jsonschema.Draft202012Validator(manifest_schema())


def _shuffled(value: Any) -> Any:
    """The same mapping with every object's keys the other way round."""
    if isinstance(value, dict):
        return {key: _shuffled(value[key]) for key in reversed(value)}
    return [_shuffled(item) for item in value] if isinstance(value, list) else value


def _objects(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Where the objects are, the free-form ones left out, and one of each list."""
    if isinstance(value, list):
        return _objects(value[0], (*path, 0)) if value else []
    if not isinstance(value, dict) or path[-1:] in [("recipe",), ("config_changes",)]:
        return []
    return [path, *(found for key in value for found in _objects(value[key], (*path, key)))]


def _optional(place: tuple[str | int, ...]) -> set[str]:
    """What older manifests do not have."""
    if place == ():
        return {"search"}
    if place == ("evaluation",):
        return {"differences"}
    if place[:1] != ("evaluation",):
        return set()
    shape = manifest_schema()["$defs"]["evaluation"]
    by_name = place[1] == "differences" or len(place) > 2
    return set(shape["properties"]) - (set() if by_name else set(shape["required"]))


def test_a_conversion_validates(
    validator: Validator, manifest: Manifest, gemma_manifest: Manifest, older_manifest: Manifest
) -> None:
    for each in (manifest, gemma_manifest, older_manifest):
        validator.validate(json.loads(manifest_bytes(each)))


def test_every_object_is_strict(validator: Validator, manifest: Manifest) -> None:
    places = _objects(manifest)
    assert len(places) > 25
    for place in places:
        changed = copy.deepcopy(manifest)
        inner: Any = changed
        for key in place:
            inner = inner[key]
        inner["unheard_of"] = 1
        assert not validator.is_valid(changed), place
        del inner["unheard_of"]
        for key in sorted(inner.keys() - _optional(place)):
            kept = inner.pop(key)
            assert not validator.is_valid(changed), (place, key)
            inner[key] = kept


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("direction.sha256", "abc"),
        ("base.id", 3),
        ("edit.strength", 0),
        ("edit.head", "maybe"),
        ("evaluation.base.refusal_rate_score", 1.5),
        ("evaluation.base.intervals", {"refusal_rate_score": [0.1]}),
        ("evaluation.differences", {"no_such_figure": {"value": 0, "low": 0, "high": 0}}),
        ("evaluation.differences", {"cross_entropy": {"value": 0, "low": 0}}),
        ("selection.pick.position", 0),
        ("output.files", ["../secret"]),
        ("output.files", ["/etc/passwd"]),
        ("calibration.harmful.source", "/home/someone/prompts.txt"),
        ("schema", "abliteration/2"),
        ("certificate.stream.text", "verse"),
    ],
)
def test_wrong_values_are_found(validator: Validator, change: Change, path: str, value: Any) -> None:
    assert not validator.is_valid(change(path, value))


def test_equal_manifests_give_equal_bytes(manifest: Manifest) -> None:
    assert manifest_bytes(_shuffled(manifest)) == manifest_bytes(manifest)


def test_layout(manifest: Manifest) -> None:
    text = manifest_bytes(manifest).decode()
    assert text.startswith('{\n  "schema": "abliteration/1",\n  "tool": {\n    "abliterate"')
    assert text.endswith("\n}\n")
    assert list(json.loads(text)) == list(manifest_schema()["properties"])


def test_what_is_not_finite_is_null(validator: Validator, change: Change) -> None:
    for value in (float("nan"), float("inf"), float("-inf")):
        written = json.loads(manifest_bytes(change("evaluation.edited.cross_entropy", value)))
        assert written["evaluation"]["edited"]["cross_entropy"] is None
        validator.validate(written)


def test_tuples_and_texts_of_any_kind(change: Change) -> None:
    tokens = ("\udce2", "é", "Ċ", '"')
    written = manifest_bytes(change("calibration.chat.post_instruction_tokens", tokens))
    assert json.loads(written)["calibration"]["chat"]["post_instruction_tokens"] == list(tokens)
    assert "é".encode() in written


def test_other_types_are_named(change: Change) -> None:
    with pytest.raises(TypeError, match=r"manifest\.edit\.added\[0\] is a PosixPath"):
        manifest_bytes(change("edit.added", [Path("/x")]))
    with pytest.raises(TypeError, match=r"manifest\.recipe has a key that is no string: 1"):
        manifest_bytes(change("recipe", {1: 2}))


def test_no_folder_of_this_machine_is_published(validator: Validator, manifest: Manifest) -> None:
    manifest["base"]["id"] = "/home/someone/models/pico"
    manifest["recipe"]["harmful"] = "/data/sets/bad.jsonl:text"
    manifest["recipe"]["nested"] = [{"file": "C:\\Users\\someone\\good.txt"}]
    manifest["calibration"]["harmful"]["source"] = "/data/sets/bad.jsonl:text"
    manifest["calibration"]["chat"]["template_source"] = "~/someone/chat.jinja"
    manifest["warnings"] = ["tensor x of '/data/sets/my.safetensors' is odd; see https://a.example/b/c and up/down"]
    manifest["reproduce"] = "abliterate convert '/home/someone/my models/pico' out/x --harmful=/data/sets/bad.jsonl"
    before = copy.deepcopy(manifest)
    raw = manifest_bytes(manifest)
    assert manifest == before
    assert not [word for word in (b"someone", b"/data", b"/home", b"Users") if word in raw]
    written = json.loads(raw)
    validator.validate(written)
    assert written["base"]["id"] == "pico"
    assert written["recipe"]["harmful"] == written["calibration"]["harmful"]["source"] == "bad.jsonl:text"
    assert written["recipe"]["nested"] == [{"file": "good.txt"}]
    assert written["warnings"] == ["tensor x of 'my.safetensors' is odd; see https://a.example/b/c and up/down"]
    assert written["reproduce"] == "abliterate convert pico out/x --harmful=bad.jsonl"


def test_a_system_prompt_is_no_path(change: Change) -> None:
    command = "abliterate convert a/b OUT --system-prompt '/no_think /a/b' --template /x/y.jinja"
    written = json.loads(manifest_bytes(change("reproduce", command)))["reproduce"]
    assert written == "abliterate convert a/b OUT --system-prompt '/no_think /a/b' --template y.jinja"


def test_names_that_are_no_paths_stay(manifest: Manifest) -> None:
    texts = json.loads(manifest_bytes(manifest))
    assert texts["base"]["id"] == "example-org/Pico-Chat-135M"
    assert texts["reproduce"] == manifest["reproduce"]
    assert texts["calibration"]["harmful"]["source"] == "builtin:harmful"


def test_reads_what_it_wrote(tmp_path: Path, manifest: Manifest) -> None:
    (tmp_path / MANIFEST_NAME).write_bytes(manifest_bytes(manifest))
    assert read_manifest(tmp_path) == manifest


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no abliteration.json"),
        (b"{", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[" * 200_000, "cannot be read"),
        (b'{"schema": "abliteration/1", "a": ' + b"[" * 900 + b"]" * 900 + b"}", "not a manifest"),
        (b"[]", "not a manifest of schema abliteration/1"),
        (b'{"schema": "abliteration/9"}', "not a manifest of schema"),
        (b'{"schema": "abliteration/1"}', "lacks tool"),
    ],
)
def test_what_is_no_manifest_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / MANIFEST_NAME).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_manifest(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.timeout(20)
def test_a_pipe_or_an_endless_file_is_no_manifest(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / MANIFEST_NAME)
    with pytest.raises(CheckpointError, match="is not a regular file"):
        read_manifest(tmp_path)
    (tmp_path / MANIFEST_NAME).unlink()
    (tmp_path / MANIFEST_NAME).touch()
    os.truncate(tmp_path / MANIFEST_NAME, 1 << 40)
    with pytest.raises(CheckpointError, match="is larger than"):
        read_manifest(tmp_path)
