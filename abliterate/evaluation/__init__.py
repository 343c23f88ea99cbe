"""What the saved files do: refusals, over-refusal, KL, loss."""
