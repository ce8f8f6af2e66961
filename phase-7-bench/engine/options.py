"""All options of this phase's command line: flags, `SPECDEC_` environment variables, YAML keys and defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from common.flags import OFF, ON, Threads, flag

from .controllers import ControllerName, KController, make_controller
from .cost_model import CostModel
from .graphs import Mode
from .kernels.registry import Asked
from .kv_cache import Format, Kind, KVOptions
from .kv_cache.ring import SPARE
from .overlap import SyncMode
from .policies import LOSSLESS, AcceptancePolicy, PolicyName, make_policy
from .quantize import Format as WeightFormat
from .sampling import SamplingParams
from .synthetic import Synthetic

DrafterName = Literal["model", "ngram", "extrapolate", "medusa", "eagle"]
QuantName = Literal["none", "int8", "int4"]


APPEND = "SPECDEC_ENABLE_KV_APPEND"
MOST_ROWS = 2**16  # sequences of one step
BRANCHING = ("model", "medusa", "eagle")


class Options(BaseSettings):
    """Continue a text with a language model."""

    model_config = SettingsConfigDict(
        env_prefix="SPECDEC_", env_prefix_target="all", extra="forbid", populate_by_name=True, protected_namespaces=()
    )

    prompt: list[str] = Field(default=[], description="text to continue; repeatable; read from stdin if absent")
    prompt_file: Path | None = Field(default=None, description="file whose whole text is a prompt")
    model: str = Field(default="stdlib-10m", description="an embedded model, a folder, or a hub id")
    max_tokens: int = Field(default=64, ge=1, description="new tokens at most")
    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False, description="0 is greedy")
    top_k: int = Field(default=0, ge=0, description="keep the k most likely tokens; 0 keeps all")
    top_p: float = Field(default=1.0, gt=0, le=1, description="keep the smallest set with this probability; 1: all")
    min_p: float = Field(default=0.0, ge=0, le=1, description="keep tokens this fraction as likely as the likeliest")
    presence_penalty: float = Field(default=0.0, ge=-2, le=2, description="subtracted once from tokens in the output")
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2, description="subtracted for every occurrence")
    repetition_penalty: float = Field(default=1.0, gt=0, allow_inf_nan=False, description="divides logits; 1 is off")
    seed: int = Field(default=0, description="the same seed gives the same text")
    stop: list[str] = Field(default=[], description="end before this text; repeatable")
    n: int = Field(default=1, ge=1, description="samples of each prompt")
    beams: int = Field(default=1, ge=1, le=1024, description="beam search with this many beams; 1 is off")
    length_penalty: float = Field(
        default=1.0, allow_inf_nan=False, description="of beam search: above 0 favours length"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(default="auto", description="of the weights")
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    threads: Threads = Field(default=0, description="CPU threads; 0 leaves torch's choice")
    draft: str = Field(default="auto", description="the draft model; none; auto: the model's own, if any")
    k: int = Field(default=4, ge=1, description="draft tokens per target forward; of a tree, levels")
    drafter: DrafterName = Field(default="model", description="proposes tokens: the draft model, or something cheaper")
    heads: str = Field(default="auto", description="of medusa and eagle: folder; auto: the model's own, if any")
    ngram_min: int = Field(default=1, ge=1, description="of ngram: shortest suffix to look up")
    ngram_max: int = Field(default=3, ge=1, description="of ngram: longest suffix to look up")
    alpha: float = Field(default=1.0, allow_inf_nan=False, description="of extrapolate: length of a step of the state")
    policy: Literal["auto", PolicyName] = Field(
        default="auto",
        description="accepts draft tokens; auto: longest_prefix at temperature 0, else rejection (see --deterministic)",
    )
    tree: Literal["off", "static", "dynamic"] = Field(default="off", description="draft a tree instead of a chain")
    tree_nodes: int = Field(default=16, ge=1, le=64, description="nodes of a tree")
    show_tree: bool = Field(default=False, description="draw every step's tree, with the accepted path")
    lossless: bool = Field(default=False, description="refuse policies that change the output's distribution")
    tau: float = Field(default=0.3, gt=0, le=1, description="of conf_threshold: least target probability")
    agree_k: int = Field(default=3, ge=1, description="of topk_agree: accept the target's k likeliest")
    epsilon: float = Field(default=0.09, gt=0, le=1, description="of typical: upper bound of the threshold")
    delta: float = Field(default=0.3, gt=0, le=1, description="of typical: threshold is delta * exp(-entropy)")
    controller: ControllerName = Field(default="fixed", description="how many tokens to draft")
    min_k: int = Field(default=1, ge=1, description="fewest tokens a controller drafts (cost: or none)")
    max_k: int = Field(default=8, ge=1, description="most tokens a controller drafts")
    target_acceptance: float = Field(default=0.7, gt=0, lt=1, description="of adaptive: the wanted rate")
    confidence: float = Field(default=0.4, ge=0, le=1, description="of confidence: least draft probability")
    synthetic_acceptance: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="to time steps: accept draft tokens with this probability, whatever they are",
    )
    show: bool = Field(default=False, description="colour the tokens by their origin, and count accepted drafts")
    explain: bool = Field(default=False, description="afterwards: why speculation was faster, or why not")
    metrics_detailed: bool = Field(default=False, description="with --json: the figures of every step")
    record: Path | None = Field(default=None, description="write the run, step by step, to this file")
    amp: bool = Field(default=False, description="keep float32 weights, autocast matrix products")
    quant: QuantName = Field(default="none", description="quantise the target's matrices: weights only")
    draft_quant: QuantName = Field(default="none", description="quantise the draft model's or the heads' matrices")
    quant_group: Annotated[Literal[32, 64, 128], BeforeValidator(int)] = Field(
        default=64, description="of int4: input features that share a scale"
    )
    quant_asymmetric: bool = Field(default=False, description="of int4: a zero point per group as well")
    quant_head: bool = Field(default=False, description="quantise the output matrix too")
    compile: bool = Field(default=False, description="torch.compile the models")
    kernels: Asked = Field(default="auto", description="backend of the ops; auto: the fastest checked for the device")
    batch_size: int = Field(
        default=16, ge=1, le=MOST_ROWS, description="sequences that are decoded at once; others wait"
    )
    cuda_graph: Mode = Field(
        default="auto", description="capture steps and replay them; auto: on a GPU, where it can be"
    )
    parallel_streams: bool = Field(default=False, description="draft the next block while this one is verified")
    sync_mode: SyncMode = Field(
        default="event", description="of --parallel-streams: wait for the draft when it is needed, or after the forward"
    )
    deterministic: bool = Field(default=False, description="equal tokens in every run, batch and number of threads")
    kv: Kind = Field(default="paged", description="where keys and values are kept; off: all are computed again")
    kv_dtype: Format = Field(default="auto", description="number format of the cache; auto: that of the weights")
    kv_slots: int = Field(default=0, ge=0, description="of static: tokens per text; 0: as many as the request can need")
    kv_pages: int = Field(default=0, ge=0, description="of paged: pages of 16 tokens; 0: up to half of the free memory")
    tensor_parallel: int = Field(default=1, ge=1, description="processes that share each layer")
    tensor_mode: Literal["gather", "reduce"] = Field(
        default="gather", description="of --tensor-parallel: gather outputs, bit for bit; or add up partial sums"
    )
    pipeline_parallel: int = Field(default=1, ge=1, description="processes that have some layers each")
    micro_batches: int = Field(default=0, ge=0, description="of --pipeline-parallel: parts of a step; 0: one a process")
    draft_parallel: bool = Field(default=False, description="split the draft model too; else process 0 has it whole")
    profile: Path | None = Field(default=None, description="write a trace, an operator table and memory to this folder")
    profile_steps: int = Field(default=8, ge=1, description="of --profile: decoding steps in the trace")
    profile_stacks: bool = Field(default=False, description="of --profile: Python stacks, for a larger trace")
    config: Path | None = Field(default=None, description="YAML file with these options")
    as_json: bool = Field(default=False, alias="json", description="one JSON document on stdout instead of text")

    @field_validator("profile", mode="before")
    @classmethod
    def _profile_is_a_folder_or_a_switch(cls, value: object) -> object:
        """Read 1 as the folder `profile` and 0 as off: SPECDEC_PROFILE=1, --profile 0. ./1 is a folder named 1."""
        word = str(value).lower()
        return Path("profile") if word in ON else None if word in ("", *OFF) else value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """SPECDEC_ENABLE_KV_APPEND=0 is --kv off, after --kv and SPECDEC_KV, and before a file."""
        switched = {} if flag(APPEND, default=True) else {"kv": "off"}
        return init_settings, env_settings, InitSettingsSource(settings_cls, init_kwargs=switched)

    @model_validator(mode="after")
    def _show_is_text(self) -> Self:
        if self.show and self.as_json:
            raise ValueError("--show does not go with --json, which prints only its document")
        return self

    @model_validator(mode="after")
    def _speculation_fits(self) -> Self:
        if self.min_k > self.max_k:
            raise ValueError(f"--min-k {self.min_k} is above --max-k {self.max_k}")
        if self.ngram_min > self.ngram_max:
            raise ValueError(f"--ngram-min {self.ngram_min} is above --ngram-max {self.ngram_max}")
        if self.tree != "off" and self.drafter not in BRANCHING:
            raise ValueError(
                f"--drafter {self.drafter} drafts one continuation and cannot branch: --tree goes with "
                f"{', '.join(BRANCHING)}"
            )
        if self.tree != "off" and self.controller == "confidence":
            raise ValueError(
                "--controller confidence ends chains early; a tree that grows by confidence: --tree dynamic"
            )
        if self.show_tree and (self.tree == "off" or self.as_json):
            raise ValueError("--show-tree draws text for people: it needs --tree static or dynamic, and no --json")
        if self.lossless and self.synthetic_acceptance is not None:
            raise ValueError("--lossless refuses --synthetic-acceptance, which accepts whatever was drafted")
        if self.lossless and self.policy not in ("auto", *LOSSLESS):
            raise ValueError(
                f"--lossless refuses --policy {self.policy}, which changes the output's distribution; "
                f"lossless are {', '.join(LOSSLESS)}"
            )
        return self

    @model_validator(mode="after")
    def _numbers_fit(self) -> Self:
        if self.amp and (self.quant != "none" or self.draft_quant != "none"):
            raise ValueError(
                "--amp casts float32 weights for every product, and --quant leaves none to cast: choose one; "
                "quantised weights with bfloat16 activations: --quant int8 --dtype bfloat16"
            )
        if self.kernels not in ("auto", "torch") and (self.amp or self.compile):
            raise ValueError(
                f"--kernels {self.kernels} has products of its own: leave out --amp and --compile, or the kernels"
            )
        if self.draft_quant != "none" and (self.drafter not in ("model", "medusa", "eagle") or self.draft == "none"):
            raise ValueError(
                f"--draft-quant {self.draft_quant} quantises the draft model, or Medusa's or EAGLE's heads, and there "
                "are none: it goes with --drafter model, medusa or eagle, and not with --draft none"
            )
        return self

    @model_validator(mode="after")
    def _beams_stand_alone(self) -> Self:
        if self.beams > 1:
            for name in ("temperature", "stop", "presence_penalty", "frequency_penalty"):
                if getattr(self, name):
                    raise ValueError(
                        f"--beams does not go with --{name.replace('_', '-')}; beam search does not use it"
                    )
            if self.repetition_penalty != 1:
                raise ValueError("--beams does not go with --repetition-penalty; beam search does not use it")
            if self.profile is not None:
                raise ValueError("--beams does not go with --profile: a beam search is a single step of it")
            if self.n > 1:
                raise ValueError("--beams does not go with --n: the search returns one text")
            for name in ("policy", "controller", "drafter"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"--beams does not go with --{name}: nothing is drafted")
            if self.record is not None:
                raise ValueError("--beams does not go with --record: a step of beam search gives no single token")
            if self.draft not in ("auto", "none"):
                raise ValueError("--beams does not go with --draft: beam search does not use a draft")
        return self

    @model_validator(mode="after")
    def _cache_fits(self) -> Self:
        if self.kv != "off" and not flag(APPEND, default=True):
            raise ValueError(f"{APPEND}=0 keeps no cache, and --kv {self.kv} asks for one: leave one of them out")
        if self.kv == "off" and self.kv_dtype != "auto":
            raise ValueError(f"--kv-dtype {self.kv_dtype} is the format of a cache, and --kv off keeps none")
        if self.kv_slots and self.kv != "static":
            raise ValueError(f"--kv-slots is for --kv static, and --kv is {self.kv}")
        if self.kv_pages and self.kv != "paged":
            raise ValueError(f"--kv-pages is for --kv paged, and --kv is {self.kv}")
        drafted = self.tree_nodes if self.tree != "off" else max(self.k, self.max_k)
        if self.kv == "ring" and self.draft != "none" and drafted >= SPARE:
            option = "--tree-nodes" if self.tree != "off" else "--k and --max-k"
            raise ValueError(
                f"--kv ring takes {SPARE} tokens a step, one of them no guess: {option} at most {SPARE - 1}"
            )
        return self

    @model_validator(mode="after")
    def _processes_fit(self) -> Self:
        if self.tensor_parallel > 1 and self.pipeline_parallel > 1:
            raise ValueError(
                "--tensor-parallel does not go with --pipeline-parallel: split the layers, or each of them"
            )
        if self.tensor_mode != "gather" and self.tensor_parallel == 1:
            raise ValueError(f"--tensor-mode {self.tensor_mode} is for --tensor-parallel 2 or more")
        if self.micro_batches and self.pipeline_parallel == 1:
            raise ValueError("--micro-batches is for --pipeline-parallel 2 or more")
        if self.draft_parallel and self.tensor_parallel == self.pipeline_parallel == 1:
            raise ValueError("--draft-parallel is for --tensor-parallel or --pipeline-parallel 2 or more")
        if self.draft_parallel and self.drafter != "model":
            raise ValueError(f"--draft-parallel splits a draft model, and --drafter {self.drafter} has none")
        if self.tensor_parallel > 1 or self.pipeline_parallel > 1:
            option = "--tensor-parallel" if self.tensor_parallel > 1 else "--pipeline-parallel"
            for name in ("amp", "compile"):
                if getattr(self, name):
                    raise ValueError(f"--{name} applies to torch's operations, and {option} splits the C++ kernels")
            if self.beams > 1:
                raise ValueError(f"{option} does not go with --beams: torch computes whole texts on a whole model")
            if self.kv in ("off", "dynamic"):
                raise ValueError(f"{option} does not go with --kv {self.kv}: every process keeps a cache of its part")
        return self

    def weight_format(self, quant: QuantName) -> WeightFormat | None:
        """Return the format of quantised matrices; None if they are not to be quantised."""
        return None if quant == "none" else WeightFormat(quant, self.quant_group, self.quant_asymmetric)

    def kv_options(self) -> KVOptions:
        return KVOptions(self.kv, self.kv_dtype, self.kv_slots, self.kv_pages)

    def sampling_params(self) -> SamplingParams:
        return SamplingParams(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            stop=tuple(self.stop),
            max_new_tokens=self.max_tokens,
        )

    def acceptance_policy(self, name: PolicyName | None = None) -> AcceptancePolicy:
        """Make the policy of this name, by default the one of the options."""
        policy = make_policy(name or self.policy_name, self.tau, self.agree_k, self.epsilon, self.delta)
        return policy if self.synthetic_acceptance is None else Synthetic(policy, self.synthetic_acceptance)

    @property
    def policy_name(self) -> PolicyName:
        """Return the name of the policy, with `auto` resolved."""
        if self.policy != "auto":
            return self.policy
        if self.temperature == 0:
            return "longest_prefix"
        return "coupled" if self.deterministic and self.controller == "cost" else "rejection"

    def make_controller(self, cost_model: CostModel | None = None) -> KController:
        """Make a controller for one sequence, which may share measured times with others."""
        bounds = self.k, self.min_k, self.max_k
        return make_controller(self.controller, *bounds, self.target_acceptance, self.confidence, cost_model)
