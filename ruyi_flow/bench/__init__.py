"""How fast a family answers on this machine: in one process, over links, for many at once; against other engines."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["Against"]


class Against(StrEnum):
    """What a family in one process is compared with."""

    TRANSFORMERS = "transformers"
    """transformers' own model on the same weights."""
    EARLY_EXIT = "transformers-early-exit"
    """The same, which drafts with its own first layers (LayerSkip) and checks with all of them."""
    LLAMA_CPP = "llama.cpp"
    """llama.cpp on a GGUF file."""
