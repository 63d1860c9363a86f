# Three images of one source: `scan` (no torch), `serve` (TorchServe) and `train`. Build them with `make images`.
#
# Layers go from what changes least to what changes most: system packages, torch, the other libraries, our code.
# Every container runs as user 10001, needs nothing writable but /tmp, and takes its signals through tini. All Python is
# compiled here (pip does it for the libraries): on a read-only root every start would compile it anew.

FROM docker.io/library/python:3.11-slim-bookworm AS base
RUN apt-get update \
 && apt-get install -y --no-install-recommends tini \
 && rm -rf /var/lib/apt/lists/* \
 && python -m compileall -q -x 'site-packages|dist-packages|/tests?/' "$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" \
 && python -m venv --without-pip /opt/venv
# HOME is where libraries keep caches.
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore
WORKDIR /app
ENTRYPOINT ["tini", "-g", "--"]
CMD ["patchscan", "--help"]

FROM base AS torch
COPY requirements/torch.txt /tmp/
RUN pip --python /opt/venv/bin/python install --require-hashes -r /tmp/torch.txt

# The command `patchscan`, the package behind it, and its version. A path file, and not PYTHONPATH: that would make
# TorchServe's workers prefer this copy of the detector to the archive's own.
FROM base AS code
COPY pyproject.toml /app/
COPY patchscan /app/patchscan
COPY handlers /app/handlers
COPY training /app/training
# Unchecked: what a builder does to the files' times must not matter.
RUN python -m compileall -q --invalidation-mode unchecked-hash /app \
 && mkdir -p /links/site-packages/patchscan.dist-info \
 && sed -n 's/^version = "\(.*\)"/Name: patchscan\nVersion: \1/p' /app/pyproject.toml > /links/site-packages/patchscan.dist-info/METADATA \
 && echo /app > /links/site-packages/patchscan.pth \
 && printf '#!/opt/venv/bin/python\nfrom patchscan.cli import main\n\nif __name__ == "__main__":\n    main()\n' > /links/patchscan \
 && chmod 755 /links/patchscan

FROM base AS scan
COPY requirements/scan.txt /tmp/
RUN pip --python /opt/venv/bin/python install --require-hashes -r /tmp/scan.txt
COPY --from=code /links/patchscan /opt/venv/bin/
COPY --from=code /links/site-packages /opt/venv/lib/python3.11/site-packages/
COPY --from=code /app /app
ARG COMMIT=unknown
ENV PATCHSCAN_COMMIT=$COMMIT USER=patchscan
USER 10001:10001

FROM torch AS train
COPY requirements/train.txt /tmp/
RUN pip --python /opt/venv/bin/python install --require-hashes -r /tmp/train.txt
COPY --from=code /links/patchscan /opt/venv/bin/
COPY --from=code /links/site-packages /opt/venv/lib/python3.11/site-packages/
COPY --from=code /app /app
ARG COMMIT=unknown
ENV PATCHSCAN_COMMIT=$COMMIT USER=patchscan
USER 10001:10001

FROM torch AS serve
COPY requirements/serve.txt /tmp/
RUN pip --python /opt/venv/bin/python install --require-hashes -r /tmp/serve.txt
COPY --from=code /links/patchscan /opt/venv/bin/
COPY --from=code /links/site-packages /opt/venv/lib/python3.11/site-packages/
COPY --from=code /app /app
ARG COMMIT=unknown
ENV PATCHSCAN_COMMIT=$COMMIT USER=patchscan
USER 10001:10001
EXPOSE 8080 8082
# For engines that look (docker, or `--format docker`); Kubernetes has probes of its own.
HEALTHCHECK --start-period=5m --interval=10s --timeout=5s \
  CMD ["python", "-c", "import urllib.request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:8080/readyz', timeout=4)"]
