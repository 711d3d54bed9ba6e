# emadapt for machines with an NVIDIA GPU: the driver comes from the host (NVIDIA Container Toolkit), CUDA from torch's
# wheels. For machines without one: --build-arg TORCH=cpu. The project (a git checkout) is mounted at /project, weights are kept in /cache. See docs/how-to.md.
FROM python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b

# Who owns what the container writes into the mounted checkout: make it your own `id -u` and `id -g`.
ARG UID=1000
ARG GID=1000

# git: DVC and the commit that is recorded on every run. tini: an init, or stopped runs leave stale DVC locks behind.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git tini \
    && rm -rf /var/lib/apt/lists/* \
    && git config --system --add safe.directory /project \
    && groupadd --non-unique --gid "${GID}" emadapt \
    && useradd --non-unique --uid "${UID}" --gid "${GID}" --create-home emadapt \
    && install --directory --owner="${UID}" --group="${GID}" /project /cache /mlartifacts

ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore

# The large layers depend on the locks alone, which are complete: there is nothing to resolve.
ARG TORCH=gpu
WORKDIR /opt/emadapt
COPY requirements.lock requirements-gpu.lock requirements-cpu.lock ./
RUN pip install --no-deps --requirement "requirements-${TORCH}.lock" \
    && pip install --no-deps --require-hashes --requirement requirements.lock

COPY pyproject.toml README.md LICENSE dvc.yaml .gitignore .dvcignore ./
COPY studies ./studies
COPY src ./src
RUN pip install --no-deps --no-build-isolation .

# PYTHONPATH: the code of the mounted checkout goes before the image's copy, so the recorded commit is the code that ran.
ENV PYTHONPATH=/project/src \
    HF_HOME=/cache/huggingface \
    XDG_CACHE_HOME=/cache \
    DVC_NO_ANALYTICS=1 \
    MLFLOW_DISABLE_TELEMETRY=true \
    MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false \
    NO_ALBUMENTATIONS_UPDATE=1 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

# /project: the checkout with data/, the DVC cache, build/, scratch/, reports/ and, without a server, MLflow's runs.
# /cache: weights. /mlartifacts: what the tracking server of compose.yaml stores.
VOLUME ["/project", "/cache", "/mlartifacts"]
WORKDIR /project
USER ${UID}:${GID}

# No HEALTHCHECK: the container runs jobs; the tracking server's check is in compose.yaml.
# -g: a stop reaches the children that DVC starts, too. -s: works under `docker run --init` as well.
ENTRYPOINT ["tini", "-s", "-g", "--"]
CMD ["emadapt", "--help"]
