"""Naive decoding: every new token recomputes the whole sequence."""

from .beam import beam_search
from .config import ModelConfig
from .config_rope import RopeConfig
from .context import visible, window_start
from .forward import next_logits
from .generate import Generation, Stats, decode, generate, stream
from .llm import LLM
from .load import LoadedModel, load, load_transformer
from .model import Transformer
from .options import Options
from .sampling import KeyedSampler, Sampler, SamplingParams, choose, probabilities
from .sequence import Ending, Sequence

__all__ = [
    "LLM",
    "Ending",
    "Generation",
    "KeyedSampler",
    "LoadedModel",
    "ModelConfig",
    "Options",
    "RopeConfig",
    "Sampler",
    "SamplingParams",
    "Sequence",
    "Stats",
    "Transformer",
    "beam_search",
    "choose",
    "decode",
    "generate",
    "load",
    "load_transformer",
    "next_logits",
    "probabilities",
    "stream",
    "visible",
    "window_start",
]
