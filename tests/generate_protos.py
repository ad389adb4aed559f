"""Generates ruyi_flow/transport/_pb from protos/. `make protos` writes it; a test checks that it is up to date."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ruyi_flow" / "transport" / "_pb"


def generate() -> dict[str, str]:
    """Return every generated file's text by its name. Services are not generated: transport/ defines the calls."""
    with tempfile.TemporaryDirectory() as folder:
        proto = ROOT / "protos" / "ruyi_flow" / "v1" / "node.proto"
        arguments = ["protoc", f"-I{ROOT / 'protos'}", f"--python_out={folder}", f"--pyi_out={folder}", str(proto)]
        if protoc.main(arguments) != 0:
            sys.exit("protoc failed")
        return {path.name: path.read_text() for path in (Path(folder) / "ruyi_flow" / "v1").iterdir()}


if __name__ == "__main__":
    for name, text in generate().items():
        (PACKAGE / name).write_text(text)
