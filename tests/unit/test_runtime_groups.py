"""Meeting the other processes: what is refused, and how it is said. No second process is needed."""

from __future__ import annotations

import socket

import pytest

from megatron_octo.config.layout import ParallelConfig
from megatron_octo.errors import ConfigError, EnvironmentProblem
from megatron_octo.runtime import groups

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def torchrun(monkeypatch):
    def set_variables(**variables: object) -> None:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    set_variables()
    yield set_variables
    groups.shutdown()


def test_a_world_of_another_size_is_refused(torchrun):
    torchrun(RANK=0, WORLD_SIZE=3, MASTER_ADDR="127.0.0.1", MASTER_PORT=1)
    with pytest.raises(ConfigError, match="TP2 needs 2 processes, 3 were started.*--nproc 2"):
        groups.initialize(ParallelConfig(tensor=2), seed=0)


def test_without_torchrun_one_process_cannot_be_two(torchrun):
    with pytest.raises(ConfigError, match="1 were started"):
        groups.initialize(ParallelConfig(data=2), seed=0)


def test_a_process_without_a_gpu_of_its_own_is_refused(torchrun):
    torchrun(LOCAL_RANK=1)
    assert groups._local_device(2) == 1
    with pytest.raises(EnvironmentProblem, match="local rank 1 has no GPU: this machine shows 1"):
        groups._local_device(1)


def test_a_port_in_use_is_named(torchrun):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        torchrun(RANK=0, WORLD_SIZE=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        with pytest.raises(EnvironmentProblem, match=f"127.0.0.1:{port}"):
            groups.initialize(ParallelConfig(), seed=0, timeout_minutes=0.05)


def test_a_missing_variable_is_named(torchrun):
    torchrun(WORLD_SIZE=1, RANK=0)
    with pytest.raises(EnvironmentProblem, match="MASTER_ADDR, MASTER_PORT"):
        groups.initialize(ParallelConfig(), seed=0)


def test_others_that_do_not_come_are_an_error_not_a_hang(torchrun):
    torchrun(RANK=0, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port())
    with pytest.raises(EnvironmentProblem, match="rank 0 cannot meet the others"):
        groups.initialize(ParallelConfig(data=2), seed=0, timeout_minutes=0.02)


def test_a_single_process_world_ignores_torchrun_and_seeds_everything(torchrun):
    import random

    import numpy
    import torch

    torchrun(RANK=1, WORLD_SIZE=2, MASTER_ADDR="nowhere.invalid", MASTER_PORT=1)
    drawn = []
    for _ in range(2):
        runtime = groups.initialize_single(seed=7)
        assert (runtime.rank, runtime.world_size, runtime.data_size, runtime.pipeline_size) == (0, 1, 1, 1)
        assert runtime.is_first_stage and runtime.is_last_stage and runtime.is_reporter
        drawn.append((random.random(), numpy.random.rand(), torch.rand(1).item()))
        groups.shutdown()
    assert drawn[0] == drawn[1]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
