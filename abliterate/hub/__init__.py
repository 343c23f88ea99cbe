"""Checkpoints to the Hub: what is pushed, where to, how, and what is said when it fails."""
