"""Names of vllm.inputs."""


def TokensPrompt(**fields):  # noqa: N802
    """A prompt as a plain dictionary, as in vLLM."""
    return dict(fields)
