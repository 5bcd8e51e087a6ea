"""What a chain needs, link by link: tokens, time and memory of each run, and what they come to."""

from __future__ import annotations

from typing import Any

from rxt_dist.config.chain import Chain
from rxt_dist.config.validate import settle_topology, validate_run
from rxt_dist.errors import UserError
from rxt_dist.plan.run import plan_run

_ADDED = ("tokens", "steps", "days_estimate", "gpu_hours_estimate")


def plan_chain(chain: Chain) -> dict[str, Any]:
    """`links`: of each run its stage, ranks, tokens, steps, days and GPU-hours with losses, and memory of a GPU;
    `total`: sums, and the largest memory.

    Raises:
        UserError: a run cannot work on its cluster; with the name of its link.
    """
    links = []
    for name, run in chain.runs.items():
        ranks = run.cluster.ranks
        try:
            settled = settle_topology(run, ranks)
            validate_run(settled, ranks, None)
        except UserError as error:
            raise type(error)(f"link '{name}': {error}") from error
        plan = plan_run(settled)
        links.append(
            {
                "link": name,
                "stage": run.stage.kind,
                "ranks": ranks,
                "tokens": run.train.total_tokens,
                "steps": plan["batch"]["steps"],
                "days_estimate": plan["cost"]["days_with_losses_estimate"],
                "gpu_hours_estimate": plan["cost"]["gpu_hours_estimate"],
                "memory_bytes_estimate": plan["settings"]["own_estimate"]["memory_bytes"],
                "gpu_memory_gb": run.cluster.gpu_memory_gb,
            }
        )
    total = {name: sum(link[name] for link in links) for name in _ADDED}
    most = max(link["memory_bytes_estimate"] for link in links)
    return {"chain": chain.name, "links": links, "total": {**total, "memory_bytes_estimate": most}}
