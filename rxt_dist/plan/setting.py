"""One way of spreading a run over its cluster, and what it makes of the run's parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from rxt_dist.config.run import RunConfig
from rxt_dist.model.names import parameter_sizes

FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Parameters:
    """Parameters that a run builds, exactly: routed experts, which expert parallelism divides, and all others.

    by_layer: (dense, routed) trained ones of each layer and of what stands outside of layers, by its path.
    """

    dense: int
    routed: int
    frozen_dense: int
    frozen_routed: int
    by_layer: dict[str, tuple[int, int]]


def run_parameters(config: RunConfig) -> Parameters:
    """What the run's stage builds, trained and frozen."""
    counts = dict.fromkeys(((routed, frozen) for routed in (False, True) for frozen in (False, True)), 0)
    by_layer: dict[str, tuple[int, int]] = {}
    for name, size in parameter_sizes(config.model, config.stage.parts()).items():
        routed, frozen = ".routed.experts." in name, config.stage.rate_group(name) is None
        counts[routed, frozen] += size
        if not frozen:
            layer = layer_of(name)
            dense_before, routed_before = by_layer.get(layer, (0, 0))
            by_layer[layer] = (dense_before, routed_before + size) if routed else (dense_before + size, routed_before)
    return Parameters(counts[False, False], counts[True, False], counts[False, True], counts[True, True], by_layer)


def layer_of(parameter: str) -> str:
    """`decoder.layers.3` of what stands in a layer, else the part of the network (`lm_head`, `embedding`)."""
    fields = parameter.split(".")
    return ".".join(fields[:3]) if fields[1] == "layers" else fields[0]


@dataclass(frozen=True)
class Setting:
    """A run under one ZeRO stage, degree of expert parallelism, micro-batch and choice of recomputation."""

    config: RunConfig
    seq_len: int
    built: Parameters

    @staticmethod
    def of(config: RunConfig) -> Setting:
        """The run's own, whose expert_parallel is settled."""
        return Setting(config, config.data.seq_len or config.model.seq_len, run_parameters(config))

    def with_(
        self,
        *,
        zero: int | None = None,
        expert_parallel: int | None = None,
        micro_rows: int | None = None,
        recompute: bool | None = None,
    ) -> Setting:
        """The same run under another setting; None: as it is here."""
        parallel = {"zero": zero, "expert_parallel": expert_parallel}
        train = {"micro_batch_rows": micro_rows, "recompute": recompute}
        changed = {
            "parallel": self.config.parallel.model_copy(update=_given(parallel)),
            "train": self.config.train.model_copy(update=_given(train)),
        }
        return replace(self, config=self.config.model_copy(update=changed))

    @property
    def zero(self) -> int:
        """ZeRO stage."""
        return self.config.parallel.zero

    @property
    def expert_parallel(self) -> int:
        """Ranks that share one set of experts."""
        return self.config.parallel.expert_parallel

    @property
    def micro_rows(self) -> int:
        """Rows that a rank computes at once."""
        return self.config.train.micro_batch_rows

    @property
    def recompute(self) -> bool:
        """Whether layers are recomputed."""
        return self.config.train.recompute

    @property
    def key(self) -> tuple[int, int, int, bool]:
        """What tells it from the run's other settings."""
        return self.zero, self.expert_parallel, self.micro_rows, self.recompute

    @property
    def name(self) -> str:
        """As people write it."""
        kept = "recomputed" if self.recompute else "kept"
        return f"ZeRO {self.zero}, EP {self.expert_parallel}, {self.micro_rows} rows, {kept}"

    @property
    def rows(self) -> int:
        """Rows of a step over all ranks."""
        return self.config.train.global_batch_tokens // self.row_tokens

    @property
    def row_tokens(self) -> int:
        """What a row counts for in the global batch: all its turns, each as long as the longest."""
        return self.seq_len * self.config.stage.dialogue().number

    @property
    def tokens(self) -> int:
        """Tokens that a rank computes at once: one turn of a micro-batch."""
        return self.micro_rows * self.seq_len

    @property
    def accumulation(self) -> int:
        """Micro-batches of a rank in one step."""
        return max(1, self.rows // (self.config.cluster.ranks * self.micro_rows))

    @property
    def element_bytes(self) -> int:
        """Bytes of a weight and of an activation."""
        return 2 if self.config.train.precision == "bfloat16" else FLOAT32_BYTES

    @property
    def on_cpu(self) -> bool:
        """Whether ranks compute on CPUs, where some kernels keep other tensors."""
        return self.config.cluster.device == "cpu"

    @property
    def fused(self) -> bool:
        """Whether chains of operations are compiled, which then keep their inputs alone."""
        compiled = self.config.train.compile
        return compiled == "on" or (compiled == "auto" and not self.on_cpu)

    @property
    def copies(self) -> tuple[int, int]:
        """Ranks that hold the same dense parameters, and the same routed experts."""
        ranks = self.config.cluster.ranks
        return ranks, max(1, ranks // self.expert_parallel)

    @property
    def held(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """(trained, frozen, copies) of what one GPU has part in: dense parameters, and its share of the experts."""
        built, (ranks, copies) = self.built, self.copies
        routed, frozen = built.routed // self.expert_parallel, built.frozen_routed // self.expert_parallel
        return (built.dense, built.frozen_dense, ranks), (routed, frozen, copies)


def _given(values: Mapping[str, int | None]) -> dict[str, int]:
    return {name: value for name, value in values.items() if value is not None}
