# docker build -t diglot .                            the command line, with PyTorch's default build for Linux (CUDA)
# docker run --rm --gpus all -v "$PWD:/work" diglot train --config recipe.yaml
FROM python:3.12-slim AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim
COPY constraints.txt /opt/constraints.txt
COPY --from=wheel /wheels /wheels
RUN python -m venv /opt/diglot \
    && /opt/diglot/bin/python -m pip install --no-cache-dir --constraint /opt/constraints.txt torch
RUN set -- /wheels/*.whl \
    && /opt/diglot/bin/python -m pip install --no-cache-dir --constraint /opt/constraints.txt "$1[gguf,peft,report,server]"
RUN useradd --create-home --uid 1000 diglot && install --directory --owner diglot /work
ENV PATH="/opt/diglot/bin:$PATH"
USER 1000
WORKDIR /work
ENTRYPOINT ["diglot"]
CMD ["--help"]
