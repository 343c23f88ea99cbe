"""A model whose decoder layers have no weights until they are loaded, one at a time, from the checkpoint's shards."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import GenerationConfig

from abliterate.architecture.blueprint import Place, model_class, quiet, read_blueprint, read_config
from abliterate.architecture.conversion import Filler
from abliterate.architecture.writer import layer_of
from abliterate.calibration.load import Changes, change
from abliterate.calibration.spool import mapped
from abliterate.checkpoint.files import Checkpoint
from abliterate.checkpoint.keeper import held
from abliterate.checkpoint.read import StoredTensor, iter_blocks
from abliterate.errors import AbliterateError, CheckpointError, first_line
from abliterate.malloc import give_back

log = logging.getLogger(__name__)

MAPPED_BYTES = 16 << 20
"""From this size on, weights beside the layers are kept in a mapped file: the system can put them out of memory."""


def empty_model(checkpoint: Checkpoint, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """The model as `from_pretrained` builds it, its parameters on the meta device, its other buffers as they are."""
    content = checkpoint.config
    config = read_config(checkpoint.folder, content, trust_remote_code)
    build = model_class(config, content, trust_remote_code)
    with quiet(), init_empty_weights(include_buffers=False):
        model = (build._from_config if isinstance(build, type) else build)(config, dtype=dtype)  # type: ignore[attr-defined]
    model.tie_weights()
    if (checkpoint.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder, local_files_only=True)
    return model.eval().requires_grad_(False)


class LayerStore:
    """Loads and drops the weights of decoder layers (a `Weights`, see `lockstep`).

    Args:
        checkpoint: where they are stored.
        layer_names: of the modules that are decoder layers, in order.
        dtype: to compute in. `device`: where layers are put.
        scratch: folder for what is mapped.
        held: how many of the first layers stay in memory once they were loaded.
        changes: made to weights whenever they are loaded.
        ahead: load the next layer, in another thread, while one computes.

    Attributes:
        model: of transformers; everything but its layers is filled.
        layers: its decoder layers.
        bytes_read: of stored weights so far.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layer_names: Sequence[str],
        *,
        dtype: torch.dtype,
        device: torch.device,
        scratch: Path,
        held: int = 0,
        ahead: bool = False,
        trust_remote_code: bool = False,
        changes: Changes | None = None,
    ) -> None:
        self._checkpoint, self._dtype, self._device, self._changes = checkpoint, dtype, device, changes or {}
        self.model = empty_model(checkpoint, dtype, trust_remote_code)
        self.layers: list[nn.Module] = [self.model.get_submodule(name) for name in layer_names]
        self._filler = Filler(self.model, dtype)
        places = read_blueprint(checkpoint.folder, checkpoint.config, trust_remote_code).places(checkpoint.tensors)
        self._places = places
        self._groups, beside = grouped(self.model, layer_names, places)
        self._held, self._kept = held, set[int]()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="layers") if ahead else None
        self._coming: dict[int, Future[None]] = {}
        self._at = 0
        self._copies = torch.cuda.Stream(device) if ahead and device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.bytes_read = 0
        self._fill_beside(beside, places, scratch)

    def load(self, index: int) -> None:
        """See `Weights`.

        Raises:
            CheckpointError: a shard changed, or is damaged.
        """
        if index not in self._kept:
            coming = self._coming.pop(index, None)
            if coming is not None:
                coming.result()
            else:
                self._fill_layer(index)
        if index < self._held:
            self._kept.add(index)
        step, self._at = -1 if index == self._at - 1 else 1, index
        self._prepare((index + step) % len(self._groups))

    def release(self, index: int) -> None:
        """See `Weights`."""
        if index in self._kept:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # what was queued still reads the weights
        self._drop(index)

    def _drop(self, index: int) -> None:
        for place in self._groups[index].empty:
            place.put()
        give_back()

    def _prepare(self, index: int) -> None:
        """Gets what comes next: into memory in another thread, or at least off the disk, while this layer computes."""
        for other in self._coming.keys() - {index}:
            self._coming.pop(other).result()
            self._drop(other)
        if index in self._kept or index in self._coming:
            return
        if self._thread is None:
            self._announce(self._groups[index].names)
        elif len(self._groups) > 1:
            self._coming[index] = self._thread.submit(self._fill_layer, index)

    def _fill_layer(self, index: int) -> None:
        names = self._groups[index].names
        shards = {shard.path: shard for shard in map(self._checkpoint.shard_of, names)}
        with held([*shards.values()]), torch.cuda.stream(self._copies) if self._copies else nullcontext():
            self._fill(names)
            self._change(names)
        if self._copies:
            self._copies.synchronize()
        self.layers[index].requires_grad_(False)

    def _fill(self, names: Sequence[str]) -> None:
        checkpoint = self._checkpoint
        stored = {name: StoredTensor(checkpoint.shard_of(name), checkpoint.tensors[name]) for name in names}
        with torch.inference_mode(False), quiet():
            try:
                self._filler.fill(stored, self._device)
            except (AbliterateError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # transformers' conversion raises errors of every kind
                raise CheckpointError(f"{checkpoint.folder} cannot be streamed: {first_line(error)}") from error
        self.bytes_read += sum(checkpoint.tensors[name].nbytes for name in names)

    def _change(self, names: Sequence[str]) -> None:
        with torch.inference_mode(False):
            change(self.model, self._changes, {p for name in names for p in self._places[name].parameters})

    def _announce(self, names: Sequence[str]) -> None:
        """Has the system read what comes next while this layer computes; it goes into no memory of ours."""
        if self._checkpoint.keeper is not None or not hasattr(os, "posix_fadvise"):
            return
        for path in {self._checkpoint.shard_of(name).path for name in names}:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                for start, size in _ranges(self._checkpoint, names, path):
                    os.posix_fadvise(fd, start, size, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(fd)

    def _fill_beside(self, names: Sequence[str], places: Mapping[str, Place], scratch: Path) -> None:
        """Everything that is in no layer, or in several; large matrices in mapped files, where the CPU computes."""
        targets = self.model.state_dict()
        large = {name for name in names if self._can_be_mapped(name, places[name], targets)}
        for name in large:
            self._map(name, places[name].parameters[0], scratch)
        self._fill([name for name in names if name not in large])
        self.model.tie_weights()
        self.model.requires_grad_(False)
        self._change(names)
        inside = {id(place.value) for group in self._groups for place in group.empty}
        missing = [name for name, p in self.model.named_parameters() if p.is_meta and id(p) not in inside]
        if missing:
            raise CheckpointError(f"{self._checkpoint.folder} does not fill its own model: missing keys {missing[0]}")

    def _can_be_mapped(self, name: str, place: Place, targets: Mapping[str, Tensor]) -> bool:
        info = self._checkpoint.tensors[name]
        if self._device.type != "cpu" or info.nbytes < MAPPED_BYTES or place.converted or len(place.parameters) != 1:
            return False
        target = targets[place.parameters[0]]
        kept = any(pattern.replace("*", "") in place.parameters[0] for pattern in self._filler.kept)
        return not kept and tuple(target.shape) == info.shape and target.dtype == self._dtype

    def _map(self, name: str, parameter: str, scratch: Path) -> None:
        """Reads a matrix block by block into a mapped file, in the dtype that is computed in."""
        info = self._checkpoint.tensors[name]
        room = mapped(scratch, info.numel * self._dtype.itemsize).view(self._dtype).reshape(info.shape)
        for rows, block in iter_blocks(self._checkpoint.shard_of(name), info):
            room[rows] = block
        module, _, key = parameter.rpartition(".")
        self.model.get_submodule(module)._parameters[key] = nn.Parameter(room, requires_grad=False)
        self.bytes_read += info.nbytes


@dataclass(frozen=True)
class _Slot:
    """Where a parameter or buffer of a layer is, and the empty one that is there while the layer is not loaded."""

    store: dict[str, Tensor | None]
    key: str
    value: Tensor

    def put(self) -> None:
        """Takes the weights out."""
        self.store[self.key] = self.value


@dataclass(frozen=True)
class Group:
    """What one layer needs: names of stored tensors, and where they go."""

    names: tuple[str, ...]
    empty: tuple[_Slot, ...]


def grouped(
    model: nn.Module, layers: Sequence[str], places: Mapping[str, Place]
) -> tuple[tuple[Group, ...], tuple[str, ...]]:
    """The stored tensors of each layer, and those beside the layers: also what several layers share."""
    names: dict[str, list[str]] = {layer: [] for layer in layers}
    owners: dict[int, set[str]] = {}
    tensors = dict(_all_tensors(model))
    for name, tensor in tensors.items():
        owners.setdefault(id(tensor), set()).add(layer_of(name, names) or "")
    beside: list[str] = []
    for name, place in places.items():
        found = set[str]().union(*(owners[id(tensors[p])] for p in place.parameters if p in tensors))
        owner = next(iter(found)) if len(found) == 1 else ""
        if place.parameters:
            names.get(owner, beside).append(name)
    groups = []
    for layer in layers:
        filled = [p for name in names[layer] for p in places[name].parameters]
        groups.append(Group(tuple(names[layer]), tuple(_slot(model, p) for p in dict.fromkeys(filled))))
    return tuple(groups), tuple(beside)


def _all_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _slot(model: nn.Module, parameter: str) -> _Slot:
    path, _, key = parameter.rpartition(".")
    module = model.get_submodule(path)
    store: Any = module._parameters if key in module._parameters else module._buffers
    value = store[key]
    empty = value if value.is_meta else torch.empty_like(value, device="meta")
    return _Slot(store, key, empty)


def _ranges(checkpoint: Checkpoint, names: Sequence[str], path: Path) -> Iterator[tuple[int, int]]:
    for name in names:
        shard = checkpoint.shard_of(name)
        if shard.path == path:
            info = shard.tensors[name]
            yield shard.data_start + info.start, info.nbytes
