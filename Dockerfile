# docker build -t petune .
# docker run --rm -v "$PWD:/work" --user "$(id -u):$(id -g)" petune \
#   run --method adaptformer --backbone vit_nano --dataset digits --output runs/digits
#
# torch without CUDA comes from TORCH_INDEX. For torch with CUDA, as on PyPI:
# docker build --build-arg TORCH_INDEX=https://pypi.org/simple -t petune:cuda .   (then docker run --gpus all …)
FROM python:3.12-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# The pair of releases that the Makefile pins. Installed first, so that a change in petune does not download it again.
ARG TORCH="torch==2.14.1 torchvision==0.29.1"

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1

RUN pip install --extra-index-url "$TORCH_INDEX" $TORCH

COPY pyproject.toml hatch_build.py README.md LICENSE /src/
COPY petune /src/petune
# The same index again: without it pip could exchange the torch that is there.
RUN pip install --extra-index-url "$TORCH_INDEX" /src && rm -rf /src

# Everyone may write to this home, so that --user works with any number; caches and weights go here.
RUN useradd --create-home --uid 1000 petune && chmod 1777 /home/petune && mkdir /work && chown petune:petune /work
ENV HOME=/home/petune
USER petune
WORKDIR /work

ENTRYPOINT ["petune"]
CMD ["--help"]
