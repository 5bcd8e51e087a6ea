"""The stages of training: one configuration class each, and the registry that joins it to the code of the stage.

A class here says what can be known without torch: which parts of the network a stage builds, which of their parameters
it trains, and what it cannot work with. The code (rxt_dist/stages) is named by import string and loaded when it runs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from rxt_dist.config.base import Config, at_most
from rxt_dist.config.model import ModelConfig, PartName
from rxt_dist.errors import ConfigError

Probability = Annotated[float, Field(ge=0, le=1)]

# The learning-rate group of a stage that trains all its parameters at one rate.
ALL = "all"
# Turns of a dialogue that a stage may read.
MAX_TURNS = 1024


class Turns(NamedTuple):
    """How a stage goes through the turns of a row; for plans.

    number: turns of a row, each as long as `data.seq_len`.
    alive: turns whose activations stand at once: all, or 1 where a turn is computed again for its backward pass.
    memories: tensors of the memory's shape, float32, that are kept of each turn until its backward pass is over, beside
        what the layers keep: labels and differences of a loss, the memory before a turn that is computed again.
    working: the same that one turn takes besides while its forward pass ends.
    noised: whether what is written is noised, so that its encoding and the noise are there as they are.
    first_is_written: whether the first turn is written too, and not only the memory before each later one.
    """

    number: int = 1
    alive: int = 1
    memories: int = 0
    working: int = 0
    noised: bool = False
    first_is_written: bool = True


class StageConfig(Config, ABC):
    """What every stage's configuration answers."""

    kind: str = Field(description="Which stage.")

    @abstractmethod
    def parts(self) -> tuple[PartName, ...]:
        """The parts of the network that are built; checkpoints hold all of them."""

    def rate_group(self, parameter: str) -> str | None:
        """The learning-rate group of a parameter of the network, by its name; None where it is frozen."""
        return ALL

    def expects(self) -> tuple[PartName, ...]:
        """Parts that must have been trained before: to begin with random ones needs a word (`start.fresh`)."""
        return ()

    def dialogue(self) -> Turns:
        """How the turns of a row are gone through; a row of documents is one turn."""
        return Turns()

    def masked_share(self) -> float | None:
        """The share of ordinary tokens that the encoder sees as [MASK] and is to tell; None: it sees every token."""
        return None

    def check(self, model: ModelConfig) -> None:
        """Refuse a model that this stage cannot train, or settings that learn nothing.

        Raises:
            ConfigError: saying which, and what to do.
        """
        require_parts(self.kind, self.parts(), model)


def require_parts(kind: str, parts: Iterable[PartName], model: ModelConfig) -> None:
    """Refuse a model that does not describe these parts."""
    missing = {"encoder": model.encoder, "mlm_head": model.encoder, "memory_attention": model.memory_attention}
    for part in parts:
        if part in missing and missing[part] is None:
            section = "encoder" if part == "mlm_head" else part
            raise ConfigError(
                f"stage '{kind}' needs the {part.replace('_', ' ')}, but model '{model.name}' has none: add "
                f"model.{section} or take another model."
            )


class LinearSchedule(Config):
    """A value that moves linearly with the tokens trained, then stays."""

    start: NonNegativeFloat = Field(description="Value at the beginning.")
    end: NonNegativeFloat = Field(description="Value after `tokens` trained tokens, and from then on.")
    tokens: NonNegativeInt = Field(0, description="Tokens over which start becomes end; 0: `end` from the beginning.")

    def at(self, tokens: int) -> float:
        """The value after `tokens` trained tokens."""
        if tokens >= self.tokens:
            return self.end
        return self.start + (self.end - self.start) * tokens / self.tokens


class LossWeights(Config):
    """Weights of the terms of the loss."""

    ar: NonNegativeFloat = Field(1.0, description="Next-token cross-entropy of the decoder.")
    mlm: NonNegativeFloat = Field(1.0, description="Masked-token cross-entropy of the encoder.")
    balance: NonNegativeFloat = Field(0.01, description="Switch balance loss of the routers.")
    z: NonNegativeFloat = Field(0.001, description="Router z-loss.")


