"""Many requests at once."""

from .async_engine import AsyncLLMEngine
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
from .drafter_choice import with_drafter
from .drafters import DynamicTreeDrafter, ExtrapolateDrafter, ModelDrafter, NgramDrafter, NgramIndex, StaticTreeDrafter
from .drafting import Brancher, Draft, Drafter, Outcome
from .fake import FakeModel
from .forward import next_logits
from .generate import Generation, Stats, generate, stream
from .kv_cache import KVOptions, PagedCache
from .llm import LLM
from .llm_engine import LLMEngine, Output
from .load import LoadedModel, load, load_transformer
from .model import Transformer
from .options import Options
from .overlap import OverlapStats
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
from .runner import CachedRunner, ModelRunner, make_runner
from .sampling import KeyedSampler, Sampler, SamplingParams, choose, probabilities
from .sequence import Ending, Sequence
from .speculative import decode
from .steps import Path, Step, StepStats, TargetOutput
from .target import target_forward
from .tree import Tree
from .tree_shapes import best_shape
from .uncached_runner import UncachedRunner
from .verify import GreedySource, KeyedSource, RandomSource, Verdict, verify

__all__ = [
    "LLM",
    "AcceptancePolicy",
    "AdaptiveController",
    "AsyncLLMEngine",
    "Bounds",
    "Brancher",
    "CachedRunner",
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
    "KVOptions",
    "KeyedSampler",
    "KeyedSource",
    "LLMEngine",
    "LoadedModel",
    "ModelConfig",
    "ModelDrafter",
    "ModelRunner",
    "NgramDrafter",
    "NgramIndex",
    "Options",
    "Outcome",
    "Output",
    "OverlapStats",
    "PagedCache",
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
    "UncachedRunner",
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
    "make_runner",
    "next_logits",
    "probabilities",
    "stream",
    "target_forward",
    "verify",
    "visible",
    "window_start",
    "with_drafter",
]
