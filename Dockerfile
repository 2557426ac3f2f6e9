# The server on a CPU:       docker build -t preft-jax . && docker run -p 8000:8000 -v preft-state:/state preft-jax
# On NVIDIA GPUs:            docker build -t preft-jax --build-arg EXTRAS=serve,gpu . && docker run --gpus all ...
# Options of the server:     docker run ... preft-jax --model smollm2-135m --api-key ann=secret --admin-key other-secret
FROM python:3.12-slim

ARG EXTRAS=serve

RUN useradd --create-home --uid 1000 preft && mkdir /state && chown preft /state
WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY preft_jax preft_jax
COPY kernels kernels
COPY serve serve
RUN pip install --no-cache-dir --constraint constraints.txt ".[${EXTRAS}]"

USER preft
ENV JAX_COMPILATION_CACHE_DIR=/state/compiled
VOLUME /state
EXPOSE 8000
HEALTHCHECK --start-period=120s CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/ready', timeout=3)"]
ENTRYPOINT ["python", "-m", "serve.api", "--host", "0.0.0.0", "--port", "8000", "--state-dir", "/state"]
