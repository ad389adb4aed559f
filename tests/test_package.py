"""The package as a whole: what importing it does, and what it exports."""

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import ruyi_flow
from tests.generate_protos import PACKAGE, generate


def test_import_loads_neither_torch_nor_grpc() -> None:
    code = "import sys, ruyi_flow; sys.exit(bool({'torch', 'grpc', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_help_of_the_command_line_loads_no_torch() -> None:
    code = "import sys, ruyi_flow.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_loading_a_slice_leaves_torchs_compiler_out(tiny: Path) -> None:
    code = (
        "import sys, torch; from ruyi_flow.family import checkpoint, loading; "
        f"loading.load_slice(checkpoint.Checkpoint({str(tiny)!r}), (2, 4), dtype=torch.float32); "
        "sys.exit(bool({'sympy', 'torch._dynamo'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_exported_name_exists() -> None:
    for module in pkgutil.walk_packages(ruyi_flow.__path__, "ruyi_flow."):
        if "._pb" in module.name or module.name.endswith("cli"):
            continue
        loaded = importlib.import_module(module.name)
        for name in getattr(loaded, "__all__", ()):
            assert hasattr(loaded, name), f"{module.name}.{name}"
    for name in ruyi_flow.__all__:
        assert getattr(ruyi_flow, name) is not None


def test_generated_messages_are_up_to_date() -> None:
    for name, text in generate().items():
        assert (PACKAGE / name).read_text() == text, "run make protos"


def test_every_module_and_public_name_says_what_it_is() -> None:
    for path in Path(ruyi_flow.__path__[0]).rglob("*.py"):
        if "_pb" not in path.parts:
            assert path.read_text().startswith('"""'), path
