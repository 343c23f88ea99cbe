"""A language model at work: logits at the last position, hidden states at chosen ones, greedy completions.

Prompts are padded on the right for forward passes (a causal model never looks at the padding, and positions need no
correction) and on the left for generation.
"""

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from abliterate.calibration.hooks import Steer, Stream, on_input, steered
from abliterate.calibration.lockstep import Call, T
from abliterate.calibration.runner import Bar, Resident, Runner
from abliterate.calibration.tour import failing, run
from abliterate.errors import CalibrationError
from abliterate.progress import SILENT, Progress

log = logging.getLogger(__name__)

Tokens = Sequence[int]


@dataclass(frozen=True)
class Batch:
    """What one forward pass gave.

    Attributes:
        rows: index of each row in the list that was asked for.
        logits: [rows, vocabulary] float32 at the last position.
        hidden: [rows, positions, layers, hidden] float32, the input of every layer at positions -P..-1; None unless
            asked for.
    """

    rows: list[int]
    logits: Tensor
    hidden: Tensor | None


def pad(prompts: Sequence[Tokens], device: torch.device, left: bool = False) -> dict[str, Tensor]:
    """Token ids and attention mask, both [prompts, longest], on `device`."""
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(prompts):
        where = slice(width - len(tokens), width) if left else slice(0, len(tokens))
        ids[row, where] = torch.tensor(list(tokens), dtype=torch.long)
        mask[row, where] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


@contextmanager
def capture_inputs(
    layers: Sequence[nn.Module], where: Tensor, width: int, put: Callable[[Tensor], Tensor] | None = None
) -> Iterator[dict[int, Tensor]]:
    """Collects the input of each layer at `where` [rows, positions]: [rows, positions, hidden] by the layer's number.

    Of a layer that runs several times it is the last, of several streams (hyper-connections) their mean.

    Args:
        put: puts each of them where it waits for the others.

    Raises:
        CalibrationError: the layers see other tokens than the prompts', so that positions cannot be told.
    """
    longest = int(where.max()) + 1 if where.numel() else 0
    taken: dict[int, Tensor] = {}
    rows = torch.arange(len(where))[:, None]

    def keep(number: int, hidden: Tensor) -> Tensor:
        if hidden.shape[:2] != (len(where), longest):
            raise CalibrationError(
                f"the decoder layers see {list(hidden.shape[:2])} tokens of prompts {[len(where), longest]}: positions "
                "cannot be told"
            )
        chosen = hidden[rows, where].float().cpu()
        mean = chosen.reshape(*where.shape, -1, width).mean(dim=-2)
        taken[number] = put(mean) if put is not None else mean
        return hidden

    with ExitStack() as stack:
        for number, layer in enumerate(layers):
            stack.enter_context(on_input(layer, lambda h, number=number: keep(number, h)))  # type: ignore[misc]
        yield taken


def stacked(taken: dict[int, Tensor], layers: int) -> Tensor:
    """[rows, positions, layers, hidden]; what a layer that did not run would have read is what the next one reads.

    Raises:
        CalibrationError: no layer ran.
    """
    if not taken:
        raise CalibrationError("no decoder layer of the model ran on the prompts")
    last = max(taken)
    found = {i: taken[next((j for j in range(i, last + 1) if j in taken), last)] for i in range(layers)}
    return torch.stack([found[i] for i in range(layers)], dim=2)


