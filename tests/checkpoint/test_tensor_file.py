"""Tensors written a block at a time are a safetensors file as any other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rxt_dist.checkpoint import tensor_file
from rxt_dist.checkpoint.tensor_file import write_tensors
from rxt_dist.files import sha256_file

# Peak of resident memory while 256 MB are written, beyond what the tensors take.
WRITING = """
import sys
from pathlib import Path
import torch
from rxt_dist.checkpoint.tensor_file import write_tensors

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) << 10

tensors = {str(number): torch.full((1 << 25,), 0.5) for number in range(2)}
write_tensors(Path(sys.argv[1]) / "first", {"x": torch.zeros(1 << 23)})
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
write_tensors(Path(sys.argv[1]) / "second", tensors)
print(resident("VmHWM") - before)
"""


@pytest.mark.parametrize("block", [1, 3, 1 << 22])
def test_a_reader_finds_every_tensor_and_the_hash_of_the_file(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_file, "_BLOCK_ELEMENTS", block)
    tensors = {
        "weight|decoder.a|0": torch.randn(7),
        "exp_avg|decoder.a|5": torch.randn(12)[::2],
        "weight|ż|1": torch.tensor([float("nan"), -0.0, float("inf")]).requires_grad_(),
        "empty": torch.empty(0),
    }
    digest = write_tensors(tmp_path / "file", tensors)
    assert digest == sha256_file(tmp_path / "file")
    found = load_file(tmp_path / "file")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert torch.equal(found[name].view(torch.int32), value.detach().contiguous().view(torch.int32)), name
    length = int.from_bytes((tmp_path / "file").read_bytes()[:8], "little")
    assert length % 8 == 0, "readers map the data, which must be aligned"


@pytest.mark.parametrize("value", [torch.zeros(2, 2), torch.zeros(2, dtype=torch.bfloat16)])
def test_what_is_no_piece_of_a_parameter_is_refused(value: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'x' is torch\.\w+ .*, not float32 \[n\]"):
        write_tensors(tmp_path / "file", {"x": value})


@pytest.mark.slow
def test_writing_takes_the_memory_of_a_few_blocks(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", WRITING, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 48 << 20
