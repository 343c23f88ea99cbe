"""What the harness is told: likelihoods and completions the plain way; the harness itself where it is installed."""

import builtins
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from abliterate.errors import EvaluationError
from abliterate.evaluation import harness
from abliterate.evaluation.harness import Benchmark, Scorer, benchmarks_in, check_tasks, run_tasks
from tests.commandline import run_here
from tests.resident import byte_tokenizer, llama, random_prompts, resident

TOKENIZER = byte_tokenizer(adds_bos=True)
MODEL = resident(llama(seed=3, vocabulary=len(TOKENIZER)), batch_size=3, tokenizer=TOKENIZER)
SCORER = Scorer(MODEL)


def plain(context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
    """Token by token, in fp64."""
    total, greedy, text = 0.0, True, list(context)
    for token in continuation:
        with torch.no_grad():
            logits = MODEL.model(torch.tensor([text]), use_cache=False).logits[0, -1].double()
        total += float(logits.log_softmax(-1)[token])
        greedy &= int(logits.argmax()) == token
        text.append(token)
    return total, greedy


@pytest.mark.parametrize("together", [1, 4, 1024])
def test_likelihoods_in_the_order_of_the_requests(monkeypatch: pytest.MonkeyPatch, together: int) -> None:
    monkeypatch.setattr(harness, "TOGETHER", together)
    contexts = random_prompts(7, seed=1)
    continuations = [*random_prompts(5, seed=2, shortest=1, longest=6), [], MODEL.generate([contexts[6]], 3)[0]]
    found = SCORER.likelihoods(list(zip(contexts, continuations, strict=True)))
    for (value, greedy), context, continuation in zip(found, contexts, continuations, strict=True):
        expected = plain(context, continuation)
        assert (value, greedy) == (pytest.approx(expected[0], rel=1e-4, abs=1e-4), expected[1])
    assert found[5] == (0.0, True) and found[6][1] and not found[0][1]


def test_contexts_that_are_too_long_lose_their_start() -> None:
    short = resident(llama(seed=3, vocabulary=len(TOKENIZER)), tokenizer=TOKENIZER)
    short.model.config.max_position_embeddings = 12
    context, continuation = random_prompts(1, seed=5, shortest=30, longest=30)[0], [9, 8, 7]
    found = Scorer(short).likelihoods([(context, continuation)])
    assert found[0][0] == pytest.approx(plain(context[-9:], continuation)[0], rel=1e-4)


def test_every_token_of_a_text_is_predicted_once() -> None:
    short = dataclasses.replace(MODEL, model=llama(seed=3, vocabulary=len(TOKENIZER)))
    short.model.config.max_position_embeddings = 8
    scorer, text = Scorer(short), "The Mekong rises in Tibet."
    ids = scorer.encode(text)
    assert ids[0] == TOKENIZER.bos_token_id and scorer.encode("<s>a") == [ids[0], *scorer.encode("a", special=False)]
    total = 0.0
    for start in range(0, len(ids), 7):
        total += plain([ids[start - 1] if start else scorer.prefix], ids[start : start + 7])[0]
    assert scorer.rolling([text, ""])[0] == pytest.approx(total, rel=1e-4)


def test_completions_are_cut_at_the_first_stop() -> None:
    texts = ["Where?", "When is it?", "Who?"]
    whole = {text: TOKENIZER.decode(MODEL.generate([TOKENIZER(text)["input_ids"]], 9)[0]) for text in texts}
    stop = whole[texts[1]][3]
    asked = [(texts[0], {"max_gen_toks": 9}), (texts[1], {"max_gen_toks": 9, "until": ["\0\0", stop]}),
             (texts[2], {"until": "\0\0", "max_gen_toks": 4})]  # fmt: skip
    found = SCORER.complete(asked)
    assert found[0] == whole[texts[0]] and found[1] == whole[texts[1]].split(stop)[0] and stop not in found[1]
    assert whole[texts[2]].startswith(found[2]) and len(found[2]) < len(whole[texts[2]])


def test_scores_in_what_the_harness_returns() -> None:
    results = {
        "results": {
            "arc": {"alias": "arc", "sample_len": 5, "acc,none": 0.25, "acc_stderr,none": 0.05, "em,strict": 0.5,
                    "em_stderr,strict": "N/A"},
            "group": {"alias": "group", "acc,none": 0.5, "acc_stderr,none": float("nan")},
        },
        "n-samples": {"arc": {"original": 9, "effective": 5}},
    }  # fmt: skip
    assert list(benchmarks_in(results)) == [
        Benchmark("arc", "acc", 0.25, 0.05, 5),
        Benchmark("arc", "em (strict)", 0.5, None, 5),
        Benchmark("group", "acc", 0.5, None, None),
    ]


def test_without_the_harness_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.partition(".")[0] == "lm_eval":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(EvaluationError, match=r"pip install 'abliterate\[eval\]'"):
        run_tasks(MODEL, ["arc"])
    ran = run_here("evaluate", tmp_path, "--tasks", "arc_challenge, mmlu")
    assert ran.code == 1 and ran.err.strip().endswith("pip install 'abliterate[eval]'") and ran.err.count("\n") == 1


def task_folder(folder: Path) -> Path:
    """Two tasks with local data."""
    rows = [{"question": f"Is {i} odd?", "gold": i % 2, "said": "x"} for i in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"dataset_path: json\ndataset_kwargs:\n  data_files: {{test: {folder / 'rows.jsonl'}}}\ntest_split: test\n"
    (folder / "odd.yaml").write_text(
        f"task: pico_odd\n{data}output_type: multiple_choice\ndoc_to_text: '{{{{question}}}}'\n"
        "doc_to_choice: ['no', 'yes']\ndoc_to_target: gold\nmetric_list: [{metric: acc}]\n"
    )
    (folder / "say.yaml").write_text(
        f"task: pico_say\n{data}output_type: generate_until\ndoc_to_text: '{{{{question}}}}'\ndoc_to_target: said\n"
        "generation_kwargs: {until: ['\\n'], max_gen_toks: 4}\nmetric_list: [{metric: exact_match}]\n"
    )
    return folder


def test_the_harness_runs_offline_tasks_and_scores_as_its_own_model_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder, names = task_folder(tmp_path), ["pico_odd", "pico_say"]
    check_tasks(names, folder)
    with pytest.raises(EvaluationError, match="no task is called pico_even"):
        check_tasks(["pico_odd", "pico_even"], folder)
    found = run_tasks(MODEL, names, folder)
    assert {(each.task, each.metric, each.samples) for each in found} == {
        ("pico_odd", "acc", 6), ("pico_say", "exact_match", 6),
    }  # fmt: skip
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    own = huggingface.HFLM(pretrained=MODEL.model, tokenizer=TOKENIZER, batch_size=1)
    manager = lm_eval.tasks.TaskManager(include_path=str(folder))
    theirs = lm_eval.simple_evaluate(own, tasks=names, task_manager=manager, bootstrap_iters=10)
    assert theirs is not None
    assert {(each.task, each.metric): each.value for each in benchmarks_in(theirs)} == {
        (each.task, each.metric): each.value for each in found
    }
    pairs = [("Is 3 odd?", " yes, it is"), ("Where", " no")]
    instances = [lm_eval.api.instance.Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    ours = harness._as_harness_model(SCORER).loglikelihood(instances)
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in own.loglikelihood(instances)], rel=1e-4)
