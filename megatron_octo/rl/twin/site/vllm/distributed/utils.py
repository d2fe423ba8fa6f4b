"""Names of vllm.distributed.utils: the little group through which the trainer hands weights to the engine."""

from datetime import timedelta

_PATIENCE = timedelta(minutes=5)


class StatelessProcessGroup:
    """A numbered exchange of byte strings over torch's TCP store; rank 0 holds the store."""

    def __init__(self, store, rank, world_size):
        self.store, self.rank, self.world_size, self._count = store, rank, world_size, 0

    @classmethod
    def create(cls, host, port, rank, world_size):
        """Join the group; returns when the store answers."""
        from torch.distributed import TCPStore

        return cls(TCPStore(host, port, world_size, rank == 0, _PATIENCE), rank, world_size)

    def broadcast(self, data, src):
        """Hand the bytes of rank `src` to all; the last round's are dropped, everyone has read them by then."""
        self._count += 1
        if self.rank == src:
            self.store.set(f"weights/{self._count}", data)
            if self._count > 1:
                self.store.delete_key(f"weights/{self._count - 1}")
            return data
        return self.store.get(f"weights/{self._count}")
