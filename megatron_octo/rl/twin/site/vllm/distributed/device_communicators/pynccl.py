"""Names of pynccl: the tensor side of the weight hand-over, without NCCL."""


class PyNcclCommunicator:
    """Broadcasts tensors through a `StatelessProcessGroup`."""

    def __init__(self, group, device=None, **_):
        self.group = group

    def broadcast(self, tensor, src, stream=None):
        """Overwrite `tensor` with rank `src`'s."""
        import torch

        if self.group.rank == src:
            flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
            self.group.broadcast(flat.numpy().tobytes(), src)
        else:
            data = bytearray(self.group.broadcast(None, src))
            tensor.copy_(torch.frombuffer(data, dtype=tensor.dtype).view(tensor.shape))
