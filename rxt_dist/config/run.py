"""A training run: which model, on which data, by which stage, over which ranks.

Everything a person thinks of in tokens is given in tokens; rows follow from the data's row length.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializeAsAny,
    create_model,
    field_validator,
    model_validator,
)

from rxt_dist.config.base import Config, at_most
from rxt_dist.config.cluster import ClusterConfig
from rxt_dist.config.corpus import BuildConfig
from rxt_dist.config.duration import Duration
from rxt_dist.config.model import ModelConfig, PartName
from rxt_dist.config.stages import DEFAULT_STAGE, STAGES, Probability, StageConfig

Rows = Annotated[PositiveInt, at_most(65_536)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class PhaseConfig(Config):
    """One phase of the data mixture, in one of four forms: weights, tokens_per_source, languages or by_size."""

    tokens: PositiveInt | None = Field(
        None, description="Tokens this phase lasts; null: the sum of tokens_per_source, else until the end of training."
    )
    weights: dict[str, PositiveFloat] = Field({}, description="Share of each source, relative to the others.")
    tokens_per_source: dict[str, PositiveInt] = Field(
        {}, description="Tokens of each source; together they are the length of the phase."
    )
    languages: dict[str, PositiveFloat] = Field(
        {}, description="Share of each language, relative to the others; within a language sources go by size."
    )
    by_size: bool = Field(False, description="Every source by its share of the rows, as without a mixture.")
    path: Path | None = Field(
        None, description="Dataset of this phase, of the same tokenizer and row length; null: that of the phase before."
    )

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        forms = ("weights", "tokens_per_source", "languages", "by_size")
        given = [name for name in forms if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(
                f"a phase needs one of {', '.join(forms)}, with at least one share in it, and has {given or 'none'}"
            )
        total = sum(self.tokens_per_source.values())
        if total and self.tokens not in (None, total):
            raise ValueError(f"tokens is {self.tokens:,}, but tokens_per_source adds up to {total:,}: leave out tokens")
        return self

    @property
    def length(self) -> int | None:
        """Tokens of the phase; None: it lasts until the end of training."""
        return self.tokens or sum(self.tokens_per_source.values()) or None


class DataConfig(Config):
    """Which shards are read, and in which mixture."""

    path: Path = Field(description="Folder written by `rxt-dist data build`.")
    tokenizer: Path | None = Field(
        None, description="tokenizer.json that the model belongs to; data made with another one is refused."
    )
    seq_len: Annotated[PositiveInt, at_most(65_535)] | None = Field(
        None, description="Row length in tokens; null: the data's own."
    )
    mixture: tuple[PhaseConfig, ...] = Field((), description="Phases; empty: every source by its share of the rows.")
    max_epochs: PositiveFloat = Field(4.0, description="Refuse a plan that repeats any source more often than this.")
    build: BuildConfig | None = Field(None, description="How `rxt-dist data build` makes it; training ignores this.")

    @model_validator(mode="after")
    def _first_phase_is_of_path(self) -> Self:
        if self.mixture and self.mixture[0].path is not None:
            raise ValueError(
                f"mixture.0.path is {self.mixture[0].path}, but the first phase reads data.path: name its dataset there"
            )
        return self


class OriginConfig(Config):
    """One place that weights come from."""

    run: Path | None = Field(None, description="Run directory to begin from.")
    export: Path | None = Field(None, description="Instead: folder of .safetensors files with our parameter names.")
    parts: tuple[PartName, ...] = Field((), description="Parts of the network to take from there.")

    @property
    def place(self) -> str:
        """Where it is, as a message names it."""
        return f"start.run {self.run}" if self.run else f"start.export {self.export}"


class StartConfig(OriginConfig):
    """Weights that a run begins with: those of other runs' newest valid checkpoints, or of exports.

    Parts that none of them is asked for begin afresh.
    """

    also: tuple[OriginConfig, ...] = Field((), description="Further places, for parts that the first does not have.")
    fresh: tuple[PartName, ...] = Field(
        (), description="Parts that begin afresh although the stage expects trained ones."
    )
    unfinished: bool = Field(False, description="Whether runs may be taken that are not finished.")

    @property
    def origins(self) -> tuple[OriginConfig, ...]:
        """All places, the first one first; none where everything begins afresh."""
        first = OriginConfig(run=self.run, export=self.export, parts=self.parts)
        return (first, *self.also) if self.run is not None or self.export is not None else ()

    @property
    def taken(self) -> tuple[PartName, ...]:
        """Parts that are taken from anywhere."""
        return tuple(part for origin in self.origins for part in origin.parts)

    @model_validator(mode="after")
    def _each_part_once(self) -> Self:
        nothing = not (self.parts or self.also or self.run or self.export)
        places: dict[str, OriginConfig] = {
            "start": self,
            **{f"start.also.{index}": other for index, other in enumerate(self.also)},
        }
        if nothing and self.fresh:
            places = {}
        for name, origin in places.items():
            if (origin.run is None) == (origin.export is None):
                raise ValueError(f"{name} needs one of run and export")
            if not origin.parts:
                raise ValueError(f"{name}.parts is empty, so nothing would be taken: name some, or leave {name} out")
        named = [*self.taken, *self.fresh]
        twice = sorted({part for part in named if named.count(part) > 1})
        if twice:
            raise ValueError(
                f"{', '.join(twice)} is named twice among the parts that are taken and that begin afresh: once is meant"
            )
        return self


class RampConfig(Config):
    """Global batch ramp-up."""

    start_tokens: PositiveInt = Field(description="Global batch at the beginning, in tokens.")
    increment_tokens: PositiveInt = Field(description="Each enlargement, in tokens.")
    over_tokens: PositiveInt = Field(description="Trained tokens after which the full global batch is reached.")


class TrainConfig(Config):
    """How much is trained, in which portions and precision."""

    total_tokens: PositiveInt = Field(description="Token budget of the run (positions, padding included).")
    global_batch_tokens: PositiveInt = Field(description="Tokens per optimizer step over all ranks.")
    ramp: RampConfig | None = Field(None, description="Global batch ramp-up; null: full batch from the start.")
    micro_batch_rows: Rows = Field(1, description="Rows a rank computes at once; the rest is accumulated.")
    precision: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="Computation type; master weights and moments are float32 either way."
    )
    recompute: bool = Field(False, description="Recompute each layer in the backward pass instead of storing it.")
    compile: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Let torch.compile make one kernel each of norms, rotations, gates, routing and losses; auto: on "
        "GPUs. Takes a minute in the first step, and a C++ compiler.",
    )
    balancing: Literal["loss", "bias"] = Field(
        "loss",
        description="Balance experts by the Switch loss, or in its place by routing biases.",
    )
    bias_rate: PositiveFloat = Field(0.001, description="Step of the routing biases (balancing: bias).")
    logit_chunk_tokens: PositiveInt = Field(2048, description="Positions whose logits exist at one time.")
    max_skipped_steps: PositiveInt = Field(5, description="Non-finite steps in a row after which the run goes back.")
    time_limit: Duration | None = Field(
        None,
        description="Time from the launch (3h50m) by which a run has saved and ended with exit code 75; null: none.",
    )


class OptimizerConfig(Config):
    """AdamW."""

    lr: PositiveFloat = Field(3e-4, description="Peak learning rate.")
    beta1: Decay = Field(0.9, description="Decay of the first moment per step.")
    beta2: Decay = Field(0.95, description="Decay of the second moment per step.")
    eps: PositiveFloat = Field(1e-8, description="Added to the root of the second moment.")
    weight_decay: NonNegativeFloat = Field(0.1, description="Decoupled weight decay, times the learning rate a step.")
    no_decay: tuple[str, ...] = Field(
        (),
        description="Regular expressions of names of matrices that shall not decay either (norms, biases and scalar "
        "gates never do); each must match one.",
    )
    clip: PositiveFloat = Field(1.0, description="Bound of the global gradient norm.")

    @field_validator("no_decay")
    @classmethod
    def _patterns_compile(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"'{pattern}' is not a regular expression: {error}") from error
        return patterns


class ScheduleConfig(Config):
    """Learning rate as a function of trained tokens."""

    kind: Literal["cosine", "wsd"] = Field("cosine", description="Cosine decay, or warm-up, stable, linear decay.")
    warmup_tokens: NonNegativeInt = Field(0, description="Tokens over which the rate rises linearly to its peak.")
    decay_tokens: NonNegativeInt = Field(0, description="Length of the final decay (wsd only).")
    min_ratio: Probability = Field(0.1, description="Final learning rate as a share of the peak.")


class ParallelConfig(Config):
    """How the model is spread over ranks."""

    engine: Literal["deepspeed", "plain"] = Field(
        "deepspeed", description="'plain' is one process of plain torch, without DeepSpeed."
    )
    zero: Literal[0, 1, 2, 3] = Field(1, description="ZeRO stage: 1 shards optimizer states, 2 gradients, 3 weights.")
    expert_parallel: NonNegativeInt = Field(
        1, description="Ranks that share one set of routed experts; 0: as many of a node's ranks as divide them."
    )


class CheckpointConfig(Config):
    """When checkpoints are written and how many stay."""

    every_tokens: PositiveInt = Field(description="Trained tokens between checkpoints.")
    every_minutes: NonNegativeFloat = Field(
        0, description="Also when so many minutes have passed since the last; 0: by tokens only."
    )
    keep: int = Field(3, ge=2, description="Newest valid checkpoints to keep; suspect ones do not count.")
    milestone_tokens: NonNegativeInt = Field(
        0, description="The first checkpoint of every so many trained tokens is kept for ever; 0: none is."
    )
    keep_best: bool = Field(False, description="Also keep the checkpoint with the lowest mean evaluation loss.")


class EvalConfig(Config):
    """Evaluation per language, with true, zero and foreign memory."""

    every_tokens: NonNegativeInt = Field(0, description="Trained tokens between evaluations; 0: only at the end.")
    rows_per_source: PositiveInt = Field(64, description="Held-out rows of each source.")


class LogConfig(Config):
    """What is written while training."""

    every_steps: PositiveInt = Field(10, description="Steps between log lines.")
    wandb: Literal["offline", "online", "disabled"] = Field(
        "offline", description="Weights & Biases is a copy; metrics.jsonl in the run directory is the truth."
    )
    wandb_project: str = Field("rxt-dist", description="Project that the copy belongs to.")


class DeadlinesConfig(Config):
    """Seconds after which a rank that does not come on is taken to hang; 0: never."""

    set_up: NonNegativeFloat = Field(3600.0, description="Start, and the first step of a life, which may compile.")
    load: NonNegativeFloat = Field(3600.0, description="Reading a checkpoint.")
    data: NonNegativeFloat = Field(900.0, description="Waiting for the rows of a step.")
    step: NonNegativeFloat = Field(
        300.0, description="A step; ten times the median of the last steps where that is longer."
    )
    save: NonNegativeFloat = Field(3600.0, description="The part of a save for which training waits.")
    evaluate: NonNegativeFloat = Field(3600.0, description="An evaluation.")


class HealthConfig(Config):
    """What is watched while training, and when a run goes back to an earlier checkpoint (docs/reliability.md)."""

    deadlines: DeadlinesConfig = DeadlinesConfig()
    spikes: PositiveInt = Field(10, description="Losses in a row above the threshold after which the run goes back.")
    deviations: PositiveFloat = Field(
        10.0, description="Threshold: so many robust deviations above the median of the last 200 losses."
    )
    replica_steps: NonNegativeInt = Field(
        100, description="Steps between comparisons of the weights that ranks hold in common; 0: never."
    )


class RunConfig(Config):
    """A whole run, as read from configs/run/*.yaml with the files it names joined in."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$",
        max_length=200,
        description="Name of the run; its directory is output / name.",
    )
    output: Path = Field(Path("runs"), description="Parent of the run directory.")
    seed: NonNegativeInt = Field(0, le=2**63 - 1, description="Seed of weights, data order, masks and noise.")
    model: ModelConfig
    data: DataConfig
    cluster: ClusterConfig = ClusterConfig()
    stage: SerializeAsAny[StageConfig]
    start: StartConfig | None = Field(None, description="Where the weights come from; null: all begin afresh.")
    train: TrainConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    health: HealthConfig = HealthConfig()

    @property
    def directory(self) -> Path:
        """The run directory."""
        return self.output / self.name


@cache
def run_class(kind: str) -> type[RunConfig]:
    """`RunConfig` with the configuration of this kind of stage, so that a mistake in it is told by its own path."""
    config = STAGES[kind].config
    # Without a `stage` a run is of the default one, if that needs no settings.
    default = config.model_validate({"kind": kind}) if kind == DEFAULT_STAGE else ...
    return create_model("RunConfig", __base__=RunConfig, __doc__=RunConfig.__doc__, stage=(config, default))
