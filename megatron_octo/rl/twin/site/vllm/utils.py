"""Names of vllm.utils."""

import uuid


def random_uuid() -> str:
    """A name for a request."""
    return uuid.uuid4().hex
