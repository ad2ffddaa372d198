"""Sizes of models that people train, without their weights."""

from benchmarks.frameworks import MODELS
from jaxpref.models.decoder import DecoderConfig

CONFIGS = {
    "135M": DecoderConfig(**MODELS["smollm2"]),
    "1B": DecoderConfig(128256, 2048, 16, 32, 8, 64, 8192),
    "8B": DecoderConfig(128256, 4096, 32, 32, 8, 128, 14336, tied=False),
}
