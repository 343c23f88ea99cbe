"""A direction and a writer to an edited tensor."""
