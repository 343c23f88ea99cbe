"""Model types that the table does not know, that bring their own code, or on which no direction is exact."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import abliterate
from abliterate.architecture.reader import expand
from abliterate.architecture.table import read_table
from abliterate.checkpoint.files import open_checkpoint
from abliterate.errors import ArchitectureError, RefusedError
from abliterate.probing import probe_type
from abliterate.subject import RunOptions
from tests import pico
from tests.commandline import run_here
from tests.sweep import twins

MODELING = """
import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class MineConfig(PreTrainedConfig):
    model_type = "mine"

    def __init__(self, vocab_size=200, hidden_size=96, num_hidden_layers=3, intermediate_size=160, **others):
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_hidden_layers, self.intermediate_size = num_hidden_layers, intermediate_size
        super().__init__(**others)


class MineLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden_size)
        self.mix = nn.Linear(config.hidden_size, config.intermediate_size)
        self.out = nn.Linear(config.intermediate_size, config.hidden_size)
        self.post = nn.RMSNorm(config.hidden_size)

    def forward(self, hidden_states):
        mixed = torch.tanh(self.mix(self.norm(hidden_states))).cumsum(1)
        return hidden_states + self.post(self.out(mixed))


class MineForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = MineConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([MineLayer(config) for _ in range(config.num_hidden_layers)])
        self.final = nn.RMSNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids=None, attention_mask=None, **others):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return CausalLMOutputWithPast(logits=self.lm_head(self.final(hidden)))
"""
SAVE = """
import sys
import torch
from modeling_mine import MineConfig, MineForCausalLM

MineConfig.register_for_auto_class()
MineForCausalLM.register_for_auto_class("AutoModelForCausalLM")
torch.manual_seed(0)
model = MineForCausalLM(MineConfig(tie_word_embeddings=False))
for name, parameter in model.named_parameters():
    parameter.data = 0.2 * torch.randn_like(parameter) + (parameter.dim() == 1 and "weight" in name)
model.save_pretrained(sys.argv[1])
"""


@pytest.fixture(scope="module")
def own_code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a type that transformers does not know, with its code in it."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "modeling_mine.py").write_text(MODELING)
    (folder / "save.py").write_text(SAVE)
    subprocess.run([sys.executable, "save.py", "model"], cwd=folder, check=True, capture_output=True)
    pico.direction_file(folder / "r.safetensors", 96)
    return folder


def test_own_code_runs_only_when_it_is_asked_for(own_code: Path) -> None:
    ran = run_here("plan", own_code / "model")
    assert ran.code == 1 and ran.err.count("\n") == 1 and "--trust-remote-code" in ran.err and not ran.out


def test_an_unknown_type_is_probed_and_certified(own_code: Path, tmp_path: Path) -> None:
    options = RunOptions(trust_remote_code=True)
    made = abliterate.convert(
        str(own_code / "model"),
        tmp_path / "out",
        direction=own_code / "r.safetensors",
        options=options,
        evaluate=False,
    )
    assert made.holds and made.certificate.exact
    assert made.manifest["edit"]["probed"] and any("not in the table" in said for said in made.manifest["warnings"])
    r = load_file(own_code / "r.safetensors")["direction"].double()
    stored = load_file(tmp_path / "out" / "model.safetensors")
    gain = stored["layers.1.post.weight"].double()
    assert float((stored["layers.1.out.weight"].double().T @ (gain * r)).abs().max()) < 1e-6
    assert float((stored["embed.weight"].double() @ r).abs().max()) < 1e-6


def test_the_entry_that_is_printed_can_be_put_into_the_table(own_code: Path) -> None:
    ran = run_here("plan", own_code / "model", "--trust-remote-code", "--entry")
    assert ran.code == 0
    (family,) = read_table(yaml.safe_load(ran.out), {}).families
    assert family.types == ("mine",) and family.embedding == ("embed",)
    rule = family.layer.find("out.weight")
    assert rule is not None and rule.role == "writer" and [step.module for step in rule.gain] == ["post"]
    assert expand("a.{b,c}") == ["a.b", "a.c"]


def test_what_gradients_do_not_see_is_refused(own_code: Path, tmp_path: Path) -> None:
    """A writer that hides from gradients shows in the twin that was converted."""
    folder = tmp_path / "hiding"
    shutil.copytree(own_code / "model", folder)
    hiding = MODELING.replace(
        "return hidden_states + self.post(self.out(mixed))",
        "hidden = torch.from_numpy(self.norm.weight.detach().float().numpy() * 0.5)\n"
        "        return hidden_states + self.post(self.out(mixed)) + hidden.to(hidden_states)",
    )
    assert hiding != MODELING
    (folder / "modeling_mine.py").write_text(hiding)
    with pytest.raises(ArchitectureError, match="not in the table"):
        probe_type(open_checkpoint(folder), trust_remote_code=True)
    ran = run_here("plan", folder, "--trust-remote-code")
    assert ran.code == 1 and "would stay along the direction" in ran.err and "--inexact" in ran.err
    assert run_here("plan", folder, "--trust-remote-code", "--inexact").code == 0


@pytest.fixture(scope="module")
def inexact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a type on which no direction is exact."""
    return twins.save_twin(twins.cases()["longcat_flash"], tmp_path_factory.mktemp("longcat") / "m")


def test_no_exact_direction_is_refused_with_what_would_stay(inexact: Path, tmp_path: Path) -> None:
    direction = pico.direction_file(tmp_path / "r.safetensors")
    ran = run_here("convert", inexact, tmp_path / "out", "--direction", direction, "--no-evaluate")
    assert ran.code == 1 and not (tmp_path / "out").exists()
    assert "identity experts" in ran.err and "would stay along the direction" in ran.err and "--inexact" in ran.err
    with pytest.raises(RefusedError):
        abliterate.plan(str(inexact))


def test_inexact_converts_and_says_so_first(inexact: Path, tmp_path: Path) -> None:
    direction = pico.direction_file(tmp_path / "r.safetensors")
    words = ("convert", inexact, tmp_path / "out", "--direction", direction, "--no-evaluate", "--inexact")
    assert run_here(*words).code == 0
    manifest = json.loads((tmp_path / "out" / "abliteration.json").read_text())
    assert "identity experts" in manifest["edit"]["inexact"] and not manifest["certificate"]["holds"]
    assert not manifest["certificate"]["exact"] and manifest["warnings"][0].startswith("not exact: ")
    card = (tmp_path / "out" / "README.md").read_text().partition("---\n")[2].partition("---\n")[2]
    said = [line for line in card.splitlines() if line.strip()]
    assert said[0].startswith("# ") and said[1].startswith(
        "> **The edit is not exact, and on this architecture cannot be"
    )
    before, after = manifest["certificate"]["stream"]["before"], manifest["certificate"]["stream"]["after"]
    assert after > 1e-3 and (before is None or after < before)
    assert run_here("verify", tmp_path / "out").code == 1


def test_inexact_changes_nothing_where_a_direction_is_exact(tmp_path: Path) -> None:
    folder = pico.save(tmp_path / "m", "llama")
    direction = pico.direction_file(tmp_path / "r.safetensors")
    made = abliterate.convert(
        str(folder), tmp_path / "out", direction=direction, options=RunOptions(inexact=True), evaluate=False
    )
    assert made.holds and made.certificate.exact and made.manifest["edit"]["inexact"] is None
    assert "--inexact" not in made.manifest["reproduce"]
    assert torch.isfinite(torch.tensor(made.certificate.stream.layers)).all()
