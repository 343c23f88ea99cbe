"""Tests run as the command does: its settings of the arithmetic libraries, before anything loads them."""

import os

from abliterate.terminal import ENVIRONMENT

for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
