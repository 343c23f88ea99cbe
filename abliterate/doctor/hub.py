"""The Hub as this machine sees it: endpoint, offline flags, caches, and whether there is a token.

Nothing is asked over the network, and a token is neither read nor checked: its file is only looked for.
"""

import os
import shutil
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from abliterate.doctor.report import Fact, Finding, Section, anonymous
from abliterate.errors import first_line

TOKEN_VARIABLES = ("HF_OIDC_RESOURCE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""In the order in which the Hub's client looks at them."""
OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
PROXY_VARIABLES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")
COUNTING_SECONDS = 2.0
"""For the size of a cache; a larger one is told as `more than`."""


def hub() -> Section:
    """Endpoint, offline flags, proxies, token and cache."""
    try:
        from huggingface_hub import constants
    except Exception as error:  # what an installation in pieces raises
        return Section("hub", {"huggingface_hub": f"does not load: {anonymous(first_line(error))}"})
    offline = [name for name in OFFLINE_VARIABLES if name in os.environ]
    proxies = [name for name in PROXY_VARIABLES if name in os.environ or name.lower() in os.environ]
    facts: dict[str, Fact] = {
        "endpoint": bare(constants.ENDPOINT),
        "offline": ("yes" if constants.HF_HUB_OFFLINE else "no") + (f" ({', '.join(offline)} set)" if offline else ""),
        "proxy": ", ".join(proxies) + " set" if proxies else "none set",
        "token": token_state(constants),
        "HF_HOME": anonymous(constants.HF_HOME),
    }
    cache, findings = cache_facts(Path(constants.HF_HUB_CACHE))
    return Section("hub", facts | cache, tuple(findings))


def token_state(constants: Any) -> str:
    """Whether there is a token, and where from; what it is stays unread."""
    unused = "; not sent unasked (HF_HUB_DISABLE_IMPLICIT_TOKEN)" if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else ""
    for name in TOKEN_VARIABLES:
        if os.environ.get(name, "").strip():
            return f"present, from the variable {name}{unused}"
    path = Path(constants.HF_TOKEN_PATH)
    try:
        there = path.is_file() and path.stat().st_size > 0
    except OSError:
        there = False
    return f"present, from {anonymous(path)}{unused}" if there else "none"


def bare(address: str) -> str:
    """An address without user, password and query, which may hold secrets."""
    try:
        parts = urlsplit(address)
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return "not an address"
    return anonymous(f"{parts.scheme}://{host}{port}{parts.path}") if host and parts.scheme else "not an address"


def cache_facts(cache: Path) -> tuple[dict[str, Fact], list[Finding]]:
    """Where downloads are kept, how much that is, and whether there is room and leave for more."""
    facts: dict[str, Fact] = {"cache": anonymous(cache)}
    existing = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    facts["cache_free_bytes"] = shutil.disk_usage(existing).free
    findings = []
    if not os.access(existing, os.W_OK):
        hint = "set HF_HOME to a folder that can be written to; models that are folders here do not need it"
        findings.append(Finding("note", f"the Hub's cache {anonymous(cache)} cannot be written to", hint))
    if not cache.is_dir():
        return facts | {"cached_models": 0}, findings
    size, complete = folder_size(cache)
    facts["cached_models"] = sum(1 for _ in cache.glob("models--*"))
    facts["cache_used_bytes" if complete else "cache_used_more_than_bytes"] = size
    return facts, findings


def folder_size(folder: Path, seconds: float = COUNTING_SECONDS) -> tuple[int, bool]:
    """Bytes of the files below a folder, links not followed; and whether all of them were counted in that time."""
    ends, size = time.monotonic() + seconds, 0
    for parent, _, names in os.walk(folder):
        for name in names:
            if time.monotonic() > ends:
                return size, False
            try:
                path = Path(parent, name)
                size += 0 if path.is_symlink() else path.stat().st_size
            except OSError:  # gone meanwhile
                continue
    return size, True
