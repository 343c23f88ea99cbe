"""Project the refusal direction out of a checkpoint, exactly, and prove it."""
