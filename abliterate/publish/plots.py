"""The plots that belong to a manifest, and nothing but the manifest goes into them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from abliterate.publish.plot import plot_selection
from abliterate.publish.searched import SEARCH_PLOT, search_plot

SELECTION_PLOT = "selection.png"
PLOTS = (SELECTION_PLOT, SEARCH_PLOT)


def draw(manifest: Mapping[str, Any], folder: Path) -> None:
    """Writes the plots that the card shows: how the direction was picked, and how strengths were searched for."""
    if manifest["selection"]:
        tokens = (manifest["calibration"] or {}).get("chat", {}).get("post_instruction_tokens")
        plot_selection(manifest["selection"], folder / SELECTION_PLOT, tokens)
    if manifest["search"]:
        (folder / SEARCH_PLOT).write_bytes(search_plot(manifest["search"]))
