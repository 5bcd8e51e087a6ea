"""kill -9 in the middle of building interactions: the next run finishes, with the same files."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep import synthetic
from data_prep.corpora import Document
from data_prep.interactions import build as interaction_build
from data_prep.interactions.build import InteractionRequest, build_interactions
from data_prep.interactions.synthetic import write_interactions
from data_prep.tokenizing.tokenizer import save_tokenizer, train_tokenizer

UNIT_BYTES = 60_000
BUILD = """
import sys
from pathlib import Path
from data_prep.interactions import build as b
b._UNIT_BYTES = int(sys.argv[5])
paths = [Path(a) for a in sys.argv[1:4]]
print("ready", flush=True)
b.build_interactions(b.InteractionRequest((paths[0],), paths[1], paths[2], 128, sys.argv[4]))
"""


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["single", "dialogues"])
def test_killed_builds_are_finished_with_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    rng = random.Random(1)
    documents = (Document(synthetic.story(rng, "en"), "en", "en", "") for _ in range(50))
    save_tokenizer(train_tokenizer(documents, 500), tmp_path / "t.json")
    for number in range(8):
        write_interactions(tmp_path / f"in/{number}", 250_000, number)
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    for number in range(8):
        (tmp_path / f"in/{number}/{kind}").rename(inputs / str(number))
    monkeypatch.setattr(interaction_build, "_UNIT_BYTES", UNIT_BYTES)
    whole = build_interactions(InteractionRequest((inputs,), tmp_path / "whole", tmp_path / "t.json", 128, kind))
    assert whole.units >= 8
    out, killed = tmp_path / "out", 0
    for _ in range(40):
        arguments = [inputs, out, tmp_path / "t.json", kind, UNIT_BYTES]
        process = subprocess.Popen([sys.executable, "-c", BUILD, *map(str, arguments)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(rng.uniform(0.01, 0.2))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        process.stdout.close()
        if killed >= 4:
            break
        if (out / "dataset.json").exists():  # it ended before the kill, so the next one would find nothing to do
            shutil.rmtree(out)
    assert killed >= 4
    result = build_interactions(InteractionRequest((inputs,), out, tmp_path / "t.json", 128, kind))
    assert (result.manifest, result.counts, result.sources) == (whole.manifest, whole.counts, whole.sources)
    contents = [
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path / "whole", out)
    ]
    assert contents[0] == contents[1]
