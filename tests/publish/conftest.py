"""A manifest as a conversion of a small chat model would write it, and the other shapes that are made from it."""

import copy
import hashlib
import json
import math
from collections.abc import Callable
from typing import Any

import pytest

from abliterate.evaluation.metrics import KINDS
from abliterate.evaluation.sets import Evaluation, Samples
from abliterate.publish.manifest import manifest_schema
from abliterate.recipe import Recipe
from abliterate.record import evaluation_record

LAYERS = 30
POSITIONS = 5
TOKENS = ["<|im_end|>", "\n", "<|im_start|>", "assistant", "\n"]


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _scores(position: int, layer: int) -> tuple[float, float, float]:
    """Bypass, induce and KL with the shape that real models show: best in the middle layers, at the last positions."""
    near = math.exp(-(((layer - 14) / 6) ** 2)) * (1 + 0.12 * position)
    bypass = 9.2 - 15.5 * near + 0.4 * math.sin(3 * layer + position)
    induce = -11.0 + 19.0 * near - 0.05 * layer + 0.5 * math.sin(2 * layer - position)
    return bypass, induce, 0.004 * math.exp(0.16 * layer) * (1 - 0.1 * position) + 0.02 * (layer < 2)


def _candidate(position: int, layer: int) -> dict[str, Any]:
    bypass, induce, kl = _scores(position, layer)
    row: dict[str, Any] = {"position": position, "layer": layer, "bypass": None, "induce": None, "kl": None}
    if layer >= 24:
        return {**row, "prompts": 0, "status": "layer"}
    if (position, layer) not in {(-1, 13), (-1, 14), (-1, 15), (-2, 13), (-2, 14), (-1, 20), (-2, 20), (-1, 5)}:
        half = (position * 7 + layer) % 2 == 0
        return (
            {**row, "bypass": bypass, "kl": kl, "prompts": 4, "status": "screened"}
            if half
            else {**row, "prompts": 0, "status": "screened"}
        )
    status = "kl" if kl > 0.1 else "induce" if induce < 0 else "picked" if (position, layer) == (-1, 14) else "passed"
    return {**row, "bypass": bypass, "induce": induce, "kl": kl, "prompts": 32, "status": status}


def build_selection() -> dict[str, Any]:
    candidates = [_candidate(position, layer) for position in range(-POSITIONS, 0) for layer in range(LAYERS)]
    pick = next(c for c in candidates if c["status"] == "picked")
    return {
        "method": "screened",
        "forward_passes": 2176,
        "exhaustive_forward_passes": 11520,
        "thresholds": {"max_layer_fraction": 0.8, "max_kl": 0.1, "min_induce": 0.0, "strict": False},
        "relaxed": False,
        "reason": "lowest bypass of 5 candidates that pass every filter",
        "pick": {key: pick[key] for key in ("position", "layer", "bypass", "induce", "kl")},
        "candidates": candidates,
        "baseline": {"harmful": 8.713, "harmless": -10.42},
    }


def _prompts(kind: str, kept: int) -> dict[str, Any]:
    return {"source": f"builtin:{kind}", "sha256": _sha(kind), "train": 160, "validation": 32, "kept": kept}


def build_calibration() -> dict[str, Any]:
    return {
        "harmful": _prompts("harmful", 151),
        "harmless": _prompts("harmless", 158),
        "chat": {
            "template_source": "model",
            "template_sha256": _sha("template"),
            "system_prompt": None,
            "thinking": "none",
            "post_instruction_tokens": TOKENS,
        },
        "refusal_tokens": {"source": "completions", "tokens": [{"id": 57, "text": "I"}, {"id": 2683, "text": "Sorry"}]},
        "seed": 0,
        "device": "cpu",
        "dtype": "float32",
        "batch_size": 16,
    }


def _writer(tensor: str, kind: str, axis: int, before: float, after: float) -> dict[str, Any]:
    return {
        "tensor": tensor,
        "kind": kind,
        "axis": axis,
        "form": "plain",
        "gain": None,
        "residual_before": before,
        "residual_after": after,
        "tolerance": 1.25e-4,
        "holds": True,
    }


def _writers() -> list[dict[str, Any]]:
    rows = [_writer("model.embed_tokens.weight", "embedding", 1, 0.0391, 2.2e-6)]
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        rows.append(_writer(f"{name}.self_attn.o_proj.weight", "attention", 0, 0.04 + 0.001 * layer, 6.1e-6))
        rows.append(_writer(f"{name}.mlp.down_proj.weight", "mlp", 0, 0.05 + 0.001 * layer, 4e-6 + 1e-7 * layer))
    return rows


def _flags(hits: int, total: int = 64) -> tuple[bool, ...]:
    return tuple(i < hits for i in range(total))


def _spread(mean: float, count: int = 64) -> tuple[float, ...]:
    """Values around a mean, a few of them far above it, as those of prompts are."""
    drawn = [1.8 if i % 9 == 0 else 0.9 for i in range(count)]
    return tuple(mean * each * count / sum(drawn) for each in drawn)


