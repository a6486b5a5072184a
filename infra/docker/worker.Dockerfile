# A worker for one device. Build from the repository's root:
#   docker build -f infra/docker/worker.Dockerfile -t calotype-worker:0.1.0 .
# for CUDA, whose libraries come with torch and whose driver is the host's; and for CPUs, at a tenth of the size:
#   docker build -f infra/docker/worker.Dockerfile -t calotype-worker:0.1.0-cpu \
#     --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .
ARG PYTHON=3.12.15-slim-trixie

FROM python:${PYTHON} AS build
WORKDIR /src
# Torch first, in a layer that a change of our own code leaves alone.
COPY constraints.txt .
ARG TORCH_INDEX=
RUN python -m venv --without-pip /venv \
 && pip --python /venv/bin/python install --no-cache-dir -c constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
COPY . .
RUN pip --python /venv/bin/python install --no-cache-dir -c constraints.txt ".[worker]" \
 && /venv/bin/python -m calotype_worker --help > /dev/null

FROM python:${PYTHON}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="calotype-worker" \
      org.opencontainers.image.description="Worker of Calotype, a job queue for diffusion models" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0 AND GPL-2.0-or-later"
# CALOTYPE_WORKER_COMPILE needs a compiler where it runs. Whoever never compiles builds with --build-arg COMPILER= .
ARG COMPILER=g++
# hadolint ignore=DL3008 # Debian keeps one version of it in a release
RUN if [ -n "$COMPILER" ]; then \
      apt-get update && apt-get install --no-install-recommends -y "$COMPILER" && rm -rf /var/lib/apt/lists/*; \
    fi
# A new volume gets the owner that its folder has here.
RUN groupadd --gid 10001 calotype \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin calotype \
 && install -d -o 10001 -g 10001 -m 700 /spool /cache
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HF_HOME=/cache/hub \
    CALOTYPE_WORKER_SPOOL_DIR=/spool \
    CALOTYPE_WORKER_COMPILE_CACHE=/cache/compiled
USER 10001:10001
VOLUME ["/spool", "/cache"]
EXPOSE 9464
HEALTHCHECK --interval=15s --timeout=5s --start-period=10m --start-interval=2s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9464/readyz', timeout=4)"]
# Exec form: `calotype worker` becomes the worker itself, which as process 1 gets SIGTERM.
ENTRYPOINT ["calotype", "worker"]
