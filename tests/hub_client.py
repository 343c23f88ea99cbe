"""The Hub client of this process, sent to a server of the tests."""

import huggingface_hub
import pytest

from tests.hub_server import Hub


def use(hub: Hub, home: str, patch: pytest.MonkeyPatch) -> None:
    """Has the client talk to `hub`, and keep what it keeps in the folder `home`."""
    constants = huggingface_hub.constants
    patch.setattr(constants, "ENDPOINT", hub.url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}")
    patch.setattr(constants, "HF_HOME", home)
    patch.setattr(constants, "HF_HUB_CACHE", f"{home}/hub")
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
