"""Shapes of families that can be simulated without a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruyi_flow.errors import ConfigError, did_you_mean
from ruyi_flow.family.config import FamilyConfig

__all__ = ["FAMILIES", "RUYI2", "RUYI_7B", "SMOLLM2", "family_shape"]

# Each mapping has the keys of config.json, for `FamilyConfig.parse`.

RUYI_7B: Mapping[str, Any] = {
    # config.json of huggingface.co/TeleAI-AI-Flow/AI-Flow-Ruyi-7B-0725. Exits and sizes, 3B to 7B:
    # github.com/TeleAI-AI-Flow/AI-Flow-Ruyi, README_en.md. The shape is Qwen2.5-7B's.
    "model_type": "ruyi_qwen2",
    "early_exit_points": [11, 15, 19, 23, 27],
    "shared_heads": False,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "eos_token_id": 151643,
    "vocab_size": 152064,
}
RUYI2: Mapping[str, Any] = {
    # Exits and sizes, 1.7B, 8B and 14B: github.com/TeleAI-AI-Flow/AI-Flow-Ruyi2, README_en.md. The shape is
    # Qwen3-14B-Base's.
    "model_type": "ruyi_qwen3",
    "early_exit_points": [2, 21, 39],
    "shared_heads": False,
    "hidden_size": 5120,
    "intermediate_size": 17408,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "eos_token_id": 151643,
    "vocab_size": 151936,
}
SMOLLM2: Mapping[str, Any] = {
    # The demo family: SmolLM2-135M-Instruct with the branches of family/demo/recipe.yaml, without its probes.
    "model_type": "ruyi_llama",
    "early_exit_points": [5, 11, 17, 23, 29],
    "early_exit_branch_layers": [1, 2, 2, 2, 1],
    "shared_heads": True,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rope_theta": 1e5,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
    "vocab_size": 49152,
}
FAMILIES: Mapping[str, Mapping[str, Any]] = {"ruyi-7b": RUYI_7B, "ruyi2": RUYI2, "smollm2": SMOLLM2}
"""Shapes by the family's name in a scenario."""


def family_shape(family: str, exits: tuple[int, ...] | None, where: str) -> FamilyConfig:
    """Return a family's shape: one of `FAMILIES`, or read from the config.json of a folder.

    Raises:
        ConfigError: the family is neither a known name nor a folder with a config.json.
    """
    if family.lower() in FAMILIES:
        return FamilyConfig.parse(FAMILIES[family.lower()])
    file = Path(family) / "config.json"
    try:
        return FamilyConfig.parse(json.loads(file.read_text(encoding="utf-8")), exits=exits, where=str(file))
    except (OSError, ValueError):
        raise ConfigError(
            f"{where}: family: {family!r} is neither a folder with a config.json nor one of "
            f"{', '.join(FAMILIES)}; the costs of hardware need the family's shape{did_you_mean(family, [*FAMILIES])}"
        ) from None
