"""How much memory there is, how much a model needs, and so whether its weights stay in it or are streamed through."""

import logging
import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from abliterate.architecture.writer import layer_of
from abliterate.sizes import shown

log = logging.getLogger(__name__)

MARGIN = 1 << 30
"""Left for activations, the vocabulary's logits and everything else."""
SPOOL_BYTES = 128 << 20
"""Of activations that wait in memory when weights are streamed."""
SHARE = 0.8
"""Of what is free, that `auto` takes when it streams."""
_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


@dataclass(frozen=True)
class Need:
    """Bytes that a model takes in the dtype that is computed in.

    Attributes:
        layers: of each decoder layer. `beside`: of everything else.
    """

    layers: tuple[int, ...]
    beside: int

    @property
    def total(self) -> int:
        """Of the whole model."""
        return sum(self.layers) + self.beside


@dataclass(frozen=True)
class Placement:
    """Where weights are while a model runs.

    Attributes:
        streamed: decoder layers are loaded when a pass comes to them, and dropped behind it.
        held: how many of the first layers stay, once loaded.
        ahead: the next layer is loaded while one computes.
        spread: over several GPUs.
        reason: in one line.
    """

    streamed: bool
    held: int = 0
    ahead: bool = False
    spread: bool = False
    reason: str = ""


def need_of(shapes: Mapping[str, Sequence[int]], layers: Sequence[str], itemsize: int) -> Need:
    """What parameters of these shapes, by name, take; `layers` names the decoder layers' modules."""
    each = dict.fromkeys(layers, 0)
    beside = 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * itemsize
        layer = layer_of(name, each)
        if layer is None:
            beside += size
        else:
            each[layer] += size
    return Need(tuple(each.values()), beside)


def place(memory: str | int, need: Need, device: torch.device) -> Placement:
    """Decides.

    Args:
        memory: see `parse_memory`.
    """
    if memory == "resident":
        return Placement(False, reason="asked for", spread=_spread(need, device))
    if memory == "streamed":
        return Placement(True, ahead=device.type == "cuda", reason="asked for")
    free = available(device) if memory == "auto" else int(memory)
    if need.total + MARGIN <= free or _spread(need, device):
        reason = f"{shown(need.total)} of weights fit into {shown(free)}"
        return Placement(False, reason=reason, spread=_spread(need, device))
    limit = int(free * SHARE) if memory == "auto" else free
    return _streamed(need, device, limit, f"{shown(need.total)} of weights do not fit into {shown(free)}")


def place_fetched(memory: str | int, need: Need, device: torch.device) -> Placement:
    """As `place`, where shards come and go: weights then come layer by layer, and stay as far as there is room.

    What does not stay is downloaded again for every pass.
    """
    plain = place(memory, need, device)
    if plain.streamed:
        return plain
    if plain.spread:
        return _streamed(need, device, int(available(device) * SHARE), "fetched weights are not spread over devices")
    return Placement(True, len(need.layers), device.type == "cuda", reason=f"{plain.reason}, once they are fetched")


def _streamed(need: Need, device: torch.device, limit: int, reason: str) -> Placement:
    """Layers stay, from the first on, as far as there is room beside the one that computes and the next one."""
    beside = need.beside if device.type != "cpu" else 0
    room = limit - MARGIN - beside - 2 * max(need.layers, default=0)
    ahead, held = room >= 0 or device.type == "cuda", 0
    for size in need.layers:
        room -= size
        if room < 0:
            break
        held += 1
    return Placement(True, held, ahead, reason=reason)


def _spread(need: Need, device: torch.device) -> bool:
    """Whether one GPU is too small and all of them together are not."""
    count = torch.cuda.device_count() if device.type == "cuda" and device.index is None else 0
    if count < 2:
        return False
    free = [torch.cuda.mem_get_info(index)[0] for index in range(count)]
    return free[0] < need.total + MARGIN <= sum(free)


def available(device: torch.device) -> int:
    """Bytes that can be had on a device: what the machine, the container and the process's limits leave."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return max(0, min(limits().values()))


def limits() -> dict[str, int]:
    """What is left in bytes, by whom or what sets a limit: the machine always, others where there are any."""
    left = {"machine": int(psutil.virtual_memory().available)}
    for limit, used in _CGROUPS:
        for size in _left(Path(limit), Path(used)):
            left["container"] = min(size, left.get("container", size))
    own = psutil.Process().memory_info()
    for name, kind, taken in (("ulimit -v", resource.RLIMIT_AS, own.vms), ("ulimit -d", resource.RLIMIT_DATA, own.rss)):
        soft = resource.getrlimit(kind)[0]
        left |= {name: soft - taken} if soft != resource.RLIM_INFINITY else {}
    return left


def _left(limit: Path, used: Path) -> list[int]:
    """What a container's limit leaves; nothing where there is none."""
    try:
        most, now = limit.read_text().strip(), int(used.read_text())
    except (OSError, ValueError):
        return []
    return [int(most) - now] if most.isdigit() and int(most) < 2**60 else []
