# GPU image: torch, TransformerEngine and apex are the base image's own; only what it lacks is added.
#   docker build -t vlm_nemo .
#   docker run --gpus all --ipc=host -v "$PWD/runs:/home/vlm/runs" vlm_nemo train recipe=llava15_7b/stage2
FROM nvcr.io/nvidia/pytorch:26.09-py3

WORKDIR /opt/vlm_nemo
COPY pyproject.toml README.md LICENSE ./
COPY vlm_nemo vlm_nemo
COPY conf conf
COPY recipes recipes

# --no-deps where a dependency would bring another torch; the rest is free of it and takes what fits the image.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir --no-deps megatron-core==0.16.1 . \
 && pip install --no-cache-dir psutil numpy webdataset fsspec aiohttp pyarrow "hydra-core>=1.3.2,<1.4" "omegaconf>=2.3,<2.4" \
        tokenizers safetensors pillow simplejpeg rich matplotlib pyyaml "wandb>=0.25" tensorboard \
        fastapi uvicorn prometheus-client onnx onnxscript onnxruntime

# TF32 would bend the rotary angles; one hardware queue keeps megatron-core's overlap in order.
ENV TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=0 CUDA_DEVICE_MAX_CONNECTIONS=1

RUN useradd --create-home --uid 10001 vlm
USER vlm
WORKDIR /home/vlm
ENTRYPOINT ["vlm-nemo"]
CMD ["--help"]
