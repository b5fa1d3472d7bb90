# One image for every process: API, dispatcher, workers. PyTorch as requirements.lock pins it runs on the CPU
# and, where the container is given one (`--gpus all`), on an NVIDIA GPU.
FROM python:3.11-slim AS build
WORKDIR /src
RUN python -m venv /opt/timetuner
ENV PATH=/opt/timetuner/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# First what seldom changes.
COPY requirements.lock .
RUN pip install --require-hashes -r requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY service service
COPY worker worker
COPY timetuner_core timetuner_core
COPY migrations migrations
RUN pip install --no-deps --no-build-isolation .

FROM python:3.11-slim
RUN useradd --uid 10001 --create-home timetuner && install -d -o timetuner /data
COPY --from=build /opt/timetuner /opt/timetuner
ENV PATH=/opt/timetuner/bin:$PATH PYTHONUNBUFFERED=1 TIMETUNER_HOME=/data
USER timetuner
WORKDIR /home/timetuner
VOLUME /data
EXPOSE 8000
# Everything in one container; docker-compose.yml has one per process. Requests need API keys, as the API does not listen
# on loopback: docker exec CONTAINER timetuner keys create --name admin --scope admin
CMD ["timetuner", "up", "--host", "0.0.0.0"]
