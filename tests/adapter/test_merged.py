"""What is said of a merged adapter is what PEFT merges, to the bit; and what a dry run says is what is made."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from abliterate import measuring
from abliterate.adapter import merging
from abliterate.adapter.making import make_adapter
from abliterate.adapting import adapt, check_adaptable
from abliterate.calibration.model import LanguageModel
from abliterate.calibration.runner import Streamed
from abliterate.certify.weights import shares_along
from abliterate.conversion import prepare
from abliterate.direction.files import load_cut
from abliterate.edit.edits import projectors_of
from abliterate.recipe import load_recipe
from abliterate.subject import RunOptions, load_model, open_subject
from tests import pico
from tests.commandline import names, run_here

QUICK = """
name: quick
calibration: {train: 8, validation: 2, test: 2}
direction: {filter: false, refusal_tokens: [I, S], positions: 1}
selection: {max_kl: 1000000.0, min_induce: -1000000.0}
evaluation: {max_new_tokens: 2, kl_tokens: 2}
"""


def merged_by_peft(base: Path, adapter: Path, dtype: torch.dtype | str = "auto") -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload()


def loaded_parameters(model: LanguageModel) -> Iterator[tuple[str, torch.Tensor]]:
    """All parameters, of layers that are streamed while each is there."""
    runner = model.runner
    for number in range(len(runner.store.layers) if isinstance(runner, Streamed) else 1):
        if isinstance(runner, Streamed):
            runner.store.load(number)
        yield from ((name, each) for name, each in model.model.named_parameters() if not each.is_meta)
        if isinstance(runner, Streamed):
            runner.store.release(number)


@pytest.mark.parametrize(
    ("family", "stored"),
    [
        *((family, torch.bfloat16) for family in ("llama", "gemma3_text", "gpt2", "mixtral")),
        ("llama", torch.float16),
        ("deepseek_v3", torch.float32),  # so narrow, it does not run in bf16
    ],
)
def test_weights_are_those_that_peft_merges(family: str, stored: torch.dtype, tmp_path: Path) -> None:
    """In memory and streamed, computing in what is stored and in fp32."""
    base = pico.save(tmp_path / "base", family, dtype=stored)
    direction = pico.direction_file(tmp_path / "r.safetensors")
    made = adapt(str(base), tmp_path / "adapter", direction=direction)
    subject = open_subject(str(base))
    job = prepare(subject, direction=direction, evaluate=False)
    blueprint, _ = check_adaptable(job)
    cut = load_cut(direction, subject.plan.hidden_size, subject.plan.num_layers)
    again = make_adapter(subject.checkpoint, subject.plan, blueprint, cut, ("base", None), job.options.progress)
    files = [(tmp_path / "adapter" / f"adapter_{name}").read_bytes() for name in ("config.json", "model.safetensors")]
    changes = merging.read_merge(files[0], files[1], again.targets, subject.checkpoint, blueprint).parameters
    wanted = dict(merged_by_peft(base, tmp_path / "adapter").named_parameters())
    for memory in ("resident", "streamed"):
        for dtype in {"float32", str(stored).removeprefix("torch.")}:
            seen = set()
            for name, parameter in loaded_parameters(
                load_model(subject, RunOptions(memory=memory), dtype=dtype, changes=changes)
            ):
                assert torch.equal(parameter.to(stored), wanted[name]), (name, memory, dtype)
                seen.add(name)
            assert seen == wanted.keys()
    kinds = {each["kind"] for each in made.manifest["edit"]["tensors"]}
    assert ("experts" in kinds) == (family in ("mixtral", "deepseek_v3"))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_what_is_said_is_measured_on_what_peft_makes(family: str, tmp_path: Path) -> None:
    """Shares, the stream and the evaluation, against the merged model as PEFT saves it."""
    base = pico.save(tmp_path / "base", family, dtype=torch.bfloat16, tied=False, tokenizer=True)
    (tmp_path / "quick.yaml").write_text(QUICK)
    recipe, direction = load_recipe(str(tmp_path / "quick.yaml")), pico.direction_file(tmp_path / "r.safetensors")
    made = adapt(str(base), tmp_path / "adapter", recipe=recipe, direction=direction).manifest
    merged_by_peft(base, tmp_path / "adapter").save_pretrained(tmp_path / "merged")
    pico.make_tokenizer().save_pretrained(tmp_path / "merged")
    subject = open_subject(str(tmp_path / "merged"))
    cut = load_cut(direction, subject.plan.hidden_size, subject.plan.num_layers)
    projectors = projectors_of(subject.checkpoint, subject.plan, cut)
    writers = {writer.tensor: writer for writer in subject.plan.writers}
    for each in made["edit"]["tensors"]:
        writer = writers[each["tensor"]]
        share = shares_along(subject.checkpoint, writer, [projectors[0].of(writer).v])[0][0]
        assert each["merged"]["after"] == pytest.approx(share, rel=1e-6), writer.tensor
        assert each["before"] is None or 30 * share < each["before"]
    stream = made["certificate"]["stream"]
    assert made["certificate"]["holds"] and stream["after"] < stream["tolerance"] < stream["before"]
    found = measuring.evaluate(str(tmp_path / "merged"), baseline=str(base), recipe=recipe)
    for name in ("cross_entropy", "kl_first_token", "refusal_rate_substring", "top1_agreement", "kl_answers"):
        assert made["evaluation"]["edited"][name] == getattr(found.evaluation, name), name
    assert found.baseline is not None and made["evaluation"]["base"]["cross_entropy"] == found.baseline.cross_entropy
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert (
        "it is within the tolerance that conversions are held to" in card and "merged into it as PEFT merges it" in card
    )
    assert f"{made['evaluation']['edited']['cross_entropy']:.3f}" in card


def test_an_adapter_that_lacks_a_part_says_what_is_left(tmp_path: Path) -> None:
    pico.save(tmp_path / "base", "opt")
    direction = pico.direction_file(tmp_path / "r.safetensors")
    made = adapt(
        str(tmp_path / "base"), tmp_path / "adapter", direction=direction, options=RunOptions(inexact=True)
    ).manifest
    assert not made["certificate"]["holds"] and made["certificate"]["stream"]["after"] > 0.01
    assert any(warning.startswith("merged, it is not within the tolerance") for warning in made["warnings"])
    assert "**not** within the tolerance" in (tmp_path / "adapter" / "README.md").read_text()


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_a_dry_run_says_what_is_made(family: str, tmp_path: Path) -> None:
    pico.save(tmp_path / "base", family)
    direction = pico.direction_file(tmp_path / "r.safetensors")
    words = ("convert", tmp_path / "base", tmp_path / "out", "--adapter", "peft", "--direction", direction)
    would = run_here(*words, "--dry-run", "--json")
    assert would.code == 0 and names(tmp_path) == ["base", "r.safetensors"]
    table = run_here(*words, "--dry-run")
    assert table.code == 0 and "LoRA of rank 1" in table.out and table.out.rstrip().endswith("nothing was written")
    made = json.loads(run_here(*words, "--json").out)["edit"]
    found = json.loads(would.out)
    assert [(p["tensor"], p["module"], p["kind"]) for p in found["parts"]] == [
        (t["tensor"], t["module"], t["kind"]) for t in made["tensors"]
    ]
    assert (found["rank"], found["left_out"]) == (made["rank"], made["left_out"])
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert sum(part["bytes"] for part in found["parts"]) == sum(tensor.nbytes for tensor in stored.values())


def test_a_dry_run_refuses_what_making_would(tmp_path: Path) -> None:
    pico.save(tmp_path / "base", "opt")
    direction = pico.direction_file(tmp_path / "r.safetensors")
    words = ("convert", tmp_path / "base", tmp_path / "out", "--adapter", "peft", "--direction", direction, "--dry-run")
    ran = run_here(*words)
    assert ran.code == 1 and "embed_positions" in ran.err
    without = run_here(*words, "--inexact")
    assert without.code == 0 and "not in the adapter" in without.out
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").touch()
    assert run_here(*words, "--inexact").code == 1


def test_without_evaluation(tmp_path: Path) -> None:
    pico.save(tmp_path / "base", "llama", tokenizer=True)
    direction = pico.direction_file(tmp_path / "r.safetensors")
    words = ("convert", tmp_path / "base", tmp_path / "out", "--adapter", "peft", "--direction", direction)
    made = json.loads(run_here(*words, "--no-evaluate", "--json").out)
    assert made["evaluation"] is None and made["certificate"]["holds"]
    assert "**Not measured.**" in (tmp_path / "out" / "README.md").read_text()
