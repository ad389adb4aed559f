"""The extras of this package: which extras bring a library, and the error where it is not installed.

An import of such a library needs no check of its own: the command line and the SDK turn its failure into a
`MissingExtra`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from ruyi_flow.errors import MissingExtra

__all__ = ["EXTRAS", "LIBRARIES", "is_installed", "missing_extra", "needed_by", "require"]

_NODE = ("node", "train", "eval", "bench")

EXTRAS = {
    "accelerate": ("train",),
    "cryptography": ("keys",),
    "fastapi": ("http",),
    "gguf": _NODE,
    "huggingface_hub": _NODE,
    "jinja2": _NODE,
    "llama_cpp": ("bench",),
    "lm_eval": ("eval",),
    "matplotlib": ("sim", "eval", "bench"),
    "modelscope": ("modelscope",),
    "opentelemetry": ("otel",),
    "prometheus_client": ("http", *_NODE),
    "ray": ("ray",),
    "safetensors": _NODE,
    "tensorboard": ("train",),
    "tokenizers": _NODE,
    "torch": _NODE,
    "transformers": _NODE,
    "uvicorn": ("http",),
}
"""The extras that bring each module; the first one is the smallest."""

LIBRARIES = {
    "fastapi": "FastAPI",
    "huggingface_hub": "huggingface-hub",
    "jinja2": "Jinja2",
    "llama_cpp": "llama-cpp-python",
    "lm_eval": "lm-evaluation-harness",
    "modelscope": "ModelScope's client",
    "opentelemetry": "OpenTelemetry",
    "prometheus_client": "Prometheus' client",
    "ray": "Ray",
    "tensorboard": "TensorBoard",
    "torch": "PyTorch",
}
"""Names of libraries whose module has another one."""


def missing_extra(error: ModuleNotFoundError, user: str, *, extra: str | None = None) -> MissingExtra | None:
    """Return the error that says how to install a missing library, or None if no extra brings it.

    Args:
        error: the error of the import.
        user: what needs the library, as the message names it.
        extra: the extra to name, if it brings the library. Default: the smallest one that does.
    """
    module = (error.name or "").partition(".")[0]
    if module not in EXTRAS:
        return None
    chosen = extra if extra in EXTRAS[module] else EXTRAS[module][0]
    library = LIBRARIES.get(module, module)
    return MissingExtra(f"{user} needs {library}, which is not installed: pip install 'ruyi-flow[{chosen}]'")


@contextmanager
def needed_by(user: str) -> Iterator[None]:
    """Turn the failed import of an optional library in this block into a `MissingExtra`.

    Args:
        user: what needs the library, as the message names it.

    Raises:
        MissingExtra: a library of an extra is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (missing := missing_extra(error, user)) is None:
            raise
        raise missing from error


def require(module: str) -> None:
    """Check that a library is installed, without importing it.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    if not is_installed(module):
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)


def is_installed(module: str) -> bool:
    """Whether a library is installed; it is not imported."""
    return find_spec(module) is not None
