"""The output head: found under any of its names, tied or not, and what it takes to untie it."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from abliterate import Conversion, convert, load_recipe
from abliterate.architecture.writer import Plan, Runtime, Writer
from tests import pico
from tests.architecture.planned import Checkpoints, H, names, planned, refused, role, save_llava, stored

V = pico.VOCABULARY


@pytest.mark.parametrize(
    ("family", "head"), [("qwen3", "lm_head"), ("opt", "lm_head"), ("gpt_neox", "embed_out"), ("mixtral", "lm_head")]
)
def test_a_stored_copy_of_a_tied_head(checkpoint: Checkpoints, family: str, head: str) -> None:
    plan = planned(checkpoint(family, {"tied": True}, add={f"{head}.weight": torch.zeros(V, H)}))
    assert plan.tied and plan.head_copy and plan.head == f"{head}.weight" and plan.untying == ()
    (found,) = [tensor for tensor in plan.roles if tensor.role == "head"]
    assert found.name == plan.head and "copy of the tied embedding" in found.reason
    assert [each.tensor for each in plan.edited] == [*(each.tensor for each in plan.writers), plan.head]
    assert plan.edited[-1] == Writer(plan.head, "head copy", 1, None) and plan.head not in names(plan, "writer")


def test_a_copy_of_a_tied_head_goes_with_the_embedding_through_the_same_norms(checkpoint: Checkpoints) -> None:
    plan = planned(checkpoint("bloom", add={"lm_head.weight": torch.zeros(V, H)}))
    assert plan.head_copy and plan.edited[-1].gain == plan.writers[0].gain != ()


@pytest.mark.parametrize(
    ("family", "head"), [("llama", "lm_head.weight"), ("gpt_neox", "embed_out.weight"), ("gpt2", "lm_head.weight")]
)
def test_a_head_of_its_own_and_one_that_is_not_stored(checkpoint: Checkpoints, family: str, head: str) -> None:
    own = planned(checkpoint(family, {"tied": False}))
    assert own.head == head and not own.tied and not own.shares_edit and own.untying == () and own.edited == own.writers
    assert "reads the stream" in role(own, head).reason
    tied = planned(checkpoint(family, {"tied": True}))
    assert tied.head == head and tied.tied and tied.shares_edit
    assert tied.untying == ((tied.embedding, head),)


@pytest.mark.parametrize(
    ("prefix", "head"),
    [("language_model.model.", "language_model.lm_head.weight"), ("model.language_model.", "lm_head.weight")],
)
def test_a_head_that_is_not_stored_is_named_as_the_rest(tmp_path: Path, prefix: str, head: str) -> None:
    """Older files have the text tower's name before its head's, newer ones do not."""
    folder = save_llava(tmp_path, tied=True)
    plan = planned(pico.rewrite(folder, rename=lambda name: name.replace("language_model.model.", prefix)))
    assert plan.tied and plan.head == head and plan.untying == ((f"{prefix}embed_tokens.weight", head),)


def test_gpt_neox_has_two_names_for_its_head(checkpoint: Checkpoints) -> None:
    newer = checkpoint("gpt_neox", rename=lambda name: name.replace("embed_out", "lm_head"))
    assert planned(newer).head == "lm_head.weight"
    second = {"lm_head.weight": torch.zeros(V, H)}
    refused(checkpoint("gpt_neox", add=second), "two heads, embed_out.weight and lm_head.weight", "remove one")


def test_a_head_that_is_missing_or_of_another_shape(checkpoint: Checkpoints) -> None:
    refused(checkpoint("llama", drop=["lm_head.weight"]), "lm_head.weight is missing", "llama")
    narrow = {"lm_head.weight": torch.zeros(V - 1, H)}
    refused(checkpoint("llama", add=narrow), "lm_head.weight", "[130, 48]", "[131, 48]")
    refused(checkpoint("llama", {"tied": True}, add=narrow), "lm_head.weight", "[130, 48]", "[131, 48]")
    refused(checkpoint("llama", add={"model.lm_head.weight": torch.zeros(V, H)}), "two heads", "model.lm_head.weight")


def test_a_head_with_a_bias(checkpoint: Checkpoints) -> None:
    """It is as long as the vocabulary, and no writer even where that is as wide as the stream."""
    plan = planned(checkpoint("bert", {"tied": False, "vocab_size": H}))
    assert names(plan, "head") == {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    assert role(plan, "cls.predictions.decoder.bias").reason == "bias of the output head"


def test_bert_s_head_shares_its_bias_as_well(checkpoint: Checkpoints) -> None:
    plan = planned(checkpoint("bert"))
    assert plan.head == "cls.predictions.decoder.weight" and plan.untying == (
        ("cls.predictions.bias", "cls.predictions.decoder.bias"),
        ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
    )


def test_zamba_cannot_be_untied(checkpoint: Checkpoints) -> None:
    """Its layers share weights by the same switch, and would be without."""
    plan = planned(checkpoint("zamba", {"tied": True}))
    assert plan.tied and plan.shares_edit and plan.untying is None
    assert planned(checkpoint("zamba", {"tied": False})).untying == ()


def test_where_config_json_says_that_it_is_tied(checkpoint: Checkpoints, tmp_path: Path) -> None:
    assert planned(checkpoint("llama")).tied_flags == ("tie_word_embeddings",)
    folder = save_llava(tmp_path)
    assert planned(folder).tied_flags == ("tie_word_embeddings", "text_config.tie_word_embeddings")
    text = json.loads((folder / "config.json").read_text())["text_config"]
    silent = {key: value for key, value in text.items() if key != "tie_word_embeddings"}
    assert planned(pico.rewrite(folder, config={"text_config": silent})).tied_flags == ("tie_word_embeddings",)


def test_a_plan_without_an_embedding_that_writes() -> None:
    writers = (Writer("project_in", "embedding", 0, None), Writer("out", "attention", 0, 0))
    plan = Plan("p", "p", H, 1, True, "embed", "head", ("tied",), writers, (), Runtime("P", ("l.0",)), head_copy=True)
    assert plan.embedding_writer is None and not plan.shares_edit and plan.edited == writers


def converted(base: Path, head: str) -> Conversion:
    direction = pico.direction_file(base.parent / "r.safetensors")
    recipe = load_recipe("refusal").replacing("edit", head=head)
    return convert(str(base), base.parent / "out", recipe=recipe, direction=direction, evaluate=False)


@torch.no_grad()
def test_bert_untied_keeps_its_head_whole(checkpoint: Checkpoints) -> None:
    base = checkpoint("bert")
    result, before = converted(base, "untied"), stored(base)
    after = stored(result.folder)
    assert result.holds and set(after) - set(before) == {
        "cls.predictions.decoder.weight",
        "cls.predictions.decoder.bias",
    }
    assert torch.equal(after["cls.predictions.decoder.weight"], before["bert.embeddings.word_embeddings.weight"])
    assert torch.equal(after["cls.predictions.decoder.bias"], before["cls.predictions.bias"])
    model, report = AutoModelForCausalLM.from_pretrained(result.folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    head = model.get_output_embeddings()
    assert torch.equal(head.weight, before["bert.embeddings.word_embeddings.weight"])
    assert torch.equal(head.bias, before["cls.predictions.bias"])
    assert not torch.equal(model.get_input_embeddings().weight, head.weight)


def test_zamba_stays_tied_whatever_the_recipe_says(checkpoint: Checkpoints) -> None:
    base = checkpoint("zamba", {"tied": True})
    result = converted(base, "untied")
    assert result.holds and set(stored(result.folder)) == set(stored(base))
    assert any("the head stays tied" in warning for warning in result.manifest["warnings"])
    assert json.loads((result.folder / "config.json").read_text())["tie_word_embeddings"] is True
    assert result.manifest["edit"]["head"] == "tied"