def _within(inside: Callable[[], AbstractContextManager[None]], call: Call[T]) -> T:
    with inside():
        return call()


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model, its weights in memory or streamed through it.

    Attributes:
        model: the transformers model, in evaluation mode.
        tokenizer: its tokenizer.
        stream: where its residual stream can be reached.
        head: the output embedding.
        batch_size: prompts a forward pass.
        runner: how forward passes are run.
    """

    model: Any
    tokenizer: Any
    stream: Stream
    head: nn.Module
    batch_size: int
    runner: Runner = field(default_factory=Resident)

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        device: torch.device = next(p.device for p in self.model.parameters() if not p.is_meta)
        return device

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        dtype: torch.dtype = next(self.model.parameters()).dtype
        return dtype

    def batches(self, prompts: Sequence[Tokens], steers: Sequence[Steer] | None = None) -> Iterator[list[int]]:
        """Indices of prompts, similar lengths together, so that little is spent on padding; additions apart.

        Raises:
            CalibrationError: one is longer than the model has positions.
        """
        longest = max(map(len, prompts), default=0)
        positions = getattr(getattr(self.model, "config", None), "max_position_embeddings", None)
        if isinstance(positions, int) and 0 < positions < longest:
            raise CalibrationError(f"a prompt has {longest} tokens, and the model {positions} positions; shorten it")
        adds = [steer.add is not None for steer in steers] if steers else [False] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda index: (adds[index], len(prompts[index])))
        for start in range(0, len(order), self.batch_size):
            yield order[start : start + self.batch_size]

    @contextmanager
    def last_position_only(self, lengths: Tensor) -> Iterator[None]:
        """The head sees each row's last token only: the vocabulary at every position would fill memory."""
        rows = torch.arange(len(lengths))
        with on_input(self.head, lambda hidden: hidden[rows, lengths - 1][:, None]):
            yield

    def logits(self, prompts: Sequence[Tokens]) -> Tensor:
        """One batch: logits [prompts, vocabulary] float32 at the last position."""
        lengths = torch.tensor([len(tokens) for tokens in prompts])
        with self.last_position_only(lengths):
            output = run(self.model, pad(prompts, self.device) | {"use_cache": False})
        last: Tensor = output.logits[:, -1].float()
        return last

    def forward(
        self,
        prompts: Sequence[Tokens],
        steers: Sequence[Steer] | None = None,
        positions: int = 0,
        progress: Progress = SILENT,
        description: str = "forward",
        inside: Callable[[], AbstractContextManager[None]] = nullcontext,
        logits: Callable[[Sequence[Tokens]], Tensor] | None = None,
    ) -> Iterator[Batch]:
        """Runs every prompt once, batch by batch; each batch says which prompts it holds.

        Args:
            prompts: token ids.
            steers: one intervention a prompt; None leaves the model alone.
            positions: P, how many positions from the end to keep the layers' inputs at.
            progress: where the bar goes, titled `description`.
            inside: entered by each batch's own pass, for hooks that act on the pass that set them.
            logits: makes those of a batch [prompts, vocabulary], in place of the method of this name.
        """
        batches = list(self.batches(prompts, steers))
        calls: list[Call[Batch]] = []
        for rows in batches:
            chosen = [steers[i] for i in rows] if steers else []
            make = partial(logits or self.logits, [prompts[i] for i in rows])
            lengths = torch.tensor([len(prompts[i]) for i in rows])
            run_one = partial(self._run, rows, make, lengths, chosen, positions, len(batches))
            calls.append(partial(_within, inside, run_one))
        bar = Bar(progress, description, list(map(len, batches)))
        for _, batch in self.runner.run(calls, bar):
            yield batch

    def _run(
        self,
        rows: list[int],
        make: Call[Tensor],
        lengths: Tensor,
        steers: Sequence[Steer],
        positions: int,
        calls: int,
    ) -> Batch:
        where = lengths[:, None] + torch.arange(-positions, 0)[None]
        with ExitStack() as stack:
            stack.enter_context(steered(self.stream, steers))
            layers = self.stream.layers if positions else ()
            keep = partial(self._keep, calls * len(layers))
            taken = stack.enter_context(capture_inputs(layers, where, self.stream.hidden_size, keep))
            logits = make()
        return Batch(rows, logits, stacked(taken, len(self.stream.layers)) if positions else None)

    def _keep(self, count: int, value: Tensor) -> Tensor:
        """Where so many like this one wait together: on the disk, if they outgrow memory."""
        spool = self.runner.spool
        return spool.keep(value) if spool is not None and spool.outgrows(value, count) else value

    def generate(
        self,
        prompts: Sequence[Tokens],
        max_new_tokens: int,
        progress: Progress = SILENT,
        description: str = "generate",
        inside: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> list[list[int]]:
        """Greedy completions, token ids without the prompt and without what follows the end token.

        Args:
            inside: see `forward`.
        """
        return self.generate_under([inside], prompts, max_new_tokens, progress, description)[0]

    def generate_under(
        self,
        insides: Sequence[Callable[[], AbstractContextManager[None]]],
        prompts: Sequence[Tokens],
        max_new_tokens: int,
        progress: Progress = SILENT,
        description: str = "generate",
    ) -> list[list[list[int]]]:
        """What `generate` gives inside of each of several contexts, all in one run: by context, then by prompt."""
        completions: list[list[list[int]]] = [[[] for _ in prompts] for _ in insides]
        batches = [(which, rows) for which in range(len(insides)) for rows in self.batches(prompts)]
        bar = Bar(progress, description, [len(rows) for _, rows in batches], max_new_tokens)
        with self._greedy(max_new_tokens) as plain:
            calls = []
            for which, rows in batches:
                make = partial(self._generate, [prompts[i] for i in rows], copy.copy(plain))
                calls.append(partial(_within, insides[which], make))
            for number, found in self.runner.run(calls, bar):
                which, rows = batches[number]
                for row, tokens in zip(rows, found, strict=True):
                    completions[which][row] = self._until_end(tokens)
        return completions

    def _generate(self, prompts: Sequence[Tokens], plain: GenerationConfig) -> list[list[int]]:
        """Greedy token ids of one batch's completions; without a cache where the architecture's own fails."""
        inputs = pad(prompts, self.device, left=True)
        # transformers hands the head a slice, for which torch would copy the head's weights once a prompt.
        with on_input(self.head, Tensor.contiguous):
            try:
                with failing(self.model):
                    output: Tensor = self.model.generate(**inputs, generation_config=plain)
            except CalibrationError as error:
                log.info("generating without a cache: %s", error)
                plain.use_cache = False
                with failing(self.model):
                    output = self.model.generate(**inputs, generation_config=plain)
        found: list[list[int]] = output[:, inputs["input_ids"].shape[1] :].tolist()
        return found

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """Ids that end a completion, as the checkpoint's generation config or its tokenizer names them."""
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        found = configured if configured is not None else self.tokenizer.eos_token_id
        ids = found if isinstance(found, list | tuple) else [found]
        return tuple(int(token) for token in ids if token is not None)

    @contextmanager
    def _greedy(self, max_new_tokens: int) -> Iterator[GenerationConfig]:
        """Plain greedy decoding: a checkpoint's own sampling settings or penalties would blur the comparison.

        Meanwhile it stands in for the checkpoint's own, from which transformers fills in all that is left open.
        """
        ends, own = list(self.end_tokens), self.model.generation_config
        plain = GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else 0,
        )
        self.model.generation_config = plain
        try:
            yield plain
        finally:
            self.model.generation_config = own

    def _until_end(self, tokens: list[int]) -> list[int]:
        stops = [tokens.index(end) for end in self.end_tokens if end in tokens]
        return tokens[: min(stops)] if stops else tokens

    def decode(self, tokens: Tokens) -> str:
        """The text of a completion."""
        text: str = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text.strip()
