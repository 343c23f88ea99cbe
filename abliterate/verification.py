"""`abliterate verify`: the certificate measured again on the files, and the manifest's hashes against them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from abliterate.certify.certificate import Certificate
from abliterate.checkpoint.files import DIRECTION_FILE, Checkpoint
from abliterate.checkpoint.hashing import file_sha256, shard_sha256
from abliterate.checkpoint.regular import is_file
from abliterate.direction.files import load_cut
from abliterate.edit.cut import Cut
from abliterate.errors import CheckpointError
from abliterate.progress import Progress
from abliterate.proving import assemble, certify_stream, stream_text, tongue_of
from abliterate.publish.manifest import MANIFEST_NAME, read_manifest
from abliterate.subject import RunOptions, Subject, opened
from abliterate.traffic import CERTIFICATE, Passes, tell_traffic


@dataclass(frozen=True)
class Verification:
    """What was measured again.

    Attributes:
        certificate: from the files as they are now.
        mismatches: files whose bytes are not those that the manifest names; empty when there is no manifest.
        manifest: whether there was one to compare with.
        hashed: whether it has hashes of the weights; with `--no-hash` they were left out.
    """

    certificate: Certificate
    mismatches: tuple[str, ...]
    manifest: bool
    hashed: bool = True

    @property
    def holds(self) -> bool:
        """Whether the certificate holds and every file is what the manifest says."""
        return self.certificate.holds and not self.mismatches


def verify(
    checkpoint: str,
    *,
    revision: str | None = None,
    direction: Path | str | None = None,
    options: RunOptions | None = None,
) -> Verification:
    """Measures the certificate of a converted checkpoint again, trusting nothing that it says of itself.

    Args:
        checkpoint: folder or Hub id.
        direction: file with the direction; None takes `refusal_direction.safetensors` in the checkpoint.

    Raises:
        CheckpointError: there is no direction to verify against.
    """
    options = options or RunOptions()
    with opened(checkpoint, revision, options, inexact=True) as subject:
        return _verified(subject, direction, options)


def _verified(subject: Subject, direction: Path | str | None, options: RunOptions) -> Verification:
    recorded = _recorded(subject.folder)
    cut = _cut(subject, direction, recorded)
    tongue = tongue_of(subject, options)
    text = stream_text(subject, tongue, options.trust_remote_code)
    tell_traffic(subject, options, Passes(CERTIFICATE, 1), "float32")
    stream = certify_stream(subject, options, text, cut.main)
    certificate = assemble(subject, None, cut, text, stream, None)
    wrong = mismatches(subject.checkpoint, recorded.hashes, options.progress) if recorded else ()
    return Verification(certificate, wrong, recorded is not None, recorded is not None and recorded.hashed)


@dataclass(frozen=True)
class _Recorded:
    """What the manifest says that can be held against the files.

    Attributes:
        strength: of the edit, where it is one and the same everywhere. `keep_norms`: whether columns kept their length.
        hashes: sha256 by file name.
        hashed: whether those of the weights are among them.
    """

    strength: float
    keep_norms: bool
    hashes: Mapping[str, str]
    hashed: bool


def _recorded(folder: Path) -> _Recorded | None:
    """None where there is no manifest. What it holds is data from outside.

    Raises:
        CheckpointError: it is damaged.
    """
    if not (folder / MANIFEST_NAME).is_file():
        return None
    manifest = read_manifest(folder)
    try:
        shards = manifest["output"]["shards"]
        named = [*shards, {"name": DIRECTION_FILE, "sha256": manifest["direction"]["sha256"]}]
        hashes = {str(item["name"]): str(item["sha256"]) for item in named if item["sha256"]}
        edit = manifest["edit"]
        strength = 1.0 if edit["strength"] is None else float(edit["strength"])
        return _Recorded(
            strength, edit.get("removes", {}).get("norms") == "kept", hashes, all(shard["sha256"] for shard in shards)
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{folder / MANIFEST_NAME} is damaged; convert the base model again") from error


def _cut(subject: Subject, given: Path | str | None, recorded: _Recorded | None) -> Cut:
    path = Path(given) if given is not None else subject.folder / DIRECTION_FILE
    if given is None and not path.is_file():
        raise CheckpointError(f"{subject.name} has no {DIRECTION_FILE} to verify against; give --direction FILE")
    strength, keep = (recorded.strength, recorded.keep_norms) if recorded else (1.0, False)
    return load_cut(path, subject.plan.hidden_size, subject.plan.num_layers, strength, keep)


def mismatches(checkpoint: Checkpoint, hashes: Mapping[str, str], progress: Progress) -> tuple[str, ...]:
    """Names of the files whose sha256 is not the one recorded, or that are not there."""
    return tuple(name for name, wanted in hashes.items() if _sha256(checkpoint, name, progress) != wanted)


def _sha256(checkpoint: Checkpoint, name: str, progress: Progress) -> str | None:
    path = checkpoint.folder / Path(name).name
    shard = next((shard for shard in checkpoint.shards if shard.path == path), None)
    with progress.bar(f"hash {path.name}", path.stat().st_size if is_file(path) else 0, "B") as advance:
        return shard_sha256(shard, advance) if shard else file_sha256(path, advance)
