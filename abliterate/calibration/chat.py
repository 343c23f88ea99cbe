"""The chat format: an instruction as the model itself expects it, and the positions after the instruction."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from abliterate.errors import CalibrationError

log = logging.getLogger(__name__)
Thinking = Literal["none", "off", "on"]
CLOSED_THINKING = "\n\n</think>\n\n"
SENTINELS = ("Name a river in Asia", "What is 7 times 8?", "Tell me: why is the sky blue...", "x")


@dataclass(frozen=True)
class ChatFormat:
    """How instructions become tokens.

    Attributes:
        template: Jinja text. `source`: "model", a built-in name, or a file's name.
        thinking: "none" for models that do not think; else the mode in which generation starts.
        post_instruction: ids of the tokens after the instruction; position -1 is the last of them.
        closing: text after the generation prompt that closes a think block which the template opens.
    """

    template: str
    source: str
    system_prompt: str | None
    thinking: Thinking
    post_instruction: tuple[int, ...]
    closing: str = ""
    tokenizer: Any = field(default=None, repr=False, compare=False)

    def render(self, instruction: str) -> str:
        """The text that the model reads, generation prompt included.

        Raises:
            CalibrationError: the template cannot be rendered.
        """
        messages = [{"role": "user", "content": instruction}]
        if self.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        settings = {} if self.thinking == "none" else {"enable_thinking": self.thinking == "on"}
        try:
            text = self.tokenizer.apply_chat_template(
                messages, chat_template=self.template, tokenize=False, add_generation_prompt=True, **settings
            )
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            hint = "; leave --system-prompt out" if self.system_prompt is not None else ""
            raise CalibrationError(f"the chat template ({self.source}) cannot be rendered: {reason}{hint}") from error
        return f"{text}{self.closing}"

    def encode(self, instruction: str) -> list[int]:
        """Token ids. The template writes its own special tokens, so the tokenizer adds none: never a second BOS."""
        return list(self.tokenizer(self.render(instruction), add_special_tokens=False)["input_ids"])


def make_chat_format(
    tokenizer: Any,
    template: str | None = None,
    system_prompt: str | None = None,
    thinking: Literal["auto", "off", "on"] = "auto",
) -> ChatFormat:
    """The model's own chat format, or the one asked for.

    Args:
        template: built-in name or Jinja file; None takes the tokenizer's.
        thinking: "auto" is off for models that can leave thinking out.

    Raises:
        CalibrationError: there is no template, or it cannot be used.
    """
    text, source = _template(tokenizer, template)
    mode = _thinking(text, thinking)
    draft = ChatFormat(text, source, system_prompt, mode, (), "", tokenizer)
    closing = CLOSED_THINKING if _opens_thinking(draft.render("x")) and thinking != "on" else ""
    if closing:
        draft = ChatFormat(text, source, system_prompt, "off", (), closing, tokenizer)
    elif _opens_thinking(draft.render("x")):
        draft = ChatFormat(text, source, system_prompt, "on", (), "", tokenizer)
    after = _post_instruction(draft)
    return ChatFormat(text, source, system_prompt, draft.thinking, after, closing, tokenizer)


def builtin_templates() -> dict[str, str]:
    """The built-in chat templates by name."""
    folder = resources.files("abliterate.calibration") / "templates"
    found = {
        item.name.removesuffix(".jinja"): item.read_text("utf-8")
        for item in folder.iterdir()
        if item.name.endswith(".jinja")
    }
    return dict(sorted(found.items()))


def _template(tokenizer: Any, asked: str | None) -> tuple[str, str]:
    known = builtin_templates()
    if asked is not None:
        if asked in known:
            return known[asked].rstrip("\n"), asked
        path = Path(asked)
        if not path.is_file():
            raise CalibrationError(f"no chat template {asked}: neither a file nor one of {', '.join(known)}")
        return path.read_text(encoding="utf-8"), path.name
    own = getattr(tokenizer, "chat_template", None)
    if isinstance(own, Mapping):
        own = own.get("default") or next(iter(own.values()), None)
    if not isinstance(own, str) or not own.strip():
        raise CalibrationError(
            f"the model has no chat template; give one with --template NAME|FILE (built in: {', '.join(known)}), "
            "or a finished direction with --direction FILE"
        )
    return own, "model"


def _thinking(template: str, wanted: str) -> Thinking:
    if "enable_thinking" not in template:
        return "none"
    return "on" if wanted == "on" else "off"


def _opens_thinking(rendered: str) -> bool:
    """Whether generation would start inside of a think block."""
    return rendered.rstrip().endswith("<think>")


def _post_instruction(chat: ChatFormat) -> tuple[int, ...]:
    """The tokens that end every rendered prompt, whatever the instruction is.

    Instructions that end differently keep a tokenizer that merges across the boundary from hiding in the suffix.
    """
    encoded = [chat.encode(text)[::-1] for text in SENTINELS]
    suffix = []
    for tokens in zip(*encoded, strict=False):
        if len(set(tokens)) != 1:
            break
        suffix.append(tokens[0])
    if not suffix:
        raise CalibrationError(f"the chat template ({chat.source}) puts nothing after the instruction")
    return tuple(reversed(suffix))