class JointConfig(StageConfig):
    """Joint pre-training with cheated context (docs/training.md)."""

    kind: Literal["joint"] = Field("joint", description="Which stage.")
    mlm_probability: Probability = Field(0.15, description="Share of ordinary tokens the encoder sees as [MASK].")
    memory_noise: LinearSchedule = Field(
        LinearSchedule(start=0.5, end=0.5), description="Standard deviation of the noise on the decoder's memory."
    )
    memory_masking: LinearSchedule = Field(
        LinearSchedule(start=0.15, end=0.15), description="Probability that a memory position is zeroed."
    )
    weights: LossWeights = LossWeights()

    @model_validator(mode="after")
    def _probabilities(self) -> Self:
        for name in ("start", "end"):
            value = getattr(self.memory_masking, name)
            if value > 1:
                raise ValueError(f"memory_masking.{name} ({value}) is a probability and must not exceed 1")
        return self

    def parts(self) -> tuple[PartName, ...]:
        """Memory attention is not part of this stage: without gradients, weight decay alone would move it."""
        return ("embedding", "decoder", "lm_head", "encoder", "mlm_head")

    def masked_share(self) -> float:
        """See `StageConfig.masked_share`."""
        return self.mlm_probability

    def check(self, model: ModelConfig) -> None:
        """See `StageConfig.check`."""
        super().check(model)
        if not self.weights.ar and not self.weights.mlm:
            raise ConfigError(
                "stage.weights.ar and stage.weights.mlm are both 0, so nothing is learnt: make one positive."
            )


class MlmConfig(StageConfig):
    """Masked-token training of the encoder alone, before a decoder that takes its embedding (docs/curriculum.md)."""

    kind: Literal["mlm"] = Field("mlm", description="Which stage.")
    mlm_probability: Annotated[float, Field(gt=0, le=1)] = Field(
        0.15, description="Share of ordinary tokens the encoder sees as [MASK]."
    )

    def parts(self) -> tuple[PartName, ...]:
        """See `StageConfig.parts`."""
        return ("embedding", "encoder", "mlm_head")

    def masked_share(self) -> float:
        """See `StageConfig.masked_share`."""
        return self.mlm_probability


class DecoderWeights(Config):
    """Weights of the terms of the loss of a decoder alone."""

    balance: NonNegativeFloat = Field(0.01, description="Switch balance loss of the routers.")
    z: NonNegativeFloat = Field(0.001, description="Router z-loss.")


class DecoderStageConfig(StageConfig):
    """Next-token training of the decoder alone, with a constant memory or none (docs/curriculum.md)."""

    kind: Literal["decoder"] = Field("decoder", description="Which stage.")
    memory: Literal["fixed", "off"] = Field(
        "fixed",
        description="What the decoder reads: one fixed random memory for all rows, or nothing (no cross-attention).",
    )
    memory_deviation: PositiveFloat = Field(0.02, description="Standard deviation of the fixed memory.")
    train_embedding: bool = Field(False, description="Whether the embedding trains too, as it must where it is new.")
    weights: DecoderWeights = DecoderWeights()

    def parts(self) -> tuple[PartName, ...]:
        """See `StageConfig.parts`."""
        return ("embedding", "decoder", "lm_head")

    def expects(self) -> tuple[PartName, ...]:
        """See `StageConfig.expects`. An embedding that is frozen stays what it begins as."""
        return () if self.train_embedding else ("embedding",)

    def rate_group(self, parameter: str) -> str | None:
        """What reads the memory stays as it is, since there is nothing to learn from a constant one."""
        if any(name in parameter for name in (".cross_attention.", ".cross_norm.", ".memory_norm.")):
            return None
        return None if parameter.startswith("embedding.") and not self.train_embedding else ALL


_TRAIN_MODE = Field(
    False, description="Whether the marker after the query, which chooses fast answer or thinking, has loss too."
)


class SftConfig(JointConfig):
    """Joint training on interactions, with loss on what the model has to answer (docs/curriculum.md)."""

    kind: Literal["sft"] = Field("sft", description="Which stage.")  # type: ignore[assignment]
    train_mode: bool = _TRAIN_MODE


class DecoderSftConfig(DecoderStageConfig):
    """Training of the decoder alone on interactions, with loss on what it has to answer (docs/curriculum.md)."""

    kind: Literal["decoder-sft"] = Field("decoder-sft", description="Which stage.")  # type: ignore[assignment]
    train_mode: bool = _TRAIN_MODE


