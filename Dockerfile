# docker build --tag=dlmctl .
# For the CPU: docker build --tag=dlmctl --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu .
FROM python:3.11-slim

# torch from PyPI brings CUDA's libraries; the host has the driver. Triton compiles with gcc.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

ARG PIP_EXTRA_INDEX_URL=
RUN --mount=type=bind,target=/source,rw \
    pip install --no-cache-dir "/source[all]"

ENV HF_HOME=/cache
WORKDIR /work
ENTRYPOINT ["dlmctl"]
