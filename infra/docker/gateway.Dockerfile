# The producer's side: the gateway, the dispatcher and every `calotype` command but the worker. No torch. Build from the
# repository's root:
#   docker build -f infra/docker/gateway.Dockerfile -t calotype-gateway:0.1.0 .
ARG PYTHON=3.12.15-slim-trixie

FROM python:${PYTHON} AS build
# hadolint ignore=DL3008 # only used here: what it leaves in the image is the same with any version
RUN apt-get update && apt-get install --no-install-recommends -y binutils && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN python -m venv --without-pip /venv \
 && pip --python /venv/bin/python install --no-cache-dir -c constraints.txt ".[gateway]"
# Out with what this side never uses: the worker and its model, the descriptions of Amazon's services other than storage
# and those that keys come from, and the symbols of compiled modules. 143 MB become 71.
WORKDIR /venv/lib/python3.12/site-packages
RUN rm -r calotype_worker \
 && find botocore/data -mindepth 1 -maxdepth 1 -type d \
    ! -name s3 ! -name sts ! -name sso ! -name sso-oidc ! -name signin -exec rm -r {} + \
 && find . -name "*.so*" -exec strip --strip-unneeded {} + \
 && /venv/bin/calotype version && /venv/bin/calotype gateway --help > /dev/null

FROM python:${PYTHON}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="calotype-gateway" \
      org.opencontainers.image.description="HTTP gateway, dispatcher and commands of Calotype, a job queue for diffusion models" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN groupadd --gid 10001 calotype \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin calotype
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
EXPOSE 8000 9465
HEALTHCHECK --interval=10s --timeout=5s --start-period=1m --start-interval=1s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9465/readyz', timeout=4)"]
# Exec form: it is process 1 and gets SIGTERM itself.
ENTRYPOINT ["calotype"]
CMD ["gateway"]
