"""The work of a run per token, and what share of the hardware's peak a speed is."""

from __future__ import annotations

from typing import NamedTuple

from megatron_octo.config.run import RunConfig
from megatron_octo.files import write_json
from megatron_octo.model.facts import FLOPS_CONVENTION, flops_per_token
from megatron_octo.runtime.peak import device_name, peak_flops

FLOPS = "flops.json"


class Cost(NamedTuple):
    """What MFU is made of; its numerator and denominator are stored beside the metrics, so that nobody has to guess.

    Model FLOPs utilisation is that of PaLM (appendix B), with attention counted causal. Its denominator is the dense
    BF16 peak whatever the precision: with some matrix products in FP8 and some in BF16 a peak of the mixture is not
    defined, and against one fixed peak a faster run shows a higher number.

    Args:
        flops_per_token: of the model, forward and backward (`model.facts.flops_per_token`).
        device: name of one device.
        devices: of the run; one process each.
        peak: dense BF16 FLOP/s of one device; None where it is not known, as on a CPU.
    """

    flops_per_token: float
    device: str
    devices: int
    peak: float | None

    @classmethod
    def of(cls, run: RunConfig) -> Cost:
        """The cost of a run on the device of this process."""
        device = device_name()
        peak = peak_flops(device)
        flops = flops_per_token(run.model, run.data.sequence_length)
        return cls(flops, device, run.parallel.processes, peak.bf16 if peak else None)

    def rates(self, tokens_per_second: float) -> dict[str, float]:
        """`device_flops_per_second`, and `mfu` (0 to 1) where the peak is known, of a speed of the whole run."""
        flops = self.flops_per_token * tokens_per_second / self.devices
        rates = {"device_flops_per_second": float(f"{flops:.4g}")}
        return rates | ({"mfu": round(flops / self.peak, 5)} if self.peak else {})

    @property
    def text(self) -> str:
        """The convention behind `mfu` and `device_flops_per_second`, as a line for people."""
        if self.peak is None:
            return f"model FLOP/s of each process on {self.device}, {FLOPS_CONVENTION}; no MFU: its peak is not known"
        peak = f"{self.peak / 1e12:.0f} TFLOP/s BF16 dense of each {self.device}"
        return f"MFU: share of {peak}, {FLOPS_CONVENTION}"

    def write(self, run: RunConfig) -> None:
        """Store the convention in the run directory."""
        write_json(run.out / FLOPS, self._asdict() | {"convention": self.text})
