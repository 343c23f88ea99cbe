"""Adapters: the edit as LoRA factors in PEFT's format, for who loads the base and adds the difference."""
