"""What this machine's accelerator can do, and why it cannot do what a run asks for.

`look` gathers the facts; everything else decides from them alone, so that every refusal can be tested on any machine.
A refusal names what was asked for, the fact in its way, and the way out.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from megatron_octo.config.run import RunConfig
from megatron_octo.errors import EnvironmentProblem

Layers = Literal["local", "transformer_engine"]
Adam = Literal["transformer_engine", "apex", "torch"]

_TE_RANGE = ((2, 9), (2, 12))  # megatron-core 0.16.1: transformer-engine >= 2.9, < 2.12
_HOPPER = (9, 0)
_BLOCKWISE_CUDA = (12, 9)  # TransformerEngine's check_fp8_block_scaling_support
_INSTALL_TE = "pip install 'transformer-engine[pytorch]==2.11.0', or use the image of the Dockerfile's gpu target"


@dataclass(frozen=True)
class Machine:
    """Facts about a machine.

    Args:
        gpus: CUDA devices that torch sees.
        capability: lowest compute capability among them, (major, minor).
        cuda: CUDA version torch was built with, (major, minor).
        transformer_engine: its version, or None if it is not installed.
        te_fault: why its PyTorch part does not load, if that was tried and failed.
        apex: "nvidia" with its kernels, "unbuilt" without them, "impostor" for the unrelated project that PyPI
            holds under this name, or None.
    """

    gpus: int = 0
    capability: tuple[int, int] = (0, 0)
    cuda: tuple[int, int] = (0, 0)
    transformer_engine: str | None = None
    te_fault: str | None = None
    apex: Literal["nvidia", "unbuilt", "impostor"] | None = None


def look(load: bool = True) -> Machine:
    """Gather this machine's facts.

    Args:
        load: import TransformerEngine where there is a GPU, to know that it loads. Leave it out in a process that
            only starts others.
    """
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    version = _version("transformer-engine") if importlib.util.find_spec("transformer_engine") else None
    return Machine(
        gpus=gpus,
        capability=min((torch.cuda.get_device_capability(number) for number in range(gpus)), default=(0, 0)),
        cuda=_pair(torch.version.cuda or ""),
        transformer_engine=version,
        te_fault=_te_fault() if load and gpus and version is not None else None,
        apex=_apex(),
    )


def asks_for_accelerator(run: RunConfig) -> bool:
    """Whether a run names anything that not every machine has. Needs no torch."""
    return (
        run.fp8 is not None
        or run.parallel.tp_comm_overlap
        or run.transformer_impl == "transformer_engine"
        or run.optimizer.implementation in ("transformer_engine", "apex")
    )


def check(run: RunConfig, machine: Machine) -> None:
    """Refuse a run whose layers, precision or optimizer this machine does not have.

    Raises:
        EnvironmentProblem: what is missing, for which field.
    """
    choose_layers(run, machine)
    choose_optimizer(run, machine)


def choose_layers(run: RunConfig, machine: Machine) -> Layers:
    """Whose layers a run has here.

    Raises:
        EnvironmentProblem: it asks for TransformerEngine's, itself or by FP8 or its overlap, and they cannot run.
    """
    fault = te_problem(machine)
    if run.fp8 is not None:
        _refuse("fp8", fault or _fp8_problem(run.fp8.recipe, machine))
    if run.parallel.tp_comm_overlap:
        _refuse("parallel.tp_comm_overlap", fault)
    if run.transformer_impl == "transformer_engine":
        _refuse("transformer_impl: transformer_engine", fault)
    return "local" if run.transformer_impl == "local" or fault else "transformer_engine"


def choose_optimizer(run: RunConfig, machine: Machine) -> Adam:
    """Whose AdamW a run uses here: TransformerEngine's fused one, else NVIDIA apex's, else torch's.

    Raises:
        EnvironmentProblem: it names one that is not here.
    """
    asked = run.optimizer.implementation
    faults = {"transformer_engine": te_problem(machine), "apex": apex_problem(machine), "torch": None}
    if asked != "auto":
        _refuse(f"optimizer.implementation: {asked}", faults[asked])
        return asked
    return next(name for name, fault in faults.items() if fault is None)


def te_problem(machine: Machine) -> tuple[str, str] | None:
    """Why TransformerEngine cannot be used, and what to do about it; None if it can."""
    if not machine.gpus:
        return _no_gpu("TransformerEngine")
    if machine.transformer_engine is None:
        return "TransformerEngine is not installed", _INSTALL_TE
    low, high = _TE_RANGE
    if not low <= _pair(machine.transformer_engine) < high:
        return (
            f"TransformerEngine {machine.transformer_engine} is installed and megatron-core 0.16.1 works with "
            f">= {_dotted(low)}, < {_dotted(high)}",
            _INSTALL_TE,
        )
    if machine.te_fault is not None:
        return f"TransformerEngine {machine.transformer_engine} does not load ({machine.te_fault})", _INSTALL_TE
    return None


def apex_problem(machine: Machine) -> tuple[str, str] | None:
    """Why NVIDIA's apex cannot be used, and what to do about it; None if it can."""
    build = "build NVIDIA's apex from its repository, or use the image of the Dockerfile's gpu target"
    if not machine.gpus:
        return _no_gpu("apex's fused Adam")
    if machine.apex is None:
        return "NVIDIA's apex is not installed", build
    if machine.apex == "impostor":
        return (
            "the installed package `apex` is not NVIDIA's (it has no apex.optimizers.FusedAdam): PyPI holds an "
            "unrelated project under this name",
            f"pip uninstall apex, then {build}",
        )
    if machine.apex == "unbuilt":
        return "NVIDIA's apex is installed without its CUDA kernels (no module amp_C)", build
    return None


