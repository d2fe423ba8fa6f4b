"""The engine: collects the requests of a rollout, decodes them together, takes new weights between rollouts."""

import asyncio
import importlib
from dataclasses import dataclass
from types import SimpleNamespace

_MOST_TOGETHER = 256
_QUIET_SECONDS = 0.01
"""A batch starts when no request has come for so long."""


@dataclass
class SamplingParams:
    """How to draw; the fields OpenRLHF sets, by vLLM's names."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    max_tokens: int | None = None
    min_tokens: int = 0
    skip_special_tokens: bool = True
    logprobs: int | None = None

    def __post_init__(self):
        if self.top_p != 1.0 or self.top_k != -1 or self.logprobs is not None:
            raise NotImplementedError("the CPU twin draws from the whole distribution and keeps no log-probabilities")

    @property
    def kind(self):
        """What requests must share to be decoded together."""
        return (self.temperature, self.max_tokens)


class AsyncEngineArgs:
    """Keeps what it is given."""

    def __init__(self, **settings):
        self.__dict__.update(settings)


class AsyncLLMEngine:
    """vLLM's asynchronous engine as far as OpenRLHF knows it.

    OpenRLHF's own worker extension runs inside, so the weight hand-over is its code and not ours.
    """

    @classmethod
    def from_engine_args(cls, settings):
        """Load the model."""
        return cls(settings)

    def __init__(self, settings):
        from megatron_octo.rl.twin.decode import Decoder

        self._decoder = Decoder(settings.model, settings.seed)
        self._worker = _worker(settings.worker_extension_cls, self._decoder)
        self._waiting, self._unfinished, self._task = [], 0, None
        self.output_processor = SimpleNamespace(get_num_unfinished_requests=lambda: self._unfinished)

    async def generate(self, prompt, params, request_id):
        """Answer one request; yields once, the whole answer."""
        answer = asyncio.get_running_loop().create_future()
        self._waiting.append((list(prompt["prompt_token_ids"]), params, answer))
        self._unfinished += 1
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work())
        try:
            yield await answer
        finally:
            self._unfinished -= 1

    async def _work(self):
        while self._waiting:
            await self._quiet()
            kind = self._waiting[0][1].kind
            batch = [request for request in self._waiting if request[1].kind == kind][:_MOST_TOGETHER]
            taken = {id(request) for request in batch}
            self._waiting = [request for request in self._waiting if id(request) not in taken]
            try:
                outputs = await asyncio.to_thread(self._decode, batch)
            except Exception as error:
                outputs = [error] * len(batch)
            for (_, _, answer), output in zip(batch, outputs, strict=True):
                if isinstance(output, Exception):
                    answer.set_exception(output)
                else:
                    answer.set_result(output)

    async def _quiet(self):
        seen = -1
        while seen < len(self._waiting) < _MOST_TOGETHER:
            seen = len(self._waiting)
            await asyncio.sleep(_QUIET_SECONDS)

    def _decode(self, batch):
        _, params, _ = batch[0]
        prompts = [tokens for tokens, _, _ in batch]
        return [_output(one) for one in self._decoder.generate(prompts, params.max_tokens, params.temperature)]

    async def collective_rpc(self, name, args=()):
        """Call a method of the worker extension."""
        return [await asyncio.to_thread(getattr(self._worker, name), *args)]

    async def is_sleeping(self):
        """Never."""
        return False

    async def reset_prefix_cache(self):
        """There is none."""

    async def sleep(self, level=1):
        """No memory to free."""

    async def wake_up(self, tags=None):
        """Always awake."""

    async def pause_generation(self, mode=None):
        """Weights come only between rollouts."""

    async def resume_generation(self):
        """See `pause_generation`."""


def _worker(extension, decoder):
    """OpenRLHF's worker extension with what it finds around itself inside vLLM."""
    import torch
    import torch.distributed as dist

    module, name = extension.rsplit(".", 1)
    worker = getattr(importlib.import_module(module), name)()
    worker.device = torch.device("cpu")
    worker.model_config = SimpleNamespace(dtype=decoder.dtype)
    worker.model_runner = SimpleNamespace(model=decoder)
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return worker


def _output(response):
    reason = "stop" if response.stopped else "length"
    one = SimpleNamespace(token_ids=response.tokens, finish_reason=reason, logprobs=None)
    return SimpleNamespace(outputs=[one])
