"""Fetching a checkpoint from Hugging Face or ModelScope."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ruyi_flow.errors import CheckpointError

__all__ = ["fetch_from_hub"]

_WANTED = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "tokenizer.model", "LICENSE*"]
"""Files that are fetched from a hub: no code and no pickles."""


def fetch_from_hub(source: str, say: Callable[[str], None]) -> Path:
    """Fetch a repository into the hub's own cache, which resumes interrupted downloads.

    Args:
        source: an id of Hugging Face, or `modelscope:` and one of ModelScope.
        say: called with a message before the download.

    Raises:
        CheckpointError: it could not be fetched.
    """
    if source.startswith("modelscope:"):
        from modelscope import snapshot_download as modelscope_download

        say(f"fetching {source.removeprefix('modelscope:')} from ModelScope")
        try:
            return Path(modelscope_download(source.removeprefix("modelscope:"), allow_patterns=_WANTED))
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{source} could not be fetched: {error}") from error
    from huggingface_hub import snapshot_download

    say(f"fetching {source} from Hugging Face")
    try:
        return Path(snapshot_download(source, allow_patterns=_WANTED))
    except Exception as error:  # also those of its HTTP library, as for an HF_ENDPOINT that is no address
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"{source} could not be fetched from Hugging Face: {reason[0]}") from error
