"""The machines that configs/cluster describes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rxt_dist.config.cluster import ClusterConfig

CLUSTERS = Path(__file__).parents[2] / "configs/cluster"
SHAPES = {"local": (1, 2), "a100-1x8": (1, 8), "a100-8x8": (8, 8), "a100-40gb-1x4": (1, 4), "h100-8x8": (8, 8)}


@pytest.mark.parametrize("name", SHAPES)
def test_a_described_machine(name: str) -> None:
    """All that has more than a CPU says what it costs, and nothing of importance is left to a default."""
    values = yaml.safe_load((CLUSTERS / f"{name}.yaml").read_text())
    cluster = ClusterConfig.model_validate(values)
    assert (cluster.name, cluster.nodes, cluster.gpus_per_node) == (name, *SHAPES[name])
    stated = {"gpu_memory_gb", "peak_tflops", "mfu", "gpu_link_gb_s", "host_copy_gb_s", "disk_write_gb_s"}
    stated |= {"node_link_gb_s"} if cluster.nodes > 1 else set()
    stated |= {"gpu_hour_price"} if name != "local" else set()
    assert stated <= values.keys()


def test_every_described_machine_is_known_here() -> None:
    assert {path.stem for path in CLUSTERS.glob("*.yaml")} == set(SHAPES)
