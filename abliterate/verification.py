"""`abliterate verify`: the certificate measured again on the files, and the manifest's hashes against them."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from abliterate.certify.certificate import Certificate
from abliterate.certify.stream import measure_stream
from abliterate.direction.files import load_direction
from abliterate.errors import CheckpointError
from abliterate.progress import Progress
from abliterate.proving import assemble, stream_text, tongue_of
from abliterate.publish.manifest import MANIFEST_NAME, read_manifest
from abliterate.record import DIRECTION_FILE
from abliterate.subject import RunOptions, Subject, load_model, open_subject

CHUNK = 1 << 22


@dataclass(frozen=True)
class Verification:
    """What was measured again.

    Attributes:
        certificate: from the files as they are now.
        mismatches: files whose bytes are not those that the manifest names; empty when there is no manifest.
        manifest: whether there was one to compare with.
    """

    certificate: Certificate
    mismatches: tuple[str, ...]
    manifest: bool

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
    subject = open_subject(checkpoint, revision)
    manifest = read_manifest(subject.folder) if (subject.folder / MANIFEST_NAME).is_file() else None
    vector = _direction(subject, direction)
    tongue = tongue_of(subject, options)
    text = stream_text(subject, tongue)
    model = load_model(subject, options, dtype="float32", tokenizer=tongue.tokenizer)
    stream = measure_stream(model, text.prompts, vector, options.progress)
    strength = float(manifest["edit"]["strength"]) if manifest else 1.0
    certificate = assemble(subject, None, vector, text, stream, None, strength)
    wrong = mismatches(subject.folder, manifest, options.progress) if manifest else ()
    return Verification(certificate, wrong, manifest is not None)


def _direction(subject: Subject, given: Path | str | None) -> Tensor:
    path = Path(given) if given is not None else subject.folder / DIRECTION_FILE
    if given is None and not path.is_file():
        raise CheckpointError(f"{subject.name} has no {DIRECTION_FILE} to verify against; give --direction FILE")
    return load_direction(path, subject.plan.hidden_size)


def mismatches(folder: Path, manifest: Mapping[str, Any], progress: Progress) -> tuple[str, ...]:
    """Names of the shards and direction file whose sha256 is not the manifest's."""
    named = [*manifest["output"]["shards"], {"name": DIRECTION_FILE, "sha256": manifest["direction"]["sha256"]}]
    hashed = [(item["name"], item["sha256"]) for item in named if item["sha256"]]
    return tuple(name for name, wanted in hashed if _sha256(folder, name, progress) != wanted)


def _sha256(folder: Path, name: str, progress: Progress) -> str | None:
    path = folder / Path(name).name
    if not path.is_file():
        return None
    digest = hashlib.sha256()
    with path.open("rb") as file, progress.bar(f"hash {path.name}", path.stat().st_size, "B") as advance:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()
