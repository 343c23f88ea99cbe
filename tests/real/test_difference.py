"""`diff` and `inspect` on the real subject and what was made of it, by this program and by others."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests import pico
from tests.real.support import run

HIDDEN, LAYERS = 576, 30
MODULES = ("self_attn.o_proj", "mlp.down_proj")


def diffed(base: Path, edited: Path, *options: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("diff", str(base), str(edited), "--json", *options).stdout)
    return found


@pytest.fixture(scope="module")
def projected(subject: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Converted with a direction that is known, so that nothing has to be found."""
    room = tmp_path_factory.mktemp("projected")
    file = pico.direction_file(room / "r.safetensors", HIDDEN, 1)
    run("convert", str(subject), str(room / "out"), "--direction", str(file), "--no-evaluate", "-q")
    return room / "out"


def heretic_lora(base: Path, out: Path) -> Path:
    """What Heretic merges: rank 1 in every o_proj and down_proj of some layers, -w r in B and r.W in A."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    layers = list(range(12, LAYERS))
    config = LoraConfig(r=1, lora_alpha=1, target_modules=["o_proj", "down_proj"], layers_to_transform=layers)
    carrier = get_peft_model(model, config)
    r = pico.unit(HIDDEN, 1)
    for name, module in carrier.named_modules():
        if hasattr(module, "lora_A"):
            weight = 0.3 + 0.04 * int(name.split(".layers.")[1].split(".")[0])
            module.lora_A["default"].weight.data = (r @ module.base_layer.weight.float())[None].bfloat16()
            module.lora_B["default"].weight.data = (-weight * r)[:, None].bfloat16()
    carrier.merge_and_unload().save_pretrained(out)
    return out


def test_what_this_program_made_is_a_projection(subject: Path, projected: Path) -> None:
    found = diffed(subject, projected)
    assert found["verdict"]["kind"] == "projection" and "rank-1" in found["verdict"]["title"]
    assert found["file"]["shared"] > 0.9999 and found["file"]["least"] > 0.999
    assert found["shared"]["dimensions"] == 1 and found["tensors"]["head"] == "untied"
    changed = found["tensors"]["changed"]
    assert len(changed) == 2 * LAYERS + 1 and {tensor["rank"] for tensor in changed} == {1}
    assert all(tensor["fit"]["strength"] == pytest.approx(1, abs=0.01) for tensor in changed)
    assert max(writer["after"] for writer in found["file"]["removed"]) < 1e-4
    assert min(writer["before"] for writer in found["file"]["removed"]) > 1e-2


def test_a_merged_lora_as_heretic_makes_it(subject: Path, tmp_path: Path) -> None:
    found = diffed(subject, heretic_lora(subject, tmp_path / "out"))
    verdict = found["verdict"]
    assert verdict["kind"] == "layered-projection" and "merged LoRA" in verdict["title"]
    assert "strengths 0.78 to 1.46" in verdict["title"]
    assert "o_proj (layers 12–29)" in " ".join(verdict["evidence"])
    assert len(found["tensors"]["changed"]) == 2 * (LAYERS - 12)
    assert abs(float(torch.tensor(found["shared"]["direction"]) @ pico.unit(HIDDEN, 1))) > 0.9999


def test_the_subject_is_a_fine_tune_by_lora_of_the_original(original: Path, subject: Path) -> None:
    found = diffed(original, subject)
    verdict = found["verdict"]
    assert verdict["kind"] == "lora" and "rank 1 to 4" in verdict["title"]
    ranks = {tensor["name"]: tensor["rank"] for tensor in found["tensors"]["changed"]}
    assert len(ranks) == 4 * 12 and {int(name.split(".")[2]) for name in ranks} == set(range(8, 20))
    for name, rank in ranks.items():
        # of the four directions in q_proj and v_proj one may be as small as rounding
        assert rank in ((3, 4) if name.endswith(("q_proj.weight", "v_proj.weight")) else (1,)), name
    assert found["shared"]["dimensions"] == 1
    assert all(abs(tensor["fit"]["cosine"]) < 0.5 for tensor in found["tensors"]["changed"])


def test_the_same_in_other_shards_is_identical(subject: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(subject, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "out", max_shard_size="60MB")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 3
    assert diffed(subject, tmp_path / "out")["verdict"]["kind"] == "identical"


def test_inspect_bears_the_claims_out_or_not(subject: Path, projected: Path, tmp_path: Path) -> None:
    found = json.loads(run("inspect", str(projected), "--base", str(subject), "--json").stdout)
    assert found["holds"] is True and {check["holds"] for check in found["checks"]} == {True}
    forged = shutil.copytree(projected, tmp_path / "forged")
    with (forged / "model.safetensors").open("r+b") as file:
        file.seek(-(1 << 20), 2)
        file.write(bytes(1 << 16))
    done = run("inspect", str(forged), check=False)
    assert done.returncode == 1 and "does not bear out" in done.stderr
