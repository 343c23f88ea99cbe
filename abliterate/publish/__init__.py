"""Manifest, model card and plots."""
