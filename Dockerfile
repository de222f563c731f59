# Solver and controller of gemopt, without torch: `gemopt watch` beside a serving engine, or any other command.
#
#   docker build -t gemopt .
#   docker run --rm gemopt doctor
#   sudo chown 10001 state    # the image's user writes there; in Kubernetes fsGroup: 10001
#   docker run --rm -v "$PWD/traces:/data/traces:ro" -v "$PWD/state:/data/state" -p 9400:9400 gemopt \
#       watch /data/traces --profile /data/state/profile.json --placement /data/state/placement.json \
#       --to sglang --host 0.0.0.0 --port 9400
FROM python:3.11-slim AS build
WORKDIR /source
COPY . .
RUN pip install --no-cache-dir --constraint constraints.txt build && python -m build --wheel --outdir /wheels .

FROM python:3.11-slim
RUN useradd --create-home --uid 10001 gemopt
COPY --from=build /wheels /wheels
COPY constraints.txt /wheels/
RUN pip install --no-cache-dir --constraint /wheels/constraints.txt \
        "$(echo /wheels/gemopt-*.whl)[watch,yaml]" && rm -r /wheels
USER gemopt
WORKDIR /home/gemopt
# Kernels are compiled for the processor that runs them; this folder holds them, and can be a volume.
ENV NUMBA_CACHE_DIR=/home/gemopt/kernels PYTHONUNBUFFERED=1
RUN mkdir kernels && gemopt demo --files demo --quiet \
    && gemopt solve demo/profile.json demo/traces.safetensors --solver local-search --patience 0 --time-limit 5 --quiet
EXPOSE 9400
ENTRYPOINT ["gemopt"]
CMD ["doctor"]
