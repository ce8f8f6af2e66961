"""Speculative decoding with a choice of drafter, controller, tree shape and acceptance policy."""

from .beam import beam_search
from .config import ModelConfig
from .config_rope import RopeConfig
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
from .forward import next_logits
from .generate import Generation, Stats, generate, stream
from .llm import LLM
from .load import LoadedModel, load, load_transformer
from .model import Transformer
from .options import Options
from .policies import (
    AcceptancePolicy,
    ConfThreshold,
    DraftRows,
    Rejection,
    SampleMatch,
    TargetProbs,
    TopkAgree,
    Typical,
    make_policy,
)
from .sampling import KeyedSampler, Sampler, SamplingParams, choose, probabilities
from .sequence import Ending, Sequence
from .speculative import decode
from .steps import Path, Step, StepStats, TargetOutput
from .target import target_forward
from .tree import Tree
from .tree_shapes import best_shape
from .verify import GreedySource, KeyedSource, RandomSource, Verdict, verify

__all__ = [
    "LLM",
    "AcceptancePolicy",
    "AdaptiveController",
    "Bounds",
    "Brancher",
    "ConfThreshold",
    "ConfidenceController",
    "CostController",
    "Draft",
    "DraftRows",
    "Drafter",
    "DynamicTreeDrafter",
    "Ending",
    "ExtrapolateDrafter",
    "FakeModel",
    "FixedController",
    "Generation",
    "GreedySource",
    "KController",
    "KeyedSampler",
    "KeyedSource",
    "LoadedModel",
    "ModelConfig",
    "ModelDrafter",
    "NgramDrafter",
    "NgramIndex",
    "Options",
    "Outcome",
    "Path",
    "RandomSource",
    "Rejection",
    "RopeConfig",
    "SampleMatch",
    "Sampler",
    "SamplingParams",
    "Sequence",
    "StaticTreeDrafter",
    "Stats",
    "Step",
    "StepStats",
    "TargetOutput",
    "TargetProbs",
    "TopkAgree",
    "Transformer",
    "Tree",
    "Typical",
    "Verdict",
    "beam_search",
    "best_shape",
    "choose",
    "decode",
    "generate",
    "load",
    "load_transformer",
    "make_controller",
    "make_policy",
    "next_logits",
    "probabilities",
    "stream",
    "target_forward",
    "verify",
    "visible",
    "window_start",
]
