"""The machine that a run is planned for and launched on; configs/cluster/ describes some, with sources of all figures.

GB is 10^9 bytes. A link's speed is that of one direction, of which data sheets often give the double.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from rxt_dist.config.base import Config, at_most
from rxt_dist.config.stages import Probability

_MOST_RANKS = 131_072


class ClusterConfig(Config):
    """The machine a run is planned for and launched on."""

    name: str = Field("local", description="Name of the cluster, for reports.")
    nodes: Annotated[PositiveInt, at_most(16_384)] = Field(1, description="Nodes of one job.")
    gpus_per_node: Annotated[PositiveInt, at_most(256)] = Field(1, description="Ranks per node.")
    device: Literal["gpu", "cpu"] = Field("gpu", description="What a rank computes on; cpu: for tests and the demo.")
    gpu_memory_gb: PositiveFloat = Field(80.0, description="Memory of one GPU in 10^9 bytes.")
    peak_tflops: PositiveFloat = Field(312.0, description="Dense bfloat16 peak of one GPU (A100: 312, H100: 989).")
    mfu: Probability = Field(0.25, description="Model FLOPs utilisation that plans assume.")
    gpu_link_gb_s: PositiveFloat = Field(
        300.0, description="Speed of a GPU's links inside its node, each way, in 10^9 bytes/s (A100 SXM: 300)."
    )
    node_link_gb_s: PositiveFloat = Field(
        200.0, description="Speed of a node's network, each way, in 10^9 bytes/s (eight adapters of 200 Gbit/s: 200)."
    )
    host_copy_gb_s: PositiveFloat = Field(
        10.0, description="Speed of one GPU's copies into pinned host memory, in 10^9 bytes/s, until a run has saved."
    )
    disk_write_gb_s: PositiveFloat = Field(
        1.0, description="Speed at which one node writes checkpoints, in 10^9 bytes/s, until a run has saved."
    )
    # 419 unexpected interruptions of 2,048 nodes of 8 H100 in 54 days ("The Llama 3 Herd of Models", 2024, section
    # 3.3.4): one in 54 * 24 * 2048 / 419 hours of a node.
    hours_between_failures: PositiveFloat = Field(
        6300, description="Mean hours between failures of one node, for the interval of checkpoints that plans advise."
    )
    gpu_hour_price: NonNegativeFloat = Field(
        0.0, description="US dollars for one GPU and hour, for the cost that plans state; 0: none is stated."
    )

    @model_validator(mode="after")
    def _ranks_that_there_are(self) -> Self:
        if self.ranks > _MOST_RANKS:
            raise ValueError(
                f"nodes ({self.nodes:,}) times gpus_per_node ({self.gpus_per_node:,}) is {self.ranks:,} ranks, more "
                f"than any machine has: at most {_MOST_RANKS:,} are taken"
            )
        return self

    @property
    def ranks(self) -> int:
        """World size."""
        return self.nodes * self.gpus_per_node
