"""What transformers makes of a config: the parameters its model has, and which stored tensor fills which of them.

Built on the meta device, so that it costs no memory whatever the model's size. This is what a checkpoint is held
against: a tensor that is missing, left over or of another shape shows here, for every architecture alike, and the table
need not say which switch of config.json brings which bias.
"""

import copy
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.utils import logging as transformers_logging

from abliterate.architecture.conversion import steps_of
from abliterate.errors import ArchitectureError, first_line

_HIDDEN_KEYS = ("hidden_size", "d_model", "n_embd", "emb_dim", "dim")
MOST_LAYERS = 10_000
MOST_LABELS = 100_000
_DEPTH = re.compile(r"layers?$|^depth$|blocks?$|experts$")


@dataclass(frozen=True)
class Place:
    """Where a stored tensor goes.

    Attributes:
        parameters: run-time names; none where transformers does not use the tensor.
        converted: it is fused, cut or turned on the way, so that its shape is not the parameter's.
        source: of the patterns that the parameters are made from, the one that it matches; `sources`: all of them.
        stacked: every tensor of the pattern becomes one slice of the parameter (experts).
        turned: axes change places.
    """

    parameters: tuple[str, ...]
    converted: bool = False
    source: str = field(default="", compare=False)
    sources: tuple[str, ...] = field(default=(), compare=False)
    stacked: bool = field(default=False, compare=False)
    turned: bool = field(default=False, compare=False)


@dataclass(frozen=True)
class Blueprint:
    """A model as its config describes it.

    Attributes:
        class_name: of the model that transformers builds.
        hidden_size: width of the residual stream.
        shapes: of every parameter and persistent buffer, by run-time name.
        embedding: run-time name of the token embedding. `head`: of the output head's weight; None where there is none.
        aliases: run-time names that stand for one shared parameter, the first of them for the others.
        model: on the meta device.
    """

    class_name: str
    hidden_size: int
    shapes: Mapping[str, tuple[int, ...]]
    embedding: str
    head: str | None
    aliases: Mapping[str, str]
    model: PreTrainedModel

    @property
    def tied(self) -> bool:
        """Whether the output head is the token embedding."""
        return self.head is not None and self._shared(self.head) == self._shared(self.embedding)

    def _shared(self, name: str) -> str:
        return self.aliases.get(name, name)

    def untied(self) -> dict[str, str]:
        """The aliases that are left when config.json says that the head is not tied."""
        config = copy.deepcopy(self.model.config)
        for part in (config, config.get_text_config(decoder=True)):
            part.tie_word_embeddings = False
        return _aliases(_on_meta(config, type(self.model)))

    def places(self, names: Iterable[str]) -> dict[str, Place]:
        """For each stored tensor, the run-time parameters that it goes into."""
        renamings, converters = steps_of(self.model)
        return {name: self._place(name, renamings, converters) for name in names}

    def _place(self, name: str, renamings: list[Any], converters: list[Any]) -> Place:
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        for converter in converters:
            renamed, matched = converter.rename_source_key(name)
            if matched is not None:
                first, *others = map(str, converter.target_patterns)
                names = [renamed, *(renamed.replace(first, other) for other in others)]
                kinds = {type(operation).__name__ for operation in converter.operations}
                return Place(
                    self._found(names),
                    True,
                    str(matched),
                    _weights(list(map(str, converter.source_patterns))),
                    "MergeModulelist" in kinds,
                    bool(kinds - {"MergeModulelist", "Concatenate"}),
                )
        return Place(self._found([name]))

    def _found(self, names: list[str]) -> tuple[str, ...]:
        return tuple(found for name in names if (found := self._rooted(name)) is not None)

    def _rooted(self, name: str) -> str | None:
        """The name with or without the base model's prefix, whichever the model has."""
        base = f"{self.model.base_model_prefix}."
        choices = (name.removeprefix(base), base + name) if name.startswith(base) else (base + name, name)
        return next((choice for choice in (*choices, name) if choice in self.shapes), None)

    def missing(self, filled: Iterable[str]) -> list[str]:
        """Parameters that no stored tensor fills; one that shares its storage with a filled one is filled."""
        shared = {self._shared(name) for name in filled}
        optional = _any_of(self.model._keys_to_ignore_on_load_missing or ())
        return [name for name in self.shapes if self._shared(name) not in shared and not optional(name)]


def _weights(patterns: Sequence[str]) -> tuple[str, ...]:
    """Without scales (`w2_weight_scale` beside `w2_weight`): only quantized weights have them."""
    return tuple(name for name in patterns if not any(name != other and name.startswith(other) for other in patterns))


def _any_of(patterns: Iterable[str]) -> Callable[[str], bool]:
    """A test whether any pattern is found in a name."""
    found = [re.compile(pattern) for pattern in patterns]
    return lambda name: any(pattern.search(name) for pattern in found)


