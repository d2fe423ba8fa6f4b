"""Stands in for flash-attention on a CPU: the names OpenRLHF imports; calling one is refused."""

__version__ = "2.8.3"


def absent(*_, **__):
    """Refuse: the CPU twin runs without packing and never comes here."""
    raise RuntimeError("flash-attention is not available in the CPU twin")
