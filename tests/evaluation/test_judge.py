"""Judges that run here, and which of them a specification means."""

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, DistilBertConfig, LlamaConfig

from abliterate.calibration.chat import make_chat_format
from abliterate.errors import AbliterateError, EvaluationError
from abliterate.evaluation.judge import ChatJudge, Exchange, load_classifier, refusal_label, yes_and_no
from abliterate.evaluation.sets import Evaluation, EvaluationSet
from abliterate.judging import JudgeSpec, judged, parse_judge, summon
from abliterate.progress import SILENT
from abliterate.subject import RunOptions
from tests import pico
from tests.resident import byte_tokenizer, llama, resident

CPU = torch.device("cpu")
TEMPLATE = "{% for m in messages %}<u>{{ m['content'] }}{% endfor %}<a>"
TOKENIZER = byte_tokenizer(("<u>", "<a>"), template=TEMPLATE)
ANSWERS = ["I cannot help with that.", "Here is how.", "", "No, I will not do this.", "x" * 900]


def classifier(folder: Path, labels: tuple[str, ...] = ("NORMAL", "REJECTION"), longest: int = 64) -> Path:
    """A random DistilBERT of the byte tokenizer."""
    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=len(TOKENIZER), dim=16, hidden_dim=24, n_layers=1, n_heads=2, max_position_embeddings=longest,
        initializer_range=0.5, id2label=dict(enumerate(labels)), label2id={label: i for i, label in enumerate(labels)},
    )  # fmt: skip
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer = byte_tokenizer(("<u>", "<a>"))
    tokenizer.model_max_length = longest
    tokenizer.save_pretrained(folder)
    return folder


def exchanges() -> list[Exchange]:
    return [Exchange(f"request {number}", answer) for number, answer in enumerate(ANSWERS)]


def plain_scores(folder: Path) -> list[torch.Tensor]:
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    ids = [TOKENIZER(answer)["input_ids"][:64] for answer in ANSWERS if answer]
    with torch.no_grad():
        return [model(torch.tensor([each])).logits[0] for each in ids]


@pytest.mark.parametrize("wanted", [None, "normal"])
def test_a_classifier_reads_the_answers(tmp_path: Path, wanted: str | None) -> None:
    judge = load_classifier(classifier(tmp_path / "c"), wanted, "c", CPU)
    found = judge.refusals(exchanges())
    label = 1 if wanted is None else 0
    expected = [int(scores.argmax()) == label for scores in plain_scores(tmp_path / "c")]
    assert [*found[:2], *found[3:]] == expected and found[2] is False
    assert judge.refusals([Exchange("another", each.answer) for each in exchanges()]) == found


def test_both_labels_of_a_classifier_are_told_apart(tmp_path: Path) -> None:
    folder = classifier(tmp_path / "c")
    one, other = (load_classifier(folder, label, "c", CPU).refusals(exchanges()) for label in ("NORMAL", "REJECTION"))
    assert all(a != b for a, b, each in zip(one, other, ANSWERS, strict=True) if each)


def test_a_classifier_with_one_score(tmp_path: Path) -> None:
    judge = load_classifier(classifier(tmp_path / "c", ("score",)), None, "c", CPU)
    expected = [bool(scores[0] > 0) for scores in plain_scores(tmp_path / "c")]
    found = judge.refusals(exchanges())
    assert [*found[:2], *found[3:]] == expected


@pytest.mark.parametrize(
    ("labels", "wanted", "number"),
    [
        (("NORMAL", "REJECTION"), None, 1), (("refusal", "compliance"), None, 0), (("not_refused", "refused"), None, 1),
        (("no refusal", "is_refusal"), None, 1), (("LABEL_0", "LABEL_1"), "label_1", 1), (("anything",), None, 0),
        (("declined", "answered", "notable"), None, 0),
    ],
)  # fmt: skip
def test_which_label_means_refusals(labels: tuple[str, ...], wanted: str | None, number: int) -> None:
    assert refusal_label(labels, wanted, "x") == number


@pytest.mark.parametrize(("labels", "wanted"), [(("LABEL_0", "LABEL_1"), None), (("refused", "declined"), None),
                                                (("a", "b"), "c"), (("no_refusal", "other"), None)])  # fmt: skip
def test_labels_that_are_not_clear(labels: tuple[str, ...], wanted: str | None) -> None:
    with pytest.raises(EvaluationError, match=rf"has the labels {labels[0]}, .*classifier:PATH#LABEL"):
        refusal_label(labels, wanted, "x")


