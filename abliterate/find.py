"""From a loaded model and prompts to the refusal direction: means, candidates, selection."""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from abliterate.calibration.chat import ChatFormat
from abliterate.calibration.model import LanguageModel
from abliterate.checkpoint.diskio import check_file_target, write_file
from abliterate.direction.files import direction_bytes
from abliterate.direction.means import Directions, Mean, MeanMethod, difference, mean_hidden
from abliterate.direction.refusal_tokens import RefusalTokens, find_refusal_tokens, named_refusal_tokens
from abliterate.direction.screening import Selection
from abliterate.direction.sparing import apart
from abliterate.edit.cut import Cut
from abliterate.errors import CalibrationError
from abliterate.picking import Picked, Picking, Search
from abliterate.progress import Progress
from abliterate.prompting import Prompts, chat_format, encode, load_calibration
from abliterate.recipe import DirectionRecipe, Recipe, load_recipe
from abliterate.stages import NO_STAGES, Once, Stages
from abliterate.subject import RunOptions, Subject, load_model, opened, tokenizer_of
from abliterate.traffic import CALIBRATION, Passes, tell_traffic

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FoundDirection:
    """The refusal direction of a model and how it was found.

    Attributes:
        direction: unit r [hidden] fp32.
        cut: what the recipe removes, and where. `search`: how its strengths were found; None where they were set.
        directions: the candidate grid it was picked from.
    """

    direction: Tensor
    cut: Cut
    directions: Directions
    selection: Selection
    refusal_tokens: RefusalTokens
    chat: ChatFormat
    prompts: Prompts
    search: Search | None = None

    def file_bytes(self) -> bytes:
        """The direction file."""
        choice = self.selection.choice
        return direction_bytes(
            self.direction,
            self.directions,
            choice.candidates,
            {"position": choice.pick.position, "layer": choice.pick.layer, "relaxed": choice.relaxed},
            self.cut,
        )

    @property
    def sha256(self) -> str:
        """Hash of the direction file."""
        return hashlib.sha256(self.file_bytes()).hexdigest()


def find_in(
    base: Once[LanguageModel],
    chat: ChatFormat,
    prompts: Prompts,
    recipe: Recipe,
    progress: Progress,
    stages: Stages = NO_STAGES,
) -> FoundDirection:
    """Finds the direction of a model.

    Args:
        base: the model, which is loaded when it is first needed.
        stages: keeps what was computed; where it has everything, the model is not loaded.

    Raises:
        CalibrationError: the model does not refuse, or too few prompts are left.
        SelectionError: no candidate passes.
    """
    train = (encode(chat, prompts.harmful.train), encode(chat, prompts.harmless.train))
    tokens = stages.stage(
        "refusal tokens", RefusalTokens, lambda: _refusal_tokens(base(), *train, recipe, chat, progress)
    )
    positions = positions_of(chat, recipe)
    sign, method = 1 if recipe.direction.filter else 0, mean_method(recipe.direction)

    def mean(kind: str, texts: list[list[int]], wanted: int) -> Mean:
        name = f"{kind} means"
        make = lambda: mean_hidden(base(), texts, positions, wanted, tokens.ids, progress, name, method)  # noqa: E731
        return stages.stage(name, Mean, make)

    harmful, harmless = mean("harmful", train[0], sign), mean("harmless", train[1], -sign)
    spares = recipe.direction.contrast == "false-refusal"
    look_alike = mean("look-alike", encode(chat, prompts.look_alike.train), sign) if spares else None

    def grid() -> Directions:
        transport = base.made.stream.transport if base.made else None
        keep = recipe.direction.harmless_part == "kept"
        refusal = difference(harmful, harmless, transport, keep)
        return apart(difference(look_alike, harmless, transport, keep), refusal) if look_alike else refusal

    picking = Picking(chat, prompts, tokens, recipe, progress, stages)
    picked = stages.stage("selection", Picked, lambda: picking.pick(base(), grid()))
    if picked.selection.choice.relaxed:
        log.warning("selection relaxed: %s", picked.selection.choice.reason)
    return FoundDirection(picked.unit, picked.cut, grid(), picked.selection, tokens, chat, prompts, picked.search)


def mean_method(recipe: DirectionRecipe) -> MeanMethod:
    """What the middle of activations is, as the recipe says."""
    return MeanMethod(recipe.mean == "geometric-median", recipe.winsorize)


def positions_of(chat: ChatFormat, recipe: Recipe) -> int:
    """How many positions from the end are candidates."""
    available = len(chat.post_instruction)
    wanted = recipe.direction.positions
    if wanted == "all":
        return available
    if wanted > available:
        raise CalibrationError(f"direction.positions is {wanted}, but {available} tokens follow the instruction")
    return wanted


def _refusal_tokens(
    model: LanguageModel,
    harmful: list[list[int]],
    harmless: list[list[int]],
    recipe: Recipe,
    chat: ChatFormat,
    progress: Progress,
) -> RefusalTokens:
    words = recipe.direction.refusal_tokens
    if words != "auto":
        return named_refusal_tokens(model, words)
    return find_refusal_tokens(model, harmful, harmless, progress, chat.template)


def find_direction(
    model: str,
    *,
    recipe: Recipe | str = "refusal",
    revision: str | None = None,
    options: RunOptions | None = None,
    out: Path | str | None = None,
    overwrite: bool = False,
) -> FoundDirection:
    """Finds the refusal direction of a checkpoint, and writes it to `out` when that is given.

    Args:
        model: a folder, or a Hub id (`org/name`, `org/name@revision`).
        recipe: a shipped recipe's name, a YAML file, or a recipe.
        overwrite: replace a file that is at `out`.

    Raises:
        AbliterateError: see `find_in` and `open_subject`; or `out` cannot be written.
    """
    if out is not None:
        check_file_target(Path(out), overwrite)
    options = options or RunOptions()
    recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
    with opened(model, revision, options, inexact=True) as subject:
        found = _found(subject, recipe, options)
    if out is not None:
        write_file(Path(out), found.file_bytes())
    return found


def _found(subject: Subject, recipe: Recipe, options: RunOptions) -> FoundDirection:
    prompts = load_calibration(recipe.calibration, options.seed)
    tokenizer = tokenizer_of(subject, options)
    chat = chat_format(tokenizer, recipe.calibration, options.template, options.system_prompt)
    plan = subject.plan
    tied = plan.shares_edit and (recipe.edit.head == "tied" or plan.untying is None)
    base = Once(lambda: load_model(subject, options, tied_head=tied, tokenizer=tokenizer))
    tell_traffic(subject, options, Passes(CALIBRATION, 0))
    return find_in(base, chat, prompts, recipe, options.progress)