def read_blueprint(folder: Path, config: Mapping[str, Any], trust_remote_code: bool = False) -> Blueprint:
    """The blueprint of a checkpoint's config.

    Args:
        folder: with config.json, and the model's own code where it brings some.
        config: what config.json says.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        ArchitectureError: transformers does not know the model type, or cannot build a model from the config.
    """
    return _cached(folder, json.dumps(config, sort_keys=True), trust_remote_code)


@functools.lru_cache(maxsize=4)
def _cached(folder: Path, config: str, trust_remote_code: bool) -> Blueprint:
    content = json.loads(config)
    _check_depth(content, str(content.get("model_type")))
    try:
        with quiet():
            settings = read_config(folder, content, trust_remote_code)
            return blueprint_of(settings, model_class(settings, content, trust_remote_code))
    except ArchitectureError:
        raise
    except Exception as error:  # whatever a config of wrong values makes a model's code raise
        raise ArchitectureError(
            f"transformers {transformers.__version__} cannot build a {content.get('model_type')} from this "
            f"config.json: {first_line(error)}"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers' remarks on a config (deprecated keys, missing kernels) out of what the user reads."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def _check_depth(content: Mapping[str, Any], model_type: str) -> None:
    """A forged number of layers would be built one by one, one of labels named one by one.

    Raises:
        ArchitectureError: there are absurdly many.
    """
    for key, value in content.items():
        if isinstance(value, dict):
            _check_depth(value, model_type)
            continue
        most = MOST_LABELS if key == "num_labels" else MOST_LAYERS if _DEPTH.search(key) else None
        if most is not None and isinstance(value, int) and value > most:
            raise ArchitectureError(f"config.json has {key} = {value}; no {model_type} has more than {most}")


def blueprint_of(config: Any, build: Callable[[Any], PreTrainedModel]) -> Blueprint:
    """The blueprint of a config object; `build` makes its model."""
    model = _on_meta(config, build)
    return _blueprint(model)


def _on_meta(config: Any, build: Callable[[Any], PreTrainedModel]) -> PreTrainedModel:
    if isinstance(getattr(config, "dtype", None), str):
        config = copy.deepcopy(config)
        config.dtype = getattr(torch, config.dtype)  # as it is once a checkpoint is loaded; some models build with it
    with torch.device("meta"):
        model = build(config)
    model.tie_weights()
    return model


def read_config(folder: Path, content: Mapping[str, Any], trust_remote_code: bool = False) -> Any:
    """The config object of a checkpoint.

    Raises:
        ArchitectureError: transformers has no class for its model type.
    """
    kind = str(content.get("model_type"))
    if kind not in transformers.CONFIG_MAPPING and not trust_remote_code:
        hint = "; its own code can be run with --trust-remote-code" if "auto_map" in content else ""
        raise ArchitectureError(
            f"model type {kind} is not known to transformers {transformers.__version__}{hint}; a newer release of "
            "transformers may know it"
        )
    return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)


def model_class(config: Any, content: Mapping[str, Any], trust_remote_code: bool = False) -> Any:
    """The class that config.json names, else the one that transformers takes to generate text.

    Raises:
        ArchitectureError: there is none.
    """
    named = next(iter(content.get("architectures") or ()), None)
    found: Any = getattr(transformers, str(named), None) if isinstance(named, str) else None
    own = (type(config), type(config.get_text_config(decoder=True)))
    if isinstance(found, type) and issubclass(found, PreTrainedModel) and getattr(found, "config_class", None) in own:
        return found
    if trust_remote_code and "auto_map" in content:
        return functools.partial(AutoModelForCausalLM.from_config, trust_remote_code=True)
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in auto._model_mapping:
            return auto._model_mapping[type(config)]
    raise ArchitectureError(f"transformers has no model that generates text for model type {config.model_type}")


def _blueprint(model: PreTrainedModel) -> Blueprint:
    aliases = _aliases(model)
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings() or _named_head(model)
    config = model.config.get_text_config(decoder=True)
    hidden = next((value for key in _HIDDEN_KEYS if isinstance(value := getattr(config, key, None), int)), None)
    if embedding is None or not isinstance(hidden, int):
        raise ArchitectureError(f"{type(model).__name__} has no token embedding, or its config no hidden size")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return Blueprint(
        type(model).__name__,
        hidden,
        shapes,
        _weight_of(embedding, model) or "",
        _weight_of(head, model),
        aliases,
        model,
    )


def _named_head(model: nn.Module) -> Any:
    """The head of a text tower that the whole model does not own up to."""
    return next((module for name, module in model.named_modules() if name.endswith("lm_head")), None)


def _aliases(model: nn.Module) -> dict[str, str]:
    """Further names of shared parameters to the first one."""
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases[name] = first.setdefault(id(parameter), name)
    return {name: shared for name, shared in aliases.items() if name != shared}


def _weight_of(wanted: Any, model: nn.Module) -> str | None:
    """Run-time name of a module's first matrix, by its own name where it shares it with another."""
    for name, module in model.named_modules(remove_duplicate=False):
        if module is wanted:
            matrices = [key for key, parameter in module.named_parameters() if parameter.dim() == 2]
            return f"{name}.{matrices[0]}" if matrices else None
    return None
