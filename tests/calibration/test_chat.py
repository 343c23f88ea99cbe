"""Chat formats: what the model reads, token by token, and which of the tokens follow every instruction."""

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from abliterate.calibration.chat import ChatFormat, builtin_templates, make_chat_format
from abliterate.errors import CalibrationError
from tests.resident import byte_tokenizer

LLAMA3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
CHATML = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")
PLAIN = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}" + (
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
# What the families' own templates or code make of one message; docs of each name the format.
RENDERED = {
    "alpaca": (
        "<s>Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nName a river.\n\n### Response:\n"
    ),
    "chatml": "<|im_start|>user\nName a river.<|im_end|>\n<|im_start|>assistant\n",
    "gemma": "<s><start_of_turn>user\nName a river.<end_of_turn>\n<start_of_turn>model\n",
    "llama2": "<s>[INST] Name a river. [/INST]",
    "llama3": (
        "<s><|start_header_id|>user<|end_header_id|>\n\nName a river.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "mistral": "<s>[INST] Name a river. [/INST]",
    "phi3": "<|user|>\nName a river.<|end|>\n<|assistant|>\n",
    "vicuna": (
        "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: Name a river. ASSISTANT:"
    ),
    "zephyr": "<|user|>\nName a river.</s>\n<|assistant|>\n",
}
WITH_SYSTEM = {
    "alpaca": "<s>Be brief.\n\n### Instruction:\nName a river.\n\n### Response:\n",
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nName a river.<|im_end|>\n<|im_start|>assistant\n"
    ),
    "llama2": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nName a river. [/INST]",
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nName a river.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "mistral": "<s>[INST] Be brief.\n\nName a river. [/INST]",
    "phi3": "<|system|>\nBe brief.<|end|>\n<|user|>\nName a river.<|end|>\n<|assistant|>\n",
    "vicuna": "<s>Be brief. USER: Name a river. ASSISTANT:",
    "zephyr": "<|system|>\nBe brief.</s>\n<|user|>\nName a river.</s>\n<|assistant|>\n",
}
AFTER = {
    "alpaca": "\n\n### Response:\n",
    "chatml": "<|im_end|>\n<|im_start|>assistant\n",
    "gemma": "<end_of_turn>\n<start_of_turn>model\n",
    "llama2": " [/INST]",
    "llama3": "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": " [/INST]",
    "phi3": "<|end|>\n<|assistant|>\n",
    "vicuna": " ASSISTANT:",
    "zephyr": "</s>\n<|assistant|>\n",
}
ODD = ("Why?", "Why...", "Say )", 'Say "a"', "Say 。", "Say 🌱", "5 =", "Say </s", "x", "7", "a\n", "{{ m }}")


def special(name: str) -> list[str]:
    """The tokens of a built-in template that are whole in its family's tokenizers."""
    found = {
        "gemma": ["<start_of_turn>", "<end_of_turn>"],
        "chatml": ["<|im_start|>", "<|im_end|>"],
        "llama3": [*LLAMA3],
        "phi3": ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"],
    }
    return found.get(name, [])


def text_of(chat: ChatFormat, tokens: tuple[int, ...] | list[int]) -> str:
    return str(chat.tokenizer.decode(list(tokens), skip_special_tokens=False))


