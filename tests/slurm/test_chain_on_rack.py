"""A chain of stages as jobs, each of which takes the weights of the one before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster_run import ON_CPUS, TWO_NODES, Launched, on_login_machine, on_this_machine
from rack import Rack
from training_run import TinyRun, build_interaction_shards

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(500)]
STEPS = 20


def write_chain(file: Path, shards: Path, made: Path) -> Path:
    """joint -> sft -> memory, on data that was made before."""
    tokenizer = shards / "tokenizer.json"
    read = {
        "joint": shards,
        "sft": build_interaction_shards(made / "single", tokenizer),
        "memory": build_interaction_shards(made / "dialogues", tokenizer, "dialogues"),
    }
    run = TinyRun(file.parent, shards, STEPS).content()
    run["train"]["micro_batch_rows"] = 4
    run |= {"parallel": {"engine": "deepspeed", "zero": 1}, "checkpoint": {"every_tokens": 4 * 512, "keep": 2}}
    links: dict[str, Any] = {
        kind: {"run": run | {"name": kind, "data": run["data"] | {"path": str(path)}, "stage": {"kind": kind}}}
        for kind, path in read.items()
    }
    # Two turns are two rows' worth of tokens.
    links["memory"]["set"] = {"stage": {"turns": 2}, "train": {"micro_batch_rows": 2}}
    content = {"name": "chain", "output": str(file.parent / "runs"), "links": links}
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def figures(run: Path) -> list[dict[str, float]]:
    """Step by step what training gave."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    wanted = ("step", "grad_norm", "lr")
    return [
        {name: value for name, value in line.items() if name in wanted or name.endswith("_loss")}
        for line in lines
        if "grad_norm" in line
    ]


@pytest.mark.usefixtures("tidy")
def test_a_chain_is_cancelled_goes_on_and_survives(rack: Rack, shards: Path) -> None:
    folder = rack.folder / "chain"
    folder.mkdir()
    file = write_chain(folder / "chain.yaml", shards, folder)
    joint, sft, memory = links = [Launched(rack, folder / f"runs/{name}") for name in ("joint", "sft", "memory")]

    def launch() -> str:
        """Held until all are submitted: a tiny link is faster than the submission of the next."""
        said = on_login_machine(
            rack, "launch", "slurm", str(file), *TWO_NODES, *ON_CPUS, "--no-preflight", "--sbatch=--hold", timeout=200
        )
        rack.on_login("scontrol", "release", ",".join(link.job for link in links))
        return said

    launch()
    joint.wait_for_step(2)
    rack.on_login("scancel", joint.job)
    for link in links:
        link.wait_for_end()
        assert link.detail("JobState") == "CANCELLED"
    assert not sft.ledger("life"), "it has nothing to begin with"
    assert "nothing can wait for it" in on_login_machine(rack, "launch", "resume", str(sft.directory), expected=64)

    launch()
    joint.wait("the second life", lambda: len(joint.events("ready")) == 2)
    joint.wait_for_step(joint.ledger("life")[1]["checkpoint"] + 1)
    joint.signal("USR2")
    joint.wait("a requeue", lambda: len(joint.ledger("life")) == 3)
    assert [link.queue("%T %r") for link in (sft, memory)] == ["PENDING Dependency"] * 2
    sft.wait_for_step(2)
    assert sft.ledger("life")[0]["time"] > joint.ledger("end")[-1]["time"]
    node = sft.nodes()[1]
    rack.on(node, "kill", "-KILL", str(max(sft.rank_processes(node))))
    sft.wait("a restart", lambda: len(sft.ledger("life")) == 2)
    assert memory.queue("%T %r") == "PENDING Dependency"
    memory.wait_for_end()
    assert memory.ledger("life")[0]["time"] > sft.ledger("end")[-1]["time"]
    assert [link.state() for link in links] == ["finished"] * 3
    assert [[end["action"] for end in link.ledger("end")] for link in links] == [
        ["cancelled", "requeue", "finished"], ["restart", "finished"], ["finished"],
    ]  # fmt: skip
    assert "nothing is left" in on_login_machine(rack, "launch", "slurm", str(file), *TWO_NODES, *ON_CPUS)

    on_this_machine("pipeline", str(file), f"output={folder}/local", "--ranks", "2")
    for link in links:
        assert figures(link.directory) == figures(folder / "local" / link.name)
