"""The chat format: an instruction as the model itself expects it, and the positions after the instruction."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from abliterate.errors import CalibrationError

log = logging.getLogger(__name__)
Thinking = Literal["none", "off", "on"]
CLOSED_THINKING = "\n\n</think>\n\n"
# Instructions that end in what a tokenizer may merge with the characters that follow.
SENTINELS = (
    "Name a river in Asia",
    "What is 7 times 8?",
    "Tell me: why is the sky blue...",
    "x",
    'Spell "tree"',
    "Name a tree (a tall one)",
    "Finish: 5 + 5 =",
    "Explain: let a[0] = {}",
    "List <b>",
    "Count from 1 to 7",
    "Name a flower!",
    "Name a bird:",
    "翻译：谢谢。",
    "Explain 🌱",
)


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
    rendered = draft.render("x")
    if _opens_thinking(rendered):
        closing = "" if thinking == "on" else _closing(rendered)
        draft = replace(draft, thinking="off" if closing else "on", closing=closing)
    return replace(draft, post_instruction=_post_instruction(draft))


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
        try:
            return path.read_text(encoding="utf-8-sig"), path.name
        except (OSError, UnicodeDecodeError) as error:
            raise CalibrationError(f"the chat template {path} cannot be read as UTF-8 text: {error}") from error
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


def _closing(rendered: str) -> str:
    """What makes of an open think block the empty one that models know, whatever line feeds the template wrote."""
    written = len(rendered) - len(rendered.rstrip("\n"))
    return CLOSED_THINKING[min(written, 2) :]


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
