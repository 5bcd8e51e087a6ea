"""Where the tests of this folder run: on the GPU, or on the CPU in a dry run (RXT_CUDA_TESTS=cpu).

With RXT_CUDA_TESTS=cpu-sample each test has its first and last set of parameters alone.
"""

from __future__ import annotations

import os

import torch

DRY = os.environ.get("RXT_CUDA_TESTS") in ("cpu", "cpu-sample")
SAMPLED = os.environ.get("RXT_CUDA_TESTS") == "cpu-sample"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not DRY else "cpu")
