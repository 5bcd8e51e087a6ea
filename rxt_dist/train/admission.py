"""Everything that would refuse a run at its start, asked on another machine before: a job that has waited in a queue
for days must not end in the first minute. `python -m rxt_dist.train.admission RUN.yaml WORLD_SIZE ... [--start-later]`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rxt_dist.config.load import load_run, resolved_yaml, training_hash
from rxt_dist.config.run import RunConfig
from rxt_dist.config.validate import settle_topology
from rxt_dist.errors import ConfigError, UserError
from rxt_dist.files import lasting_errors
from rxt_dist.train.preflight import preflight
from rxt_dist.train.run_dir import RunDirectory


def admitted(config: RunConfig, world_sizes: Sequence[int], start_later: bool) -> list[int]:
    """Those of `world_sizes` that the run can work on; the first must be one of them.

    Args:
        start_later: the run that the weights come from is not trained yet.

    Raises:
        UserError: whatever would stop the run on the first number of ranks.
    """
    if not start_later:
        # A run that begins with other weights is another one only by these.
        with lasting_errors(config.directory):
            RunDirectory(config.directory).check(resolved_yaml(config), training_hash(config))
    found: list[int] = []
    for world_size in world_sizes:
        try:
            preflight(settle_topology(config, world_size), world_size, start_later)
        except ConfigError:
            if not found:
                raise
            continue
        found.append(world_size)
    return found


def main() -> int:
    """Print the numbers of ranks as JSON; or an error, with its exit code."""
    later = "--start-later" in sys.argv
    file, *numbers = (argument for argument in sys.argv[1:] if argument != "--start-later")
    try:
        print(json.dumps(admitted(load_run(Path(file)), [int(number) for number in numbers], later)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    return 0


if __name__ == "__main__":
    sys.exit(main())
