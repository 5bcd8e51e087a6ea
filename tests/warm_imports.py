"""What every run imports, for the server that forks them (warm_start.py)."""

import os

from rxt_dist.lasting import lasting_imports

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["DS_ACCELERATOR"] = "cpu"

with lasting_imports():
    import functorch.compile  # noqa: F401
    import megatron.core.num_microbatches_calculator  # noqa: F401  (for runs with a ramp)
    import pandas  # noqa: F401  (Arrow looks for it)
    import torch
    import torch._dynamo

    import data_prep.building.encode
    import data_prep.building.workers
    import data_prep.commands
    import data_prep.documents.build
    import data_prep.interactions.build
    import data_prep.megatron.importing
    import data_prep.shards.repack  # noqa: F401
    import rxt_dist.cli
    import rxt_dist.engine.deepspeed
    import rxt_dist.train.run  # noqa: F401

torch.set_num_threads(1)