def notes(run: RunConfig, machine: Machine) -> list[str]:
    """What a user of a GPU should know about choices made for them: a line each."""
    if not machine.gpus:
        return []
    said = []
    if run.transformer_impl == "auto" and (fault := te_problem(machine)):
        said.append(f"layers are the local ones: {fault[0]}; to have TransformerEngine's: {fault[1]}")
    if machine.apex == "impostor":
        said.append(" ".join(("apex:", *apex_problem(machine)[:1])))
    return said


def _fp8_problem(recipe: str, machine: Machine) -> tuple[str, str] | None:
    if machine.capability < _HOPPER:
        return (
            f"a GPU here has compute capability {_dotted(machine.capability)} and FP8 training needs "
            f"{_dotted(_HOPPER)} (Hopper) or newer",
            "train on H100 or newer, or remove fp8: the run is then in BF16",
        )
    if recipe == "blockwise" and machine.cuda < _BLOCKWISE_CUDA:
        return (
            f"torch here is built for CUDA {_dotted(machine.cuda)} and block-scaled products need "
            f"{_dotted(_BLOCKWISE_CUDA)} or newer",
            "use fp8.recipe tensorwise or delayed, or a newer CUDA build of torch",
        )
    return None


def _refuse(field: str, problem: tuple[str, str] | None) -> None:
    if problem is not None:
        reason, fix = problem
        raise EnvironmentProblem(f"{field} cannot run on this machine", reason, fix)


def _no_gpu(what: str) -> tuple[str, str]:
    return f"{what} needs an NVIDIA GPU and torch sees none", "run on a machine with one, or remove the field"


def _te_fault() -> str | None:
    try:
        import transformer_engine.pytorch  # noqa: F401
    except Exception as error:  # a missing library, an extension for another torch, an old driver
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


def _apex() -> Literal["nvidia", "unbuilt", "impostor"] | None:
    """Tell NVIDIA's apex from others by what it holds, without importing it."""
    found = importlib.util.find_spec("apex")
    if found is None:
        return None
    places = [Path(place) for place in found.submodule_search_locations or []]
    if not any((place / "optimizers" / "fused_adam.py").is_file() for place in places):
        return "impostor"
    return "nvidia" if importlib.util.find_spec("amp_C") else "unbuilt"


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "of unknown version"


def _pair(version: str) -> tuple[int, int]:
    """(major, minor) of a version; (0, 0) if it has none."""
    parts = version.split(".")[:2]
    return (int(parts[0]), int(parts[1])) if len(parts) == 2 and all(part.isdigit() for part in parts) else (0, 0)


def _dotted(pair: tuple[int, int]) -> str:
    return ".".join(map(str, pair))
