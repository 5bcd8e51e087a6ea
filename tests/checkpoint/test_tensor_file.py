"""Tensors written a block at a time are a safetensors file as any other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rxt_dist.checkpoint import tensor_file
from rxt_dist.checkpoint.tensor_file import Described, write_blocks, write_tensors
from rxt_dist.files import blake3_file

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
    assert digest == blake3_file(tmp_path / "file")
    found = load_file(tmp_path / "file")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert torch.equal(found[name].view(torch.int32), value.detach().contiguous().view(torch.int32)), name
    length = int.from_bytes((tmp_path / "file").read_bytes()[:8], "little")
    assert length % 8 == 0, "readers map the data, which must be aligned"


def test_other_types_and_shapes_are_written_as_they_are(tmp_path: Path) -> None:
    tensors = {
        "counts": torch.arange(6).view(2, 3).t(),
        "rounded": torch.randn(2, 2).bfloat16(),
        "one": torch.tensor(0.5),
    }
    assert write_tensors(tmp_path / "file", tensors) == blake3_file(tmp_path / "file")
    found = load_file(tmp_path / "file")
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


def test_a_type_that_is_never_saved_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'x' is torch.float64, but what is written is torch.float32"):
        write_tensors(tmp_path / "file", {"x": torch.zeros(2, dtype=torch.float64)})


def test_blocks_that_are_not_what_was_described_are_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got \d+ bytes, not the"):
        write_blocks(tmp_path / "file", {"x": Described(torch.float32, (3,))}, [torch.zeros(2)])


def test_a_file_can_be_read_by_whom_other_files_can(tmp_path: Path) -> None:
    """The library makes files that only their owner can read."""
    write_tensors(tmp_path / "file", {"x": torch.zeros(1)})
    (tmp_path / "other").write_text("")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.slow
def test_writing_takes_the_memory_of_a_few_blocks(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", WRITING, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 48 << 20


def test_nothing_is_written_over_a_file_that_is_there(tmp_path: Path) -> None:
    """It may be another life's, and recorded already."""
    write_tensors(tmp_path / "file", {"x": torch.ones(3)})
    before = (tmp_path / "file").read_bytes()
    with pytest.raises(FileExistsError):
        write_tensors(tmp_path / "file", {"x": torch.zeros(3)})
    assert (tmp_path / "file").read_bytes() == before
