"""Checks of this machine that need no torch: Python, packages, processor, memory, proxies, open files."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from ruyi_flow import __version__
from ruyi_flow.doctor.checks import Check, Group, Mark

__all__ = [
    "machine_checks",
    "open_files_checks",
    "package_checks",
    "processor_check",
    "processor_features",
    "proxy_checks",
    "python_check",
]

_LOW_MEMORY = 500e6
"""Free memory in bytes below which not even a node of the demo family starts (docs/log.md: 378 to 647 MB resident)."""

_FEW_FILES = 1024
"""Open files that a process should be allowed; macOS allows 256."""

_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")


def machine_checks() -> list[Check]:
    """Return the checks of this machine, except those that torch answers."""
    processor = processor_check(processor_features(), platform.machine())
    return [python_check(), *package_checks(), processor, _memory(), *open_files_checks(), *proxy_checks()]


def _check(name: str, mark: Mark, text: str, fix: str = "") -> Check:
    return Check(Group.MACHINE, name, mark, text, fix)


def python_check() -> Check:
    """Compare the running Python with the versions that ruyi-flow supports."""
    running = platform.python_version()
    text = f"Python {running} on {platform.system()} {platform.machine()}"
    try:
        own = metadata.metadata("ruyi-flow")
        allowed = own["Requires-Python"] if "Requires-Python" in own else ""
    except metadata.PackageNotFoundError:
        allowed = ""
    if SpecifierSet(allowed).contains(running, prereleases=True):
        return _check("python", Mark.OK, f"{text}.")
    return _check(
        "python",
        Mark.FAILED,
        f"{text} is not supported: ruyi-flow {__version__} needs Python {allowed}.",
        f"install a Python that is {allowed}, and ruyi-flow with it",
    )


def package_checks() -> list[Check]:
    """Compare the installed packages with what ruyi-flow requires of a client, and of a machine that runs nodes."""
    try:
        required = [Requirement(text) for text in metadata.requires("ruyi-flow") or ()]
    except metadata.PackageNotFoundError:
        text = f"ruyi-flow {__version__} runs from a folder and is not installed, so its packages are not known."
        return [_check("packages", Mark.WARNING, text, "install it: pip install -e FOLDER")]
    base = [r for r in required if r.marker is None or r.marker.evaluate({"extra": ""})]
    node = [r for r in required if r not in base and r.marker is not None and r.marker.evaluate({"extra": "node"})]
    checks = []
    if wrong := [r for r in base if _problem(r)]:
        text = f"ruyi-flow {__version__}: {'; '.join(map(_problem, wrong))}."
        fix = "pip install --upgrade " + " ".join(f"'{r.name}{r.specifier}'" for r in wrong)
        checks.append(_check("packages", Mark.FAILED, text, fix))
    else:
        text = f"ruyi-flow {__version__}: all {len(base)} packages that it requires are here."
        checks.append(_check("packages", Mark.OK, text))
    if not node:
        return checks
    if missing := [r.name for r in node if not _version(r.name)]:
        text = f"This machine can be a client, but it cannot run a node: it does not have {', '.join(missing)}."
        checks.append(_check("node packages", Mark.WARNING, text, "to run a node here: pip install 'ruyi-flow[node]'"))
    elif wrong := [r for r in node if _problem(r)]:
        text = f"This machine cannot run a node: {'; '.join(map(_problem, wrong))}."
        checks.append(_check("node packages", Mark.FAILED, text, "pip install --upgrade 'ruyi-flow[node]'"))
    else:
        checks.append(_check("node packages", Mark.OK, f"The {len(node)} packages that a node needs are here."))
    return checks


def _version(package: str) -> str:
    """Return the installed version of a package, or the empty string."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _problem(requirement: Requirement) -> str:
    """Return what is wrong with an installed package, or the empty string."""
    found = _version(requirement.name)
    if not found:
        return f"package {requirement.name} is missing"
    if not requirement.specifier.contains(found, prereleases=True):
        return f"package {requirement.name} is {found}, but {requirement.specifier} is required"
    return ""


def processor_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """Return the names of the processor's features as Linux gives them; empty where the system gives none."""
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        return set()
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):  # x86; ARM
            return set(value.split())
    return set()


def processor_check(found: set[str], machine: str) -> Check:
    """Say in words what a processor's features mean for torch.

    Args:
        found: names of its features, as `processor_features` gives them.
        machine: its architecture: x86_64, aarch64.
    """
    cores = f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else psutil.cpu_count() or 1} cores"
    if machine.lower() not in ("x86_64", "amd64") or not found:
        named = sorted(found & {"asimd", "sve", "bf16", "i8mm"})
        return _check("processor", Mark.OK, f"{cores}, {machine}{' with ' + ', '.join(named) if named else ''}.")
    if "avx2" not in found:
        return _check(
            "processor",
            Mark.WARNING,
            f"{cores} without AVX2, for which torch's products are not written.",
            "run nodes on another machine; this one can be a client",
        )
    if "avx512f" not in found:
        return _check(
            "processor",
            Mark.OK,
            f"{cores} with AVX2 and without AVX-512. There are no products in bfloat16: such weights are widened to "
            "float32. The demo family took 26.1 ms a token on such a processor, and 19.6 ms on one with AVX-512 "
            "(docs/log.md).",
        )
    more = [name for flag, name in (("avx512_bf16", "bfloat16 instructions"), ("amx_bf16", "AMX")) if flag in found]
    rest = f"with AVX-512, {' and '.join(more)}" if more else "with AVX-512"
    return _check("processor", Mark.OK, f"{cores} {rest}.")


def _memory() -> Check:
    memory = psutil.virtual_memory()
    text = f"{memory.available / 1e9:.1f} GB of {memory.total / 1e9:.1f} GB of memory are free."
    if memory.available >= _LOW_MEMORY:
        return _check("memory", Mark.OK, text)
    return _check("memory", Mark.WARNING, text, "end other programs before you run a node here")


def open_files_checks() -> list[Check]:
    """Look at the number of files and connections that a process may have open."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= _FEW_FILES:
        return [
            _check("open files", Mark.OK, f"A process may open {'any number of' if soft < 0 else f'{soft:,}'} files.")
        ]
    most = _FEW_FILES if hard == resource.RLIM_INFINITY else min(hard, _FEW_FILES)
    text = f"A process may open {soft} files only, and every session and connection of a node is one."
    return [_check("open files", Mark.WARNING, text, f"ulimit -n {most}")]


def proxy_checks() -> list[Check]:
    """Name the proxies that are set for this process, without their addresses, which may contain a password."""
    named = [name for name in os.environ if name.lower() in _PROXIES and os.environ[name]]
    if not named:
        return []
    text = f"{', '.join(named)} is set. Clients and nodes connect directly; only ruyi-flow pull uses the proxy."
    return [_check("proxies", Mark.OK, text)]
