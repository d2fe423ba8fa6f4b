# Targets:
#   cpu   the two commands of the README on a bare machine:  docker build --target cpu -t megatron_octo:cpu .
#           docker run --name demo megatron_octo:cpu && docker cp demo:/octo/runs .    the demo and its report
#           docker start --attach demo                                                 goes on after an interruption
#           docker run --rm megatron_octo:cpu bash tools/test.sh                       the tests
#   gpu   training on NVIDIA GPUs:                            docker build --target gpu -t megatron_octo:gpu .
ARG PYTHON_IMAGE=python:3.11-slim-bookworm
ARG CUDA_IMAGE=nvcr.io/nvidia/pytorch:25.12-py3

FROM ${PYTHON_IMAGE} AS cpu
RUN apt-get update && apt-get install -y --no-install-recommends git g++ && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home octo
WORKDIR /octo
RUN chown octo /octo
USER octo
# The environment first: it changes only with requirements.txt.
COPY --chown=octo requirements.txt pyproject.toml README.md ./
COPY --chown=octo megatron_octo/__init__.py megatron_octo/__init__.py
COPY --chown=octo tools/env.sh tools/env.sh
RUN bash -c 'source tools/env.sh'
COPY --chown=octo . .
CMD ["bash", "tools/demo.sh", "--out", "runs/demo"]

# The base brings torch, CUDA, TransformerEngine and NVIDIA's apex, built for each other; only what it lacks is added,
# so our torch pin does not apply here, and of the base's own pins (PIP_CONSTRAINT) only torch's stays. Never built or
# run by the project's own tests: there is no GPU in CI. A base whose TransformerEngine megatron-core does not work with
# ends the build here, with the reason.
FROM ${CUDA_IMAGE} AS gpu
WORKDIR /octo
COPY requirements.txt pyproject.toml README.md ./
RUN grep -v '^torch==' requirements.txt > /tmp/gpu-requirements.txt \
    && python -c "import torch; print('torch==' + torch.__version__)" > /tmp/keep-torch.txt \
    && PIP_CONSTRAINT=/tmp/keep-torch.txt pip install --no-cache-dir -r /tmp/gpu-requirements.txt
COPY . .
RUN pip install --no-cache-dir --no-deps -e . \
    && python -c "import transformer_engine.pytorch, megatron.core, megatron_octo" \
    && python -c "from megatron_octo.runtime.accelerator import look, te_problem; from dataclasses import replace; \
problem = te_problem(replace(look(load=False), gpus=1)); assert problem is None, problem"
CMD ["bash", "launch/torchrun.sh"]
