"""How fast a device can be at most: the denominator of MFU."""

from __future__ import annotations

import re
from typing import NamedTuple


class Peak(NamedTuple):
    """Dense tensor-core FLOP/s of one device, a multiply-add as two; `fp8` is None where it has none."""

    bf16: float
    fp8: float | None


_T = 1e12
_PEAKS = (
    (r"GB200", Peak(2500 * _T, 5000 * _T)),
    (r"B200", Peak(2250 * _T, 4500 * _T)),
    (r"H[12]00 NVL", Peak(835.5 * _T, 1671 * _T)),
    (r"H100 PCIe", Peak(756 * _T, 1513 * _T)),
    (r"H100|H200|GH200", Peak(989.4 * _T, 1978.9 * _T)),
    (r"A100", Peak(312 * _T, None)),
)


def peak_flops(device: str) -> Peak | None:
    """Look a device up by the name CUDA gives it, e.g. "NVIDIA H100 80GB HBM3".

    The figures are those of NVIDIA's data sheets, halved where a sheet counts structured sparsity: A100 (312 TFLOP/s
    BF16), H100 (SXM 989.4, PCIe 756, NVL 835.5; FP8 twice that), H200 (as H100 of the same form), HGX B200
    (2,250 a GPU), GB200 NVL72 (2,500 a GPU). They hold at the clock of the sheet: a card with a lower power limit
    cannot reach them.

    Args:
        device: name of the device.

    Returns:
        Its peaks; None for a device that is not in the table, and for a slice of one (MIG), whose share is not known.
    """
    if "MIG" in device:
        return None
    return next((peak for pattern, peak in _PEAKS if re.search(rf"\b(?:{pattern})\b", device)), None)


def device_name() -> str:
    """What this process computes on: CUDA's name of its GPU, or "CPU"."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
