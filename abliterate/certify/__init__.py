"""Measured proof that the stored weights leave nothing along the direction."""
