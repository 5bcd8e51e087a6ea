"""What a run refuses before it builds anything: each with its exit code and what to do, and nothing written."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from training_run import SEQ_LEN, TinyRun, build_shards

from rxt_dist.config.load import load_run
from rxt_dist.errors import ConfigError, DataError, DiskError, UserError
from rxt_dist.lives import Life
from rxt_dist.ranks import Ranks
from rxt_dist.train.run import train
from rxt_dist.train.signals import StopRequest


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture
def tiny(tmp_path, built):
    shutil.copytree(built, tmp_path / "shards")
    return TinyRun(tmp_path, tmp_path / "shards")


def refused(tiny: TinyRun, *overrides: str) -> UserError:
    """Start training in this process; it must refuse before the run directory exists."""
    config = load_run(tiny.file, list(overrides))
    existed = tiny.directory.exists()
    with pytest.raises(UserError) as caught:
        train(config, Ranks(0, 1, 0), StopRequest(tiny.folder / "STOP"))
    assert tiny.directory.exists() == existed
    assert len(str(caught.value)) > 60
    return caught.value


def first_shard(tiny: TinyRun):
    return sorted(tiny.shards.rglob("train/*.arrow"))[0]


@pytest.mark.parametrize("output", ["/proc/rxt", "LINK"])
def test_a_run_directory_that_cannot_be_written_to(tiny, output):
    (tiny.folder / "LINK").symlink_to(tiny.folder / "nowhere")
    place = tiny.folder / output
    error = refused(tiny, f"output={place}")
    assert isinstance(error, ConfigError)
    assert str(place) in str(error)


def test_no_data(tiny):
    error = refused(tiny, f"data.path={tiny.folder / 'nowhere'}")
    assert isinstance(error, DataError)
    assert "nowhere" in str(error)


def test_a_missing_shard(tiny):
    shard = first_shard(tiny)
    shard.unlink()
    error = refused(tiny)
    assert isinstance(error, DataError)
    assert shard.name in str(error)


def test_a_truncated_shard(tiny):
    shard = first_shard(tiny)
    shard.write_bytes(shard.read_bytes()[:-100])
    error = refused(tiny)
    assert isinstance(error, DataError)
    assert shard.name in str(error)


def test_a_flipped_bit(tiny):
    """Nothing is hashed before training: the row is refused when it is read, and nothing was computed from it."""
    for shard in tiny.shards.rglob("train/*.arrow"):
        content = np.fromfile(shard, dtype=np.uint16)
        content[:] ^= 4
        content.tofile(shard)
    config = load_run(tiny.file, [])
    with pytest.raises(DataError, match="does not match its checksum"):
        train(config, Ranks(0, 1, 0), StopRequest(tiny.folder / "STOP"))
    assert not list(tiny.directory.rglob("step-*"))


def test_a_vocabulary_smaller_than_the_data_s(tiny):
    error = refused(tiny, "model.vocab_size=100")
    assert isinstance(error, ConfigError)
    assert "model.vocab_size" in str(error)


def test_rows_longer_than_the_data_s(tiny):
    error = refused(tiny, "data.seq_len=128", "model.seq_len=128")
    assert isinstance(error, ConfigError)
    assert f"{SEQ_LEN}" in str(error)


def test_rows_longer_than_the_model_s(tiny):
    error = refused(tiny, "model.seq_len=32")
    assert isinstance(error, ConfigError)
    assert "model.seq_len" in str(error)


def test_a_tokenizer_that_is_not_the_data_s(tiny):
    content = json.loads((tiny.shards / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:-1]
    other = tiny.folder / "other.json"
    other.write_text(json.dumps(content))
    error = refused(tiny, f"data.tokenizer={other}")
    assert isinstance(error, DataError)
    assert "tokenizer" in str(error)


def test_a_file_that_is_no_tokenizer(tiny):
    other = tiny.folder / "other.json"
    other.write_text("{}")
    assert "cannot be read as a tokenizer.json" in str(refused(tiny, f"data.tokenizer={other}"))


def test_the_data_s_own_tokenizer_is_accepted(tiny):
    error = refused(tiny, f"data.tokenizer={tiny.shards / 'tokenizer.json'}", "model.vocab_size=100")
    assert isinstance(error, ConfigError)


def test_more_epochs_than_allowed(tiny):
    error = refused(tiny, "data.max_epochs=0.1")
    assert isinstance(error, ConfigError)
    assert "max_epochs" in str(error)


def test_an_unknown_source_in_the_mixture(tiny):
    error = refused(tiny, "data.mixture=[{weights: {en: 1, pol: 1}}]")
    assert isinstance(error, ConfigError)
    assert "'pol'" in str(error)
    assert "'pl'" in str(error)


def test_too_little_disk(tiny, monkeypatch):
    usage = shutil.disk_usage(tiny.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    error = refused(tiny)
    assert isinstance(error, DiskError)
    assert error.exit_code == 74


def test_a_run_directory_of_another_configuration(tiny):
    from rxt_dist.config.load import resolved_yaml, training_hash
    from rxt_dist.train.run_dir import RunDirectory

    config = load_run(tiny.file, ["optimizer.eps=5e-3"])
    RunDirectory(config.directory).begin(resolved_yaml(config), training_hash(config), Life("a", 0.0), 1)
    error = refused(tiny)
    assert isinstance(error, ConfigError)
    assert "optimizer.eps" in str(error)
    assert "0.005" in str(error)


def test_an_impossible_topology(tiny):
    assert isinstance(refused(tiny, "parallel.engine=deepspeed", "parallel.expert_parallel=3"), ConfigError)


def test_a_batch_that_the_rows_do_not_divide(tiny):
    assert isinstance(refused(tiny, f"train.global_batch_tokens={5 * SEQ_LEN}"), ConfigError)


def test_a_run_does_not_begin_from_itself(tiny):
    for name in ("tiny", "../runs/tiny"):
        text = str(refused(tiny, f"start={{run: {tiny.folder}/runs/{name}, parts: [decoder]}}"))
        assert "this run itself, which has no checkpoint to begin from" in text
