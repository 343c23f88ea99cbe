"""Prompts, chat templates, and hidden states."""
