# The HTTP API (and the web app) in a container.
#   docker build -t elastic3d .                               for CPUs
#   docker build -t elastic3d --build-arg TORCH=cu128 .       for NVIDIA GPUs (CUDA 12.8)
#   docker run -p 127.0.0.1:8000:8000 -e ELASTIC3D_TOKEN=secret elastic3d
FROM python:3.11-slim

ARG TORCH=cpu
WORKDIR /app
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY elastic3d elastic3d
COPY configs configs
COPY scripts scripts
COPY data data
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/${TORCH} "torch==2.13.0" \
    && pip install --no-cache-dir -e ".[app,serve]" \
    && useradd --create-home elastic3d
USER elastic3d
EXPOSE 8000 7860
HEALTHCHECK CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/healthz', timeout=5)"]
CMD ["python", "scripts/serve.py", "host=0.0.0.0", "port=8000"]
