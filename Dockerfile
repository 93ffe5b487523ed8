# ulfine-fast with its small encoder, which needs no network:
#   docker build --tag ulfine-fast .                  # with CUDA; for a processor alone, a quarter of the size:
#   docker build --tag ulfine-fast --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .
#   docker run --rm --volume "$PWD:/work" ulfine-fast demo
FROM python:3.11-slim

ARG TORCH_INDEX=
WORKDIR /build
COPY requirements.txt constraints.txt pyproject.toml README.md LICENSE ./
# torch first, in a layer of its own, which changes of the code leave as it is; a CPU build has the version torch==X+cpu
RUN grep -E '^(torch|torchvision)==' constraints.txt > torch.txt \
    && pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} --requirement torch.txt
COPY ulfine_fast ulfine_fast
COPY cache cache
COPY cli cli
RUN pip install --no-cache-dir --constraint constraints.txt ".[offline,export]" && ulfine-fast --version

WORKDIR /work
# models that are built or downloaded stay beside the work
ENV ULFINE_FAST_HOME=/work/.ulfine-fast HF_HOME=/work/.ulfine-fast/huggingface
ENTRYPOINT ["ulfine-fast"]
CMD ["--help"]
