"""Speculative decoding: a small model drafts tokens, one target forward verifies several; the output is unchanged."""

from .beam import beam_search
from .config import ModelConfig
from .config_rope import RopeConfig
from .context import visible, window_start
from .drafting import Draft, Drafter, ModelDrafter
from .fake import FakeModel
from .forward import next_logits
from .generate import Generation, Stats, decode, generate, stream
from .llm import LLM
from .load import LoadedModel, load, load_transformer
from .model import Transformer
from .options import Options
from .sampling import KeyedSampler, Sampler, SamplingParams, choose, probabilities
from .sequence import Ending, Sequence
from .speculative import Step, StepStats, speculative_decode
from .verify import GreedySource, KeyedSource, RandomSource, Verdict, verify

__all__ = [
    "LLM",
    "Draft",
    "Drafter",
    "Ending",
    "FakeModel",
    "Generation",
    "GreedySource",
    "KeyedSampler",
    "KeyedSource",
    "LoadedModel",
    "ModelConfig",
    "ModelDrafter",
    "Options",
    "RandomSource",
    "RopeConfig",
    "Sampler",
    "SamplingParams",
    "Sequence",
    "Stats",
    "Step",
    "StepStats",
    "Transformer",
    "Verdict",
    "beam_search",
    "choose",
    "decode",
    "generate",
    "load",
    "load_transformer",
    "next_logits",
    "probabilities",
    "speculative_decode",
    "stream",
    "verify",
    "visible",
    "window_start",
]
