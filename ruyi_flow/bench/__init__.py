"""Benchmarks of a family on this machine: in one process, over links, with many sessions, against other engines."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["Against"]


class Against(StrEnum):
    """An engine that a family in one process is compared with."""

    TRANSFORMERS = "transformers"
    """The model class of transformers, with the same weights."""
    EARLY_EXIT = "transformers-early-exit"
    """The same model, which drafts with its own first layers and verifies with all of them (LayerSkip)."""
    LLAMA_CPP = "llama.cpp"
    """llama.cpp with a GGUF file."""
