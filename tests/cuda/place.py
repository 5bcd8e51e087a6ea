"""Where the tests of this folder run: on the GPU, or on the CPU in a dry run (RXT_CUDA_TESTS=cpu)."""

from __future__ import annotations

import os

import torch

DRY = os.environ.get("RXT_CUDA_TESTS") == "cpu"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not DRY else "cpu")