class MemoryStageConfig(StageConfig):
    """Pre-training of memory attention on dialogues, with encoder and embedding as they are (docs/curriculum.md)."""

    kind: Literal["memory"] = Field("memory", description="Which stage.")
    turns: Annotated[PositiveInt, at_most(MAX_TURNS)] = Field(
        6, description="Turns of a dialogue that are read; later ones are left out."
    )
    input_noise: NonNegativeFloat = Field(
        0.1, description="Noise on the encoded turn that is written, as a share of its rms."
    )
    label_noise: NonNegativeFloat = Field(0.05, description="Noise on the label, as a share of its rms.")
    label_scale: Literal["unit", "raw"] = Field(
        "unit", description="Whether old memory and encoded turn have the rms 1 before they are mixed, or their own."
    )
    change_weight: NonNegativeFloat = Field(
        0.0, description="Weight of the mean squared change of the memory, which grows with the root of the turn."
    )

    def parts(self) -> tuple[PartName, ...]:
        """See `StageConfig.parts`."""
        return ("embedding", "encoder", "memory_attention")

    def expects(self) -> tuple[PartName, ...]:
        """See `StageConfig.expects`. What is learnt is to mix what this encoder makes."""
        return ("embedding", "encoder")

    def rate_group(self, parameter: str) -> str | None:
        """Only memory attention trains."""
        return ALL if parameter.startswith("memory_attention.") else None

    def dialogue(self) -> Turns:
        """All turns are one backward pass. Of each stay both sides of the cosine and the change; while it is computed
        also old and new memory, the turn's share, the label and its noise."""
        return Turns(self.turns, self.turns, memories=3, working=5, noised=True)


class SmatConfig(StageConfig):
    """Training of the whole system on dialogues, through the memory that it writes (docs/curriculum.md)."""

    kind: Literal["smat"] = Field("smat", description="Which stage.")
    turns: Annotated[PositiveInt, at_most(MAX_TURNS)] = Field(
        7, description="Rows of a dialogue that are read, a system prompt among them; later ones are left out."
    )
    depth: PositiveInt | None = Field(
        None, description="Writes that gradients pass through; null: all, back to the first turn."
    )
    recompute_turns: bool = Field(
        True,
        description="Whether turns are computed one by one and again in the backward pass, or all at once and kept.",
    )
    train_mode: bool = _TRAIN_MODE
    memory_after: NonNegativeInt = Field(0, description="Tokens after which memory attention trains too.")
    encoder_after: NonNegativeInt = Field(
        0, description="Tokens after which the encoder trains too; not fewer than memory_after."
    )
    warmup_tokens: NonNegativeInt = Field(
        0, description="Tokens over which the learning rate of what begins to train later rises linearly."
    )
    weights: DecoderWeights = DecoderWeights()

    @model_validator(mode="after")
    def _encoder_last(self) -> Self:
        if self.encoder_after < self.memory_after:
            raise ValueError(
                f"encoder_after ({self.encoder_after}) is less than memory_after ({self.memory_after}), but an encoder "
                f"learns through memory attention that trains: raise the first"
            )
        return self

    def parts(self) -> tuple[PartName, ...]:
        """See `StageConfig.parts`."""
        return ("embedding", "decoder", "lm_head", "encoder", "memory_attention")

    def expects(self) -> tuple[PartName, ...]:
        """See `StageConfig.expects`. Dialogues are answered by a system whose parts can do their own work."""
        return self.parts()

    def rate_group(self, parameter: str) -> str | None:
        """The embedding trains with the decoder, whose head it feeds as well as the encoder."""
        return {"memory_attention": "memory", "encoder": "encoder"}.get(parameter.partition(".")[0], "decoder")

    def dialogue(self) -> Turns:
        """Of each turn stays the memory that it is computed from again, and one that it writes takes as much."""
        alive = 1 if self.recompute_turns else self.turns
        return Turns(self.turns, alive, memories=1, working=1, first_is_written=False)


class StageEntry(NamedTuple):
    """A stage's configuration class, and `module:class` of its code.

    work: the same of what says how much it computes (`Arithmetic`), where that stands apart and needs no torch, so that
        plans are quick; else the code is asked.
    """

    config: type[StageConfig]
    code: str
    work: str | None = None


STAGES: dict[str, StageEntry] = {
    "joint": StageEntry(JointConfig, "rxt_dist.stages.joint:JointStage", "rxt_dist.stages.joint_work:JointWork"),
    "mlm": StageEntry(MlmConfig, "rxt_dist.stages.mlm:MlmStage"),
    "decoder": StageEntry(DecoderStageConfig, "rxt_dist.stages.decoder:DecoderStage"),
    "sft": StageEntry(SftConfig, "rxt_dist.stages.sft:SftStage", "rxt_dist.stages.joint_work:JointWork"),
    "decoder-sft": StageEntry(DecoderSftConfig, "rxt_dist.stages.sft:DecoderSftStage"),
    "memory": StageEntry(MemoryStageConfig, "rxt_dist.stages.memory:MemoryStage"),
    "smat": StageEntry(SmatConfig, "rxt_dist.stages.smat:SmatStage"),
}
DEFAULT_STAGE = next(iter(STAGES))
