"""Hidden states to directions: means, scores, selection."""