def _evaluation(refused: tuple[int, ...], losses: tuple[float, float], distances: tuple[float, ...]) -> Evaluation:
    """Figures of prompts refused by phrase and score of each kind, degenerate answers, and losses."""
    names = [f"{kind}_{how}" for kind in KINDS for how in ("substring", "score")]
    verdicts = {name: _flags(hits) for name, hits in zip((*names, "degenerate_rate"), refused, strict=True)}
    values = {"cross_entropy": _spread(losses[0], 12), "cross_entropy_answers": _spread(losses[1])}
    weights = {"cross_entropy": (256.0,) * 12, "cross_entropy_answers": (16.0,) * 64}
    if distances:
        verdicts["top1_agreement"] = _flags(int(distances[0]))
        values |= {"kl_first_token": _spread(distances[1]), "kl_answers": _spread(distances[2])}
        values["top1_agreement_answers"] = _spread(distances[3])
    empty = Evaluation(64, 64, 32, prompts_look_alike=64, kl_tokens=16)
    return empty.having(Samples(verdicts, values, weights))


def build_evaluation() -> dict[str, Any]:
    base = _evaluation((63, 62, 2, 1, 11, 8, 1), (3.0417, 0.7912), ())
    edited = _evaluation((1, 0, 0, 0, 0, 0, 2), (3.0533, 0.8144), (61, 0.041273, 0.023456, 0.921))
    record: dict[str, Any] = json.loads(json.dumps(evaluation_record(base, edited)))
    return record


def _older_evaluation() -> dict[str, Any]:
    found = build_evaluation()
    keys = manifest_schema()["$defs"]["evaluation"]["required"]
    return {which: {key: found[which][key] for key in keys} for which in ("base", "edited")}


def _certificate() -> dict[str, Any]:
    return {
        "holds": True,
        "exact": True,
        "claim": "the stored weights leave no component along the direction in the residual stream, at any layer",
        "writers": {
            "checked": 61,
            "failed": [],
            "worst": {"tensor": "model.layers.29.mlp.down_proj.weight", "residual_after": 6.9e-6, "tolerance": 1.25e-4},
        },
        "stream": {
            "before": 0.2417,
            "after": 3.1e-5,
            "tolerance": 8.33e-4,
            "text": "chat",
            "tokens": 1873,
            "layers": [1e-5 + 7e-7 * layer for layer in range(LAYERS + 1)],
            "holds": True,
            "first_failure": None,
        },
    }


def build_manifest() -> dict[str, Any]:
    return {
        "schema": "abliteration/1",
        "tool": {
            "abliterate": "0.1.0",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "safetensors": "0.8.0",
            "python": "3.11.9",
        },
        "base": {
            "id": "example-org/Pico-Chat-135M",
            "source": "hub",
            "revision": "main",
            "commit": "0f" * 20,
            "model_type": "llama",
            "dtype": ["BF16"],
            "shards": [{"name": "model.safetensors", "sha256": _sha("in"), "bytes": 269060552}],
        },
        "recipe": Recipe().replacing("edit", head="tied").as_dict(),
        "calibration": build_calibration(),
        "selection": build_selection(),
        "search": None,
        "direction": {
            "file": "refusal_direction.safetensors",
            "sha256": _sha("r"),
            "source": "calibrated",
            "hidden_size": 576,
        },
        "edit": {
            "family": "llama",
            "head": "tied",
            "strength": 1.0,
            "writers": _writers(),
            "added": [],
            "config_changes": {},
        },
        "certificate": _certificate(),
        "evaluation": build_evaluation(),
        "output": {
            "hashed": True,
            "shards": [{"name": "model.safetensors", "sha256": _sha("out"), "bytes": 269060552}],
            "files": ["README.base.md", "config.json", "generation_config.json", "tokenizer.json"],
        },
        "warnings": [],
        "reproduce": "abliterate convert example-org/Pico-Chat-135M@0f0f0f0f Pico-Chat-135M-abliterated --seed 0",
    }


def _gemma() -> dict[str, Any]:
    """Direction from a file, output norms, untied head, no evaluation, partial strength."""
    manifest = build_manifest()
    manifest.update(calibration=None, selection=None, evaluation=None)
    manifest["base"].update(id="pico-gemma", source="local", revision=None, commit=None, model_type="gemma3_text")
    manifest["direction"]["source"] = "file"
    manifest["edit"].update(
        family="gemma3", head="untied", added=["lm_head.weight"], config_changes={"tie_word_embeddings": False}
    )
    for writer in manifest["edit"]["writers"][1:]:
        norm = "post_attention_layernorm" if writer["kind"] == "attention" else "post_feedforward_layernorm"
        layer = writer["tensor"].rsplit(".", 3)[0]
        writer.update(form="oblique", gain=f"{layer}.{norm}.weight")
    manifest["certificate"]["stream"]["text"] = "plain"
    return manifest


@pytest.fixture
def manifest() -> dict[str, Any]:
    """Calibrated, tied, everything measured and well."""
    return build_manifest()


@pytest.fixture
def older_manifest() -> dict[str, Any]:
    """As it was before there were intervals."""
    return {**build_manifest(), "evaluation": _older_evaluation()}


@pytest.fixture
def gemma_manifest() -> dict[str, Any]:
    return _gemma()


@pytest.fixture
def change(manifest: dict[str, Any]) -> Callable[[str, Any], dict[str, Any]]:
    """`change("edit.strength", 0.5)`: a copy of the manifest with one dotted key set."""

    def changed(path: str, value: Any) -> dict[str, Any]:
        copied = copy.deepcopy(manifest)
        *parents, last = path.split(".")
        inner = copied
        for key in parents:
            inner = inner[key]
        inner[last] = value
        return copied

    return changed
