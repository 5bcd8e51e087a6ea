"""Everything that would refuse a link of a chain at its start, asked before the first step of the first one: a chain
must not die of a typing error after a week. `python -m rxt_dist.train.chain_check CHAIN.yaml RANKS [a.b=c ...]`.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from rxt_dist.checkpoint.retention import MIN_KEEP
from rxt_dist.checkpoint.start import check_origin, check_shapes, check_tokenizer, shapes_of
from rxt_dist.checkpoint.store import CheckpointStore
from rxt_dist.config.chain import Chain, DataJob, load_chain
from rxt_dist.config.load import load_run, resolved_yaml, training_hash
from rxt_dist.config.run import RunConfig
from rxt_dist.config.validate import settle_topology, validate_run
from rxt_dist.errors import ConfigError, DataError, UserError
from rxt_dist.finished import is_finished
from rxt_dist.stages.base import build_network
from rxt_dist.train.chain_dir import ChainDirectory
from rxt_dist.train.preflight import has_checkpoints, preflight
from rxt_dist.train.run_dir import RunDirectory


def check_chain(chain: Chain, ranks: int | None) -> None:
    """Refuse a chain of which a link would be refused when it comes to it.

    Args:
        ranks: of every run; None: as many as each run's cluster has.

    Raises:
        UserError: whatever would stop a link, with its name.
    """
    folder = ChainDirectory(chain)
    tokenizers: dict[str, str] = {}
    for link in chain.links:
        try:
            if isinstance(link.work, DataJob):
                folder.check_job(link.name, link.work)
                continue
            sha = _check_run(chain, link.name, link.work, ranks or link.work.cluster.ranks, folder)
            _check_tokenizers(link.origins, sha, tokenizers)
            if sha is not None:
                tokenizers[link.name] = sha
        except UserError as error:
            raise type(error)(f"link '{link.name}': {error}") from error


def _check_run(chain: Chain, name: str, config: RunConfig, ranks: int, folder: ChainDirectory) -> str | None:
    """Fingerprint of the tokenizer of its data, where that is there."""
    RunDirectory(config.directory).check(resolved_yaml(config), training_hash(config))
    _check_history(chain, name, config)
    if is_finished(config.directory):
        _require_unchanged(config)
        return None
    settled = settle_topology(config, ranks)
    sha = None
    if not all(folder.job_is_done(job) for job in chain.awaited_jobs(name)):
        validate_run(settled, ranks, None)
    else:
        sha = preflight(settled, ranks, start_later=True).facts.tokenizer_sha
    if config.start is None or has_checkpoints(config):
        return sha
    with torch.device("meta"):
        model = build_network(config)
    to_come = {run.directory.resolve(): run for run in chain.runs.values() if not is_finished(run.directory)}
    for origin in config.start.origins:
        later = to_come.get(origin.run.resolve()) if origin.run is not None else None
        if later is not None:
            check_shapes(origin, shapes_of(later), model)
            continue
        check_origin(origin, model, config.start.unfinished)
        if sha is not None:
            check_tokenizer(origin, sha)
    return sha


def _require_unchanged(config: RunConfig) -> None:
    """Refuse a finished run of which something was changed that may be turned while it trains: now it is too late."""
    old = load_run(config.directory / "config.resolved.yaml")
    pairs = {
        "optimizer.lr": (old.optimizer.lr, config.optimizer.lr),
        "optimizer.clip": (old.optimizer.clip, config.optimizer.clip),
        "data.mixture": (old.data.mixture, config.data.mixture),
    }
    changed = [f"{name} was {was}, is {now}" for name, (was, now) in pairs.items() if was != now]
    if changed:
        raise ConfigError(
            f"{config.directory} is finished, and {'; '.join(changed)}: nothing would be trained with that. Restore "
            f"what it was; to train this link again, remove {config.directory} or give it another name."
        )


def _check_tokenizers(origins: Collection[str], sha: str | None, known: dict[str, str]) -> None:
    """The data of a link, and that of the links whose weights it takes, must be of one tokenizer."""
    for origin in origins:
        if sha is not None and known.get(origin, sha) != sha:
            raise DataError(
                f"its data was made with tokenizer {sha[:16]}..., but link '{origin}', whose weights it takes, reads "
                f"data of {known[origin][:16]}...: every id would mean something else. Make both with one tokenizer."
            )


def _check_history(chain: Chain, name: str, config: RunConfig) -> None:
    """Refuse a link that has begun with weights which the chain has no more: of a run that is to be trained, or was
    trained again."""
    if config.start is None or not has_checkpoints(config):
        return
    begun = _meta(config).get("origin") or {}
    recorded = {str(one["path"]): one.get("run_id") for one in (begun, *begun.get("also", ())) if one}
    for other, run in chain.runs.items():
        if run.directory not in [origin.run for origin in config.start.origins]:
            continue
        told = recorded.get(str(run.directory))
        if not is_finished(run.directory):
            what = "is not finished (any more)"
        elif told not in (None, _meta(run).get("run_id")):
            what = f"is another training than the one whose weights it took (run {told})"
        else:
            continue
        raise ConfigError(
            f"it has begun with the weights of link '{other}', but {run.directory} {what}. Restore that folder, or "
            f"remove {config.directory} to train this link again."
        )


def _meta(config: RunConfig) -> dict[str, Any]:
    store = CheckpointStore(config.directory / "checkpoints", MIN_KEEP)
    return dict(store.read(max(store.steps())).meta)


def main() -> int:
    """Check; what refuses the chain goes to stderr, with its exit code."""
    file, ranks, *overrides = sys.argv[1:]
    try:
        check_chain(load_chain(Path(file), overrides), int(ranks) or None)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    return 0


if __name__ == "__main__":
    sys.exit(main())
