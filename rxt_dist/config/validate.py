"""Checks between the subjects of a run, made before anything is built: model, data, batch, ranks, schedule.

Each check raises a ConfigError that names the values and the ones that would do. What a single class can check by
itself is checked there (config/model.py, config/run.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from rxt_dist.config.model import ModelConfig
from rxt_dist.config.phases import check_phases, neighbours, phase_paths
from rxt_dist.config.run import RampConfig, RunConfig
from rxt_dist.errors import ConfigError, nearest
from rxt_dist.files import require_no_file

_SHOWN = 8
# Greater divisors are neither experts nor rows of a micro-batch.
_MOST_DIVISOR = 65_536
_MOST_ENLARGEMENTS = 10_000


@dataclass(frozen=True)
class DataFacts:
    """What a dataset states about itself in its manifest, as far as a run must fit it.

    row_tokens: what a row counts for in the budget and in the global batch.
    """

    seq_len: int
    row_tokens: int
    vocab_size: int
    sources: tuple[str, ...]
    tokenizer_sha: str


def settle_topology(config: RunConfig, world_size: int) -> RunConfig:
    """Replace expert_parallel 0 by the largest number of ranks of one node that divides experts and world size.

    Engine 'plain' and stages that train no experts get 1: there is nothing to split.
    """
    if config.parallel.expert_parallel:
        return config
    largest = max(expert_parallel_sizes(config, world_size))
    return config.model_copy(update={"parallel": config.parallel.model_copy(update={"expert_parallel": largest})})


def expert_parallel_sizes(config: RunConfig, world_size: int) -> list[int]:
    """The degrees of expert parallelism that stay inside a node, ascending."""
    if config.parallel.engine == "plain" or not _trains_experts(config):
        return [1]
    ranks = min(world_size, config.cluster.gpus_per_node)
    return [size for size in divisors(config.model.decoder.moe.experts) if size <= ranks and world_size % size == 0]


def validate_run(config: RunConfig, world_size: int, facts: DataFacts | None) -> None:
    """Refuse a run that cannot work on `world_size` ranks; `facts` is None where the data is not there yet.

    Raises:
        ConfigError: for the first check that fails.
    """
    require_no_file(config.directory)
    config = settle_topology(config, world_size)
    _check_engine(config, world_size)
    _check_experts(config, world_size)
    config.stage.check(config.model)
    _check_start(config)
    _check_schedule(config)
    _check_mixture(config, facts)
    if facts is not None:
        _check_data(config, facts)
    seq_len = config.data.seq_len or (facts.seq_len if facts else None)
    if seq_len is not None:
        _check_batch(config, world_size, seq_len, facts.row_tokens if facts else seq_len)
    elif config.train.ramp is not None:
        _check_ramp(config, config.train.ramp, world_size, None)


def _check_experts(config: RunConfig, world_size: int) -> None:
    moe, ranks = config.model.decoder.moe, config.parallel.expert_parallel
    if ranks == 1:
        return
    if not _trains_experts(config):
        raise ConfigError(
            f"expert_parallel is {ranks}, but stage '{config.stage.kind}' trains no experts, and only trained ones can "
            f"be split: set parallel.expert_parallel=1."
        )
    if moe.experts % ranks:
        raise ConfigError(
            f"expert_parallel {ranks} does not divide {moe.experts} experts: use {_one_of(divisors(moe.experts))}."
        )
    if world_size % ranks:
        common = [size for size in divisors(moe.experts) if world_size % size == 0]
        raise ConfigError(
            f"expert_parallel {ranks} does not divide {world_size} ranks: use {_one_of(common)}, or start a multiple "
            f"of {ranks} ranks."
        )


def _trains_experts(config: RunConfig) -> bool:
    """Whether the stage builds and trains routed experts. DeepSpeed splits no others: its optimizers want a group of
    expert parameters wherever there are split layers."""
    built = "decoder" in config.stage.parts() and config.model.moe_layers > 0
    return built and any(config.stage.rate_group(name) is not None for name in _an_expert_of_each_layer(config.model))


def _an_expert_of_each_layer(model: ModelConfig) -> list[str]:
    """Names of parameters: a stage may train the experts of some layers, and a dense layer has none."""
    before, after = model.decoder.stateless_before, model.decoder.stateless_after
    kinds = (*before, *("moe" for _ in range(model.layers)), *after)
    routed = (layer for layer, kind in enumerate(kinds) if kind == "moe")
    return [f"decoder.layers.{layer}.feed_forward.routed.experts.gate_up_proj" for layer in routed]


def _check_engine(config: RunConfig, world_size: int) -> None:
    parallel = config.parallel
    if parallel.engine == "deepspeed":
        return
    wrong = [
        text
        for text, bad in (
            (f"{world_size} ranks", world_size != 1),
            (f"zero {parallel.zero}", parallel.zero != 0),
            (f"expert_parallel {parallel.expert_parallel}", parallel.expert_parallel != 1),
        )
        if bad
    ]
    if wrong:
        raise ConfigError(
            f"engine 'plain' is one process and shards nothing, but the run has {' and '.join(wrong)}: start one rank "
            f"with parallel.zero=0 parallel.expert_parallel=1, or set parallel.engine=deepspeed."
        )


def _check_start(config: RunConfig) -> None:
    start, stage, parts = config.start, config.stage, config.stage.parts()
    taken, fresh = (start.taken, start.fresh) if start else ((), ())
    surplus = [part for part in (*taken, *fresh) if part not in parts]
    if surplus:
        raise ConfigError(
            f"start.parts names {', '.join(map(repr, surplus))}, but stage '{stage.kind}' builds "
            f"{', '.join(parts)}: leave {'it' if len(surplus) == 1 else 'them'} out."
        )
    untrained = [part for part in stage.expects() if part not in (*taken, *fresh)]
    if untrained:
        raise ConfigError(
            f"stage '{stage.kind}' builds on trained parts, and `start` takes no {', '.join(untrained)}: name the run "
            f"that has {'it' if len(untrained) == 1 else 'them'} (start: {{run: runs/NAME, parts: "
            f"[{', '.join(untrained)}]}}, or start.also for a second run), or say that a random beginning is meant: "
            f"start.fresh=[{', '.join(untrained)}]."
        )


def _check_schedule(config: RunConfig) -> None:
    train, schedule = config.train, config.schedule
    if train.total_tokens < train.global_batch_tokens:
        raise ConfigError(
            f"train.total_tokens ({train.total_tokens:,}) is less than one step of train.global_batch_tokens "
            f"({train.global_batch_tokens:,}): raise the first or lower the second."
        )
    if schedule.kind == "cosine" and schedule.decay_tokens:
        raise ConfigError(
            f"schedule.decay_tokens ({schedule.decay_tokens:,}) belongs to schedule.kind 'wsd'; a cosine decays from "
            f"the warm-up to the end. Remove it or set schedule.kind=wsd."
        )
    if schedule.warmup_tokens + schedule.decay_tokens > train.total_tokens:
        raise ConfigError(
            f"schedule.warmup_tokens ({schedule.warmup_tokens:,}) and decay_tokens ({schedule.decay_tokens:,}) exceed "
            f"train.total_tokens ({train.total_tokens:,}): together they may be at most as long as the training."
        )


def _check_mixture(config: RunConfig, facts: DataFacts | None) -> None:
    phases = config.data.mixture
    for index, (phase, path) in enumerate(zip(phases, phase_paths(config.data), strict=True)):
        if path != config.data.path:
            continue  # Names of other datasets than that of the facts are looked up when the order is planned.
        for source in {**phase.weights, **phase.tokens_per_source} if facts else ():
            if facts and source not in facts.sources:
                known = ", ".join(facts.sources)
                raise ConfigError(
                    f"data.mixture.{index} names '{source}', but {config.data.path} holds {known}."
                    f"{nearest(source, facts.sources)}"
                )
    check_phases(phases, config.train.total_tokens, facts.seq_len if facts else config.data.seq_len)


def _check_data(config: RunConfig, facts: DataFacts) -> None:
    if config.data.seq_len not in (None, facts.seq_len):
        raise ConfigError(
            f"data.seq_len is {config.data.seq_len}, but the rows in {config.data.path} have {facts.seq_len} tokens: "
            f"set data.seq_len={facts.seq_len}, or build the data again with rows of {config.data.seq_len}."
        )
    if facts.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size {config.model.vocab_size} is smaller than the vocabulary {facts.vocab_size} of the "
            f"tokenizer that wrote {config.data.path}: set model.vocab_size={facts.vocab_size} or more."
        )


def _check_batch(config: RunConfig, world_size: int, seq_len: int, row_tokens: int) -> None:
    train = config.train
    if seq_len > config.model.seq_len:
        raise ConfigError(
            f"rows of {seq_len} tokens are longer than model.seq_len ({config.model.seq_len}): set "
            f"model.seq_len={seq_len}, or take data with shorter rows."
        )
    _check_portion("train.global_batch_tokens", train.global_batch_tokens, config, world_size, row_tokens)
    if train.ramp is not None:
        _check_ramp(config, train.ramp, world_size, row_tokens)


def _check_ramp(config: RunConfig, ramp: RampConfig, world_size: int, row_tokens: int | None) -> None:
    full = config.train.global_batch_tokens
    if ramp.start_tokens >= full:
        raise ConfigError(
            f"train.ramp.start_tokens ({ramp.start_tokens:,}) is not below train.global_batch_tokens ({full:,}): the "
            f"ramp enlarges the batch, so start with less or set train.ramp=null."
        )
    if row_tokens is not None and ramp.over_tokens < row_tokens:
        raise ConfigError(
            f"train.ramp.over_tokens ({ramp.over_tokens:,}) is less than one row of {row_tokens} tokens: make it "
            f"longer, or set train.ramp=null."
        )
    if row_tokens is not None:
        _check_portion("train.ramp.start_tokens", ramp.start_tokens, config, world_size, row_tokens)
        _check_portion("train.ramp.increment_tokens", ramp.increment_tokens, config, world_size, row_tokens)
    if (full - ramp.start_tokens) // ramp.increment_tokens > _MOST_ENLARGEMENTS:
        raise ConfigError(
            f"train.ramp.increment_tokens ({ramp.increment_tokens:,}) reaches train.global_batch_tokens ({full:,}) "
            f"from {ramp.start_tokens:,} in more than {_MOST_ENLARGEMENTS:,} enlargements: enlarge by more."
        )
    if (full - ramp.start_tokens) % ramp.increment_tokens:
        raise ConfigError(
            f"train.ramp cannot reach train.global_batch_tokens ({full:,}) from {ramp.start_tokens:,} by "
            f"increment_tokens ({ramp.increment_tokens:,}): use an increment that divides {full - ramp.start_tokens:,}."
        )


def _check_portion(name: str, tokens: int, config: RunConfig, world_size: int, row_tokens: int) -> None:
    """`tokens` must be whole rows, and the rows whole micro-batches on every rank."""
    micro = config.train.micro_batch_rows
    if tokens % row_tokens:
        raise ConfigError(
            f"{name} ({tokens:,}) is not a whole number of rows of {row_tokens} tokens: use "
            f"{neighbours(tokens, row_tokens)}."
        )
    rows = tokens // row_tokens
    if rows % (world_size * micro) == 0:
        return
    portion = world_size * micro * row_tokens
    advice = f"set {name} to {neighbours(tokens, portion)}"
    if rows % world_size == 0:
        advice += f", or train.micro_batch_rows to {_one_of(divisors(rows // world_size))}"
    raise ConfigError(
        f"{name} is {rows} rows of {row_tokens} tokens, which {world_size} ranks cannot share in micro-batches of "
        f"{micro} rows (train.micro_batch_rows): {advice}."
    )


def divisors(number: int) -> list[int]:
    """All divisors up to 65,536, ascending."""
    return [candidate for candidate in range(1, min(number, _MOST_DIVISOR) + 1) if number % candidate == 0]


def _one_of(values: list[int]) -> str:
    """`1, 2 or 4`; of many values the largest ones."""
    shown = [str(value) for value in values[-_SHOWN:]]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} or {shown[-1]}"
