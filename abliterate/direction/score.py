"""The refusal score: how much the model's next token looks like the start of a refusal."""

from collections.abc import Sequence

import torch
from torch import Tensor


def refusal_score(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    """Log-odds of the refusal tokens' total probability (Arditi et al. 2024, section 2.4 and appendix B).

    Args:
        logits: [..., vocabulary] at the last position of the prompt.
        tokens: ids of the refusal tokens, at least one and not all of the vocabulary.

    Returns:
        [...] in nats; above 0 the model more likely refuses than not.
    """
    if not tokens:
        raise ValueError("no refusal tokens")
    chosen = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    chosen[torch.tensor(list(tokens), device=logits.device)] = True
    values = logits.float()
    refuse = values.masked_fill(~chosen, -torch.inf).logsumexp(-1)
    comply = values.masked_fill(chosen, -torch.inf).logsumexp(-1)
    return refuse - comply


def kl_divergence(base: Tensor, other: Tensor) -> Tensor:
    """KL(base || other) in nats for logits [..., vocabulary]; clamped at 0 against rounding."""
    p, q = base.float().log_softmax(-1), other.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).clamp_min(0.0)
