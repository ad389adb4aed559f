"""The snippets of the guide to clients."""

from __future__ import annotations

import re

from tests.install.environment import ROOT

__all__ = ["ADDRESS", "TEXT", "sections"]

TEXT = (ROOT / "docs" / "guides" / "clients.md").read_text()

ADDRESS = "http://127.0.0.1:8000"
"""Where the server of the guide listens."""


def sections(language: str) -> dict[str, list[str]]:
    """Return the snippets in a language by the heading that they are below."""
    found = {}
    for part in re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]:
        blocks = re.findall(rf"^```{language}\n(.*?)^```", part, re.DOTALL | re.MULTILINE)
        if blocks:
            found[part.splitlines()[0]] = blocks
    return found
