# A worker for one device. Build from the repository's root:
#   docker build -f infra/docker/worker.Dockerfile -t calotype-worker .
FROM python:3.12-slim AS build
COPY . /src
RUN python -m venv /venv \
 && /venv/bin/pip install --no-cache-dir -c /src/constraints.txt "/src[worker]"

FROM python:3.12-slim
RUN useradd --create-home --uid 10001 calotype
COPY --from=build /venv /venv
USER calotype
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1
# Exec form: the worker is process 1 and gets SIGTERM itself.
ENTRYPOINT ["calotype", "worker"]
