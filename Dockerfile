# Two images: `server` for API, dispatcher and migrations, which need no PyTorch; and `worker`, which has all, so that
# `timetuner up` can run everything in one container. PyTorch as requirements/worker.lock pins it runs on the CPU
# and, where the container is given one (`--gpus all`), on an NVIDIA GPU.
#
#   docker build --target server -t timetuner-server . && docker build --target worker -t timetuner-worker .
#
# The base is Debian 12 with Python 3.11, in the version that the digest names; docs/containers.md says how to renew it.
ARG PYTHON=docker.io/library/python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b
FROM ${PYTHON} AS pip
RUN python -m venv /opt/pip
ENV PATH=/opt/pip/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

FROM pip AS wheel
WORKDIR /src
COPY requirements/build.lock requirements/
RUN pip install --require-hashes -r requirements/build.lock
COPY pyproject.toml README.md LICENSE timetuner.py ./
COPY service service
COPY worker worker
COPY timetuner_core timetuner_core
COPY migrations migrations
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /wheels .

FROM pip AS server-packages
RUN python -m venv --without-pip /opt/timetuner
# First what seldom changes.
COPY requirements/server.lock /tmp/
RUN pip --python /opt/timetuner/bin/python install --require-hashes -r /tmp/server.lock
COPY --from=wheel /wheels /wheels
RUN pip --python /opt/timetuner/bin/python install --no-deps /wheels/*.whl

FROM ${PYTHON} AS confined
# Nothing of the image need be written to: state is in /data, caches of libraries in /tmp.
RUN useradd --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin timetuner \
    && install -d -o timetuner -g timetuner /data /data/tmp
ENV PATH=/opt/timetuner/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONSAFEPATH=1 \
    TIMETUNER_HOME=/data TMPDIR=/data/tmp HOME=/tmp XDG_CACHE_HOME=/tmp MPLCONFIGDIR=/tmp \
    HF_HUB_OFFLINE=1 LOG_LEVEL=info
USER 10001:10001
WORKDIR /data
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import httpx; httpx.get('http://127.0.0.1:8000/healthz').raise_for_status()"]

FROM confined AS server
COPY --from=server-packages /opt/timetuner /opt/timetuner
CMD ["timetuner", "api", "--host", "0.0.0.0"]

FROM pip AS worker-packages
RUN python -m venv --without-pip /opt/timetuner
COPY requirements/worker.lock /tmp/
RUN pip --python /opt/timetuner/bin/python install --require-hashes -r /tmp/worker.lock
COPY --from=wheel /wheels /wheels
RUN pip --python /opt/timetuner/bin/python install --no-deps /wheels/*.whl

FROM confined AS worker
COPY --from=worker-packages /opt/timetuner /opt/timetuner
# Everything in one container; docker-compose.yml has one per process. Requests need API keys, as the API does not listen
# on loopback: docker exec CONTAINER timetuner keys create --name admin --scope admin
CMD ["timetuner", "up", "--host", "0.0.0.0"]
