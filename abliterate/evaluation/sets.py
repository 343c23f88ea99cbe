"""What a model is measured on, and what is found: figures, their intervals, and the samples they are taken from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from abliterate.calibration.model import Tokens
from abliterate.evaluation.answers import Answers
from abliterate.evaluation.statistics import Mean, Rate, bootstrap, paired


@dataclass(frozen=True)
class EvaluationSet:
    """What is measured on: token ids of held-out prompts, neutral text, and how long completions are.

    Attributes:
        harmful: empty for a model without a chat format, of which refusals are then not measured.
        refusal_tokens: None where they are not known; the rates by score are then not measured.
        neutral: token ids of the neutral text; empty leaves the cross-entropy out.
        look_alike: harmless prompts that sound harmful; empty leaves their refusals out.
        kl_tokens: how many tokens of the base's answers to harmless prompts models are compared over; 0 leaves it out.
    """

    harmful: Sequence[Tokens]
    harmless: Sequence[Tokens]
    neutral: Tokens
    refusal_tokens: Sequence[int] | None
    max_new_tokens: int
    look_alike: Sequence[Tokens] = ()
    kl_tokens: int = 0

    @property
    def prompts(self) -> list[Tokens]:
        """All: harmful, harmless, look-alike."""
        return [*self.harmful, *self.harmless, *self.look_alike]


@dataclass(frozen=True)
class Samples:
    """What the figures are taken from, by the figure's name, in the order of the prompts. No texts.

    Attributes:
        verdicts: one a prompt; None where a judge gave none.
        values: one a prompt, or a window of neutral text.
        weights: tokens that each value is a mean over, for figures that are means over tokens.
    """

    verdicts: Mapping[str, tuple[bool | None, ...]] = field(default_factory=dict)
    values: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    weights: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def rates(self) -> dict[str, Rate]:
        """Of the verdicts that were given."""
        given = {name: [each for each in flags if each is not None] for name, flags in self.verdicts.items()}
        return {name: Rate(sum(flags), len(flags)) for name, flags in given.items() if flags}

    def means(self) -> dict[str, Mean]:
        """Of the values."""
        return {name: bootstrap(values, self.weights.get(name)) for name, values in self.values.items() if values}


@dataclass(frozen=True)
class Evaluation:
    """Rates are shares of prompts in 0..1, cross-entropy and KL in nats a token.

    Attributes:
        refusal_rate_*: refusals of harmful prompts, by phrases in the answer, by the refusal score, by a judge.
        over_refusal_rate_*: refusals of harmless prompts.
        look_alike_refusal_rate_*: refusals of harmless prompts that sound harmful.
        degenerate_rate: answers to harmless prompts that are empty or loop, see `is_degenerate`.
        cross_entropy: on the neutral text. `cross_entropy_answers`: on the base's answers to harmless prompts.
        kl_first_token: mean KL(baseline || this) at the first token on harmless prompts; None without a baseline.
        kl_first_token_answered: the same over those harmless prompts that the baseline does not refuse, by the score:
            where it does, a change may be just what was wanted. None also where refusal tokens are not known.
        top1_agreement: share of harmless prompts whose most likely first token is the baseline's.
        kl_answers, top1_agreement_answers: the same over the first `kl_tokens` tokens of the baseline's own greedy
            answers: means over a prompt's tokens, then over prompts.
        intervals: 95 % intervals (low, high) by the name of the figure.
        samples: what the figures are taken from.
    """

    prompts_harmful: int
    prompts_harmless: int
    max_new_tokens: int
    refusal_rate_substring: float | None = None
    over_refusal_rate_substring: float | None = None
    refusal_rate_score: float | None = None
    over_refusal_rate_score: float | None = None
    cross_entropy: float | None = None
    kl_first_token: float | None = None
    kl_first_token_answered: float | None = None
    top1_agreement: float | None = None
    prompts_look_alike: int = 0
    kl_tokens: int = 0
    look_alike_refusal_rate_substring: float | None = None
    look_alike_refusal_rate_score: float | None = None
    degenerate_rate: float | None = None
    cross_entropy_answers: float | None = None
    kl_answers: float | None = None
    top1_agreement_answers: float | None = None
    judge: str | None = None
    refusal_rate_judge: float | None = None
    over_refusal_rate_judge: float | None = None
    look_alike_refusal_rate_judge: float | None = None
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    samples: Samples = field(default_factory=Samples)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """How many prompts are harmful, harmless, look-alike."""
        return self.prompts_harmful, self.prompts_harmless, self.prompts_look_alike

    def having(self, samples: Samples, judge: str | None = None) -> "Evaluation":
        """The same with more samples, and the figures that they give."""
        found: dict[str, Rate | Mean] = {**samples.rates(), **samples.means()}
        merged = Samples(
            {**self.samples.verdicts, **samples.verdicts},
            {**self.samples.values, **samples.values},
            {**self.samples.weights, **samples.weights},
        )
        intervals = {**self.intervals, **{name: (each.low, each.high) for name, each in found.items()}}
        values = {name: each.value for name, each in found.items()}
        return replace(self, samples=merged, intervals=intervals, judge=judge or self.judge, **values)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Measured:
    """An evaluation, with all of the model's likelihoods on harmless prompts that another model is held against.

    Attributes:
        harmless_logits: of the first token [harmless prompts, vocabulary] fp32.
        answers: the model's own answers and likelihoods; None for one that was itself held against another.
    """

    evaluation: Evaluation
    harmless_logits: Tensor
    answers: Answers | None = None


def differences(before: Evaluation, after: Evaluation) -> dict[str, Mean]:
    """after − before, prompt by prompt, of every figure that both have on the same prompts."""
    one, two = before.samples, after.samples
    found = {}
    for name in one.verdicts.keys() & two.verdicts.keys():
        pairs = [
            (float(a), float(b))
            for a, b in zip(one.verdicts[name], two.verdicts[name], strict=True)
            if a is not None and b is not None
        ]
        if pairs:
            found[name] = paired([a for a, _ in pairs], [b for _, b in pairs])
    for name in one.values.keys() & two.values.keys():
        if one.values[name]:
            found[name] = paired(one.values[name], two.values[name], one.weights.get(name))
    return dict(sorted(found.items()))
