"""Tests run as the command does: its settings of the arithmetic libraries, before anything loads them.

No example of a property fails for the time that it takes: the machine may be busy.
"""

import os

from hypothesis import settings

from abliterate.terminal import ENVIRONMENT

for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)

settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")
