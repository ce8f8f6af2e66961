"""Speculative decoding that remembers: caches of keys and values, kernels by name, whole steps in C++."""

from .beam import beam_search
from .config import ModelConfig, RopeConfig
from .context import visible, window_start
from .controllers import (
    AdaptiveController,
    Bounds,
    ConfidenceController,
    CostController,
    FixedController,
    KController,
    make_controller,
)
from .drafters import DynamicTreeDrafter, ExtrapolateDrafter, ModelDrafter, NgramDrafter, NgramIndex, StaticTreeDrafter
from .drafting import Brancher, Draft, Drafter, Outcome
from .fake import FakeModel
from .generate import Clock, Generation, Stats, decode, generate, stream
from .kv_cache import KVOptions
from .load import LoadedModel, load, load_transformer
from .model import Transformer
from .options import Options
from .policies import (
    AcceptancePolicy,
    ConfThreshold,
    Judged,
    OwnChoice,
    Path,
    Rejection,
    TopkAgree,
    Typical,
    make_policy,
)
from .runner import CachedRunner, Runner, WholeRunner, make_runner
from .sampling import KeyedRandomness, Randomness, SamplingParams, choose, probabilities
from .sequence import Ending, Sequence
from .session import Session
from .speculative import speculative_decode
from .steps import Step, StepStats
from .target import Target, next_logits, target_forward
from .tree import Tree
from .tree_shapes import acceptance_by_rank, best_shape, expected_tokens
from .verify import Certain, Decisions, KeyedDecisions, Verdict, verify

__all__ = [
    "AcceptancePolicy",
    "AdaptiveController",
    "Bounds",
    "Brancher",
    "CachedRunner",
    "Certain",
    "Clock",
    "ConfThreshold",
    "ConfidenceController",
    "CostController",
    "Decisions",
    "Draft",
    "Drafter",
    "DynamicTreeDrafter",
    "Ending",
    "ExtrapolateDrafter",
    "FakeModel",
    "FixedController",
    "Generation",
    "Judged",
    "KController",
    "KVOptions",
    "KeyedDecisions",
    "KeyedRandomness",
    "LoadedModel",
    "ModelConfig",
    "ModelDrafter",
    "NgramDrafter",
    "NgramIndex",
    "Options",
    "Outcome",
    "OwnChoice",
    "Path",
    "Randomness",
    "Rejection",
    "RopeConfig",
    "Runner",
    "SamplingParams",
    "Sequence",
    "Session",
    "StaticTreeDrafter",
    "Stats",
    "Step",
    "StepStats",
    "Target",
    "TopkAgree",
    "Transformer",
    "Tree",
    "Typical",
    "Verdict",
    "WholeRunner",
    "acceptance_by_rank",
    "beam_search",
    "best_shape",
    "choose",
    "decode",
    "expected_tokens",
    "generate",
    "load",
    "load_transformer",
    "make_controller",
    "make_policy",
    "make_runner",
    "next_logits",
    "probabilities",
    "speculative_decode",
    "stream",
    "target_forward",
    "verify",
    "visible",
    "window_start",
]