def refused(tokenizer: Any, *arguments: Any, **settings: Any) -> str:
    with pytest.raises(CalibrationError) as caught:
        make_chat_format(tokenizer, *arguments, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_builtin_template_has_its_rendering_here() -> None:
    assert list(builtin_templates()) == sorted(RENDERED) == sorted(AFTER)
    assert set(WITH_SYSTEM) == set(RENDERED) - {"gemma"}


@pytest.mark.parametrize("name", RENDERED)
def test_builtin_templates_render_as_their_families_do(name: str) -> None:
    chat = make_chat_format(byte_tokenizer(special(name)), name)
    assert (chat.source, chat.thinking, chat.closing) == (name, "none", "")
    assert chat.render("Name a river.") == RENDERED[name]
    assert text_of(chat, chat.encode("Name a river.")) == RENDERED[name]


@pytest.mark.parametrize("name", WITH_SYSTEM)
def test_builtin_templates_with_a_system_prompt(name: str) -> None:
    chat = make_chat_format(byte_tokenizer(special(name)), name, "Be brief.")
    assert chat.render("Name a river.") == WITH_SYSTEM[name]
    assert text_of(chat, chat.post_instruction) == AFTER[name]


@pytest.mark.parametrize("name", RENDERED)
@pytest.mark.parametrize("adds_bos", [True, False])
def test_one_bos_at_most_and_at_the_start(name: str, adds_bos: bool) -> None:
    tokenizer = byte_tokenizer(special(name), adds_bos=adds_bos)
    assert tokenizer("x")["input_ids"][:1] == [0] or not adds_bos
    tokens = make_chat_format(tokenizer, name).encode("Name a river.")
    assert tokens.count(0) == (1 if RENDERED[name].startswith("<s>") else 0)
    assert 0 not in tokens[1:]


def test_a_tokenizer_without_bos() -> None:
    tokenizer = byte_tokenizer(special("llama3"), bos_token=None)
    assert make_chat_format(tokenizer, "llama3").render("x").startswith("<|start_header_id|>user")


@pytest.mark.parametrize("name", AFTER)
def test_positions_after_the_instruction(name: str) -> None:
    chat = make_chat_format(byte_tokenizer(special(name)), name)
    assert text_of(chat, chat.post_instruction) == AFTER[name]
    for instruction in ODD:
        assert tuple(chat.encode(instruction)[-len(chat.post_instruction) :]) == chat.post_instruction


def test_llama3_and_gemma_have_the_papers_five_positions() -> None:
    # these words and line feeds are one token each in the families' vocabularies
    llama = make_chat_format(byte_tokenizer([*LLAMA3, "assistant", "\n\n"]), "llama3")
    gemma = make_chat_format(byte_tokenizer([*special("gemma"), "model", "\n"]), "gemma")
    assert [len(llama.post_instruction), len(gemma.post_instruction)] == [5, 5]


@pytest.mark.parametrize("character", ["?", ".", ")", '"', "=", "}", ">", "7", "!", ":"])
def test_a_tokenizer_that_merges_across_the_boundary(character: str) -> None:
    tokenizer = byte_tokenizer(merges=[(character, "Ċ")], template=PLAIN)
    assert tokenizer(f"a{character}\n", add_special_tokens=False)["input_ids"][-1] == len(tokenizer) - 1
    chat = make_chat_format(tokenizer)
    assert text_of(chat, chat.post_instruction) == "[assistant]\n"
    for instruction in ("Say x", f"Say {character}"):
        assert tuple(chat.encode(instruction)[-len(chat.post_instruction) :]) == chat.post_instruction


def test_nothing_after_the_instruction() -> None:
    bare = byte_tokenizer(template="{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert "(model) puts nothing after the instruction" in refused(bare)


def test_the_models_own_template_and_its_system_prompt() -> None:
    chat = make_chat_format(byte_tokenizer(template=PLAIN), system_prompt="Be brief.")
    assert (chat.source, chat.template, chat.system_prompt) == ("model", PLAIN, "Be brief.")
    assert chat.render("Hello") == "<s>[system] Be brief.\n[user] Hello\n[assistant]\n"


def test_an_empty_system_prompt_is_not_none() -> None:
    chat = make_chat_format(byte_tokenizer(template=PLAIN), system_prompt="")
    assert chat.render("Hello").startswith("<s>[system] \n")


def test_a_named_template_goes_before_the_models_own() -> None:
    chat = make_chat_format(byte_tokenizer(template=PLAIN), "llama2")
    assert chat.render("Hello") == "<s>[INST] Hello [/INST]"


def test_several_templates_in_one_tokenizer() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"tool_use": "{{ 'tools' }}", "default": PLAIN}
    assert make_chat_format(tokenizer).template == PLAIN
    tokenizer.chat_template = {"rag": PLAIN}
    assert make_chat_format(tokenizer).template == PLAIN


@pytest.mark.parametrize("template", [None, "", " \n", {}])
def test_no_template_says_what_to_do(template: Any) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    said = refused(tokenizer)
    assert "--template NAME|FILE" in said and "--direction FILE" in said
    assert all(name in said for name in builtin_templates())


def test_a_template_without_a_system_role() -> None:
    said = refused(byte_tokenizer(), "gemma", "Be brief.")
    assert "the chat template (gemma) cannot be rendered: the gemma template has no system role" in said
    assert said.endswith("leave --system-prompt out")


@pytest.mark.parametrize("template", ["{{ raise_exception('first\nsecond') }}", "{% for %}", "{{ messages[9].x.y }}"])
def test_a_template_that_cannot_be_rendered(template: str) -> None:
    said = refused(byte_tokenizer(template=template))
    assert said.startswith("the chat template (model) cannot be rendered: ") and "--system-prompt" not in said


def test_a_template_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_bytes(b"\xef\xbb\xbf" + PLAIN.encode())
    chat = make_chat_format(byte_tokenizer(), str(path))
    assert chat.source == "mine.jinja" and str(tmp_path) not in repr(chat)
    assert chat.render("Hello") == "<s>[user] Hello\n[assistant]\n"


def test_template_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_bytes(PLAIN.encode("utf-16"))
    assert "cannot be read as UTF-8 text" in refused(byte_tokenizer(), str(path))
    said = refused(byte_tokenizer(), "llama7")
    assert "no chat template llama7: neither a file nor one of alpaca, chatml" in said
    assert "neither a file" in refused(byte_tokenizer(), str(tmp_path))


CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
)
QWEN3 = (
    CHAT + "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
ALWAYS = CHAT + "{{ '<think>' }}{% endif %}"
ALWAYS_WITH_LINE = CHAT + "{{ '<think>\n' }}{% endif %}"
QWEN35 = (
    CHAT + "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}"
    "{% else %}{{ '<think>\n' }}{% endif %}{% endif %}"
)
START, EMPTY = "<|im_end|>\n<|im_start|>assistant\n", "<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    ("template", "asked", "mode", "after"),
    [
        (QWEN3, "auto", "off", START + EMPTY),
        (QWEN3, "off", "off", START + EMPTY),
        (QWEN3, "on", "on", START),
        (ALWAYS, "auto", "off", START + EMPTY),
        (ALWAYS, "off", "off", START + EMPTY),
        (ALWAYS, "on", "on", f"{START}<think>"),
        (ALWAYS_WITH_LINE, "auto", "off", START + EMPTY),
        (ALWAYS_WITH_LINE, "off", "off", START + EMPTY),
        (ALWAYS_WITH_LINE, "on", "on", f"{START}<think>\n"),
        (QWEN35, "auto", "off", START + EMPTY),
        (QWEN35, "on", "on", f"{START}<think>\n"),
        (CHAT + "{% endif %}", "auto", "none", START),
        (CHAT + "{% endif %}", "on", "none", START),
    ],
)
def test_thinking(template: str, asked: Any, mode: str, after: str) -> None:
    tokenizer = byte_tokenizer(CHATML, template=template)
    chat = make_chat_format(tokenizer, thinking=asked)
    assert chat.thinking == mode
    assert chat.render("Hello") == f"<|im_start|>user\nHello{after}"
    assert text_of(chat, chat.post_instruction) == after
    assert tuple(chat.encode("Why?")[-len(chat.post_instruction) :]) == chat.post_instruction


def test_formats_compare_without_their_tokenizers() -> None:
    one, two = (make_chat_format(byte_tokenizer(template=PLAIN)) for _ in range(2))
    assert isinstance(one.tokenizer, PreTrainedTokenizerFast) and one == two
