"""Patches: kilobytes that, with the base at hand, give the very bytes of a converted checkpoint."""