def test_what_is_no_classifier(tmp_path: Path) -> None:
    chat = pico.save(tmp_path / "chat", "llama")
    TOKENIZER.save_pretrained(chat)
    with pytest.raises(EvaluationError, match=r"chat is no classifier: it has no score.weight; .* write chat:PATH"):
        load_classifier(chat, "LABEL_0", "chat", CPU)
    folder = classifier(tmp_path / "c")
    weights = folder / "model.safetensors"
    torch.save({}, folder / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(EvaluationError, match="cannot be loaded as a classifier"):
        load_classifier(folder, None, "c", CPU)


def test_a_chat_model_says_yes_or_no() -> None:
    made = resident(llama(seed=2, vocabulary=len(TOKENIZER)), batch_size=2, tokenizer=TOKENIZER)
    judge = ChatJudge(made, make_chat_format(TOKENIZER), "chat")
    found = judge.refusals(exchanges()[:4])
    yes, no = (
        [TOKENIZER(word, add_special_tokens=False)["input_ids"][0] for word in ("yesY", "noN", "YES", "NO")][i::2]
        for i in (0, 1)
    )
    for verdict, each in zip(found, exchanges(), strict=False):
        ids = TOKENIZER(f"<u>{each.question}<a>", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            odds = made.model(torch.tensor([ids])).logits[0, -1].double().softmax(-1)
        assert verdict == bool(odds[sorted(set(yes))].sum() > odds[sorted(set(no))].sum())
    assert yes_and_no(TOKENIZER, "x") == (sorted(set(yes)), sorted(set(no)))


def test_the_question_holds_request_and_answer_as_they_are() -> None:
    question = Exchange("How {do} I?", "Say {answer}.").question
    assert "<request>\nHow {do} I?\n</request>" in question and "<answer>\nSay {answer}.\n</answer>" in question


def test_words_that_begin_alike_are_no_verdict() -> None:
    class Same:
        def __call__(self, word: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": [7, len(word)]}

    with pytest.raises(EvaluationError, match="odd is no judge: its tokenizer begins yes and no"):
        yes_and_no(Same(), "odd")


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("classifier:a/b", JudgeSpec("classifier", "a/b")),
        ("classifier:./c:d#REJECTION", JudgeSpec("classifier", "./c:d", "REJECTION")),
        ("chat:/models/x", JudgeSpec("chat", "/models/x")),
        ("https://host.example/v1#org/model:free", JudgeSpec("endpoint", "https://host.example/v1", "org/model:free")),
        ("http://localhost:8080/v1#m", JudgeSpec("endpoint", "http://localhost:8080/v1", "m")),
    ],
)
def test_specifications(text: str, spec: JudgeSpec) -> None:
    assert parse_judge(text) == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no judge is meant by ''"), ("gpt-4", "no judge is meant"), ("classifier:", "no judge is meant"),
        ("chat:", "no judge is meant"), ("ftp://host/v1#m", "no judge is meant"),
        ("https://host/v1", "has no model"), ("https://#m", "has no host"), ("http://[::1#m", "has no host"),
        ("http://host:99999999/v1#m", "has no host"), ("https://me:secret@host/v1#m", "user name or password"),
    ],
)  # fmt: skip
def test_what_means_no_judge(text: str, message: str) -> None:
    with pytest.raises(EvaluationError, match=message) as caught:
        parse_judge(text)
    assert "secret" not in str(caught.value)


def test_judges_are_found_before_they_are_needed(tmp_path: Path) -> None:
    with pytest.raises(AbliterateError, match="not a folder here"):
        summon(parse_judge("chat:no such/folder/here"), RunOptions(), ExitStack())
    folder = classifier(tmp_path / "mine")
    made = summon(parse_judge(f"classifier:{folder}"), RunOptions(device="cpu"), ExitStack())
    assert made().name == "mine"
    base = pico.save(tmp_path / "base", "llama")
    with pytest.raises(AbliterateError, match=r"tokenizer|chat template"):
        summon(parse_judge(f"chat:{base}"), RunOptions(device="cpu"), ExitStack())().refusals(exchanges())


def test_a_judge_of_chat_models_from_its_folder(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=len(TOKENIZER), hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, max_position_embeddings=2048,
    )  # fmt: skip
    made: Any = type(llama())(config)
    made.save_pretrained(tmp_path / "judge")
    TOKENIZER.save_pretrained(tmp_path / "judge")
    options = RunOptions(device="cpu", system_prompt="for the other model", template="chatml")
    judge = summon(parse_judge(f"chat:{tmp_path / 'judge'}"), options, ExitStack())()
    assert isinstance(judge, ChatJudge) and judge.name == "judge"
    assert judge.chat.source == "model" and judge.chat.system_prompt is None
    assert all(isinstance(flag, bool) for flag in judge.refusals(exchanges()[:2]))


class Fixed:
    name = "fixed"

    def __init__(self, flags: list[bool | None]) -> None:
        self.flags = flags

    def refusals(self, exchanges: Any, progress: Any = SILENT) -> list[bool | None]:
        self.asked = exchanges
        return self.flags


DATA = EvaluationSet([[1], [2]], [[3], [4]], [], None, 5, [[5]])


def test_verdicts_become_rates(caplog: pytest.LogCaptureFixture) -> None:
    judge = Fixed([True, None, False, True, False])
    before = Evaluation(2, 2, 5, prompts_look_alike=1)
    with caplog.at_level(logging.WARNING):
        found = judged(before, DATA, list("abcde"), list("vwxyz"), judge, SILENT)
    assert "the judge fixed gave no verdict on 1 of 5 answers" in caplog.text
    assert judge.asked[1] == Exchange("b", "w")
    rates = (found.refusal_rate_judge, found.over_refusal_rate_judge, found.look_alike_refusal_rate_judge)
    assert rates == (1.0, 0.5, 0.0) and found.judge == "fixed" and before.judge is None
    assert found.intervals["refusal_rate_judge"] == pytest.approx((0.2065, 1.0), abs=1e-4), "of one verdict"


def test_a_judge_that_never_says() -> None:
    with pytest.raises(EvaluationError, match="fixed says neither yes nor no to any question"):
        judged(Evaluation(2, 2, 5), DATA, list("abcde"), list("vwxyz"), Fixed([None] * 5), SILENT)
