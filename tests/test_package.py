"""The package as a whole: what importing it does, and what it exports."""

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import ruyi_flow
from tests.generate_protos import PACKAGE, generate


def test_import_loads_neither_torch_nor_grpc() -> None:
    code = "import sys, ruyi_flow; sys.exit(bool({'torch', 'grpc', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_help_of_the_command_line_loads_no_torch() -> None:
    code = "import sys, ruyi_flow.cli.commands; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_loading_a_slice_leaves_torchs_compiler_out(tiny: Path) -> None:
    code = (
        "import sys, torch; from ruyi_flow.family import checkpoint, loading; "
        f"loading.load_slice(checkpoint.Checkpoint({str(tiny)!r}), (2, 4), dtype=torch.float32); "
        "sys.exit(bool({'sympy', 'torch._dynamo'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_what_prevents_an_import_is_told() -> None:
    """A module that asks an installed library for what its build lacks raises an AttributeError."""
    code = "import torch; del torch.inference_mode; from ruyi_flow import load_family"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ruyi_flow.local cannot be imported: module 'torch' has no attribute 'inference_mode'" in done.stderr


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


def named_docstrings(node: ast.Module | ast.ClassDef, prefix: str = "") -> Iterator[tuple[str, str | None]]:
    """Yield the docstring of every public class, function and field, by its name; None where there is none."""
    for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if not statement.name.startswith("_"):
                yield prefix + statement.name, ast.get_docstring(statement)
                if isinstance(statement, ast.ClassDef):
                    yield from named_docstrings(statement, f"{prefix}{statement.name}.")
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                yield prefix + statement.target.id, str(following.value.value)


def documented() -> Iterator[tuple[str, str | None]]:
    for path in Path(ruyi_flow.__path__[0]).rglob("*.py"):
        if "_pb" not in path.parts:
            tree = ast.parse(path.read_text())
            yield str(path), ast.get_docstring(tree)
            yield from ((f"{path}: {name}", text) for name, text in named_docstrings(tree))


IMPLEMENTS = {
    *(
        "embed",
        "join",
        "compact",
        "begin",
        "states",
        "write_log",
        "use_pages",
        "leave",
        "lose",
        "submit",
        "shutdown",
        "forward",
        "backward",
        "event",
        "start",
        "run",
        "wait",
        "pause",
    ),
}
"""Methods whose docstring is that of the interface they implement."""


def test_every_module_and_public_name_has_a_docstring() -> None:
    lacking = [name for name, text in documented() if text is None and name.rpartition(".")[2] not in IMPLEMENTS]
    assert not lacking


def test_docstrings_stand_alone() -> None:
    """A hover shows a docstring without the name it describes, so it must not begin as the rest of a sentence."""
    fragment = re.compile(r"(Of|That|Those|Whose|In|At|By|For|With|To|As|Where|And|But|Also|Likewise)\b")
    assert not [f"{name}: {text}" for name, text in documented() if text and fragment.match(text)]
