"""What a device offers: the one place that decides which of torch's kernels run there.

Builds of torch differ. Those for Apple Silicon have no oneDNN, older GPUs have no product with 4-bit weights, and few
GPUs for laptops have float64. Where something is missing, the plain operation runs.
"""

from __future__ import annotations

from functools import cache

import torch

from ruyi_flow.errors import ConfigError

__all__ = ["find_device", "has_float64", "has_int4", "has_onednn", "lacks_bfloat16"]

_ACCELERATORS = ("cuda", "xpu", "mps")
"""Types of devices that are supported beside the CPU: NVIDIA's and AMD's GPUs, Intel's, and Apple's."""


def find_device(name: str, where: str) -> torch.device:
    """Return a torch device that can be used.

    Args:
        name: the device: cpu, cuda, cuda:1, mps, xpu.
        where: where it was named, for the error message.

    Raises:
        ConfigError: the device cannot be used here.
    """
    try:
        device = torch.device(name)
        if device.type not in ("cpu", *_ACCELERATORS):
            raise RuntimeError(f"known are cpu, {', '.join(_ACCELERATORS)}")
        torch.empty(0, device=device)
    except NotImplementedError:  # torch's own message lists all its operators
        reason = f"this build of torch ({torch.__version__}) lacks it"
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        reason = str(error).splitlines()[0].removesuffix(".")
    else:
        return device
    raise ConfigError(f"{where}: {name!r} cannot be used here: {reason}; torch finds {', '.join(_usable())}")


def _usable() -> list[str]:
    """List the devices that torch finds on this machine."""
    found = ["cpu"]
    for kind in _ACCELERATORS:
        module = torch.get_device_module(kind)
        if module.is_available():
            found += [kind, *(f"{kind}:{i}" for i in range(1, module.device_count()))]
    return found


@cache
def has_onednn() -> bool:
    """Whether oneDNN's products run in this build of torch, which is tried once; builds for Apple Silicon lack them."""
    if not torch.backends.mkldnn.is_available():
        return False
    x = torch.ones(1, 8)
    try:
        weight = torch.ops.mkldnn._reorder_linear_weight(torch.ones(8, 8), 1)
        torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    except (AttributeError, RuntimeError):
        return False
    return True


def lacks_bfloat16(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch has no bfloat16 products for this processor, as without AVX-512 or in builds without oneDNN."""
    if dtype is not torch.bfloat16 or device.type != "cpu":
        return False
    return not (has_onednn() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def has_int4(device: torch.device) -> bool:
    """Whether torch's products with 4-bit weights run on a device; elsewhere such weights are dequantized on loading.

    MPS and XPU have such products too, in layouts of their own that nobody has tried here.
    """
    if device.type == "cpu":
        return hasattr(torch, "_weight_int4pack_mm_for_cpu") and hasattr(torch, "_convert_weight_to_int4pack_for_cpu")
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8


def has_float64(device: torch.device) -> bool:
    """Whether a device surely computes in float64: Apple's GPUs do not, and few of Intel's do."""
    return device.type in ("cpu", "cuda")
