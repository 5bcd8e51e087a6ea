"""Runs that are really stopped and killed: nothing committed is lost, and the curve is that of an undisturbed run."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable

import psutil
import pytest
from damage import flip_a_bit
from taken_down import note_who_is_taken_down
from training_run import Running, TinyRun, build_shards, run, start

pytestmark = pytest.mark.faults

# Long enough that a run of three lives, each killed some steps after a save, is not over before the last kill.
STEPS = 40


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return build_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, shards):
    tiny = TinyRun(tmp_path_factory.mktemp("undisturbed"), shards, STEPS)
    run(tiny.train_command())
    assert len(tiny.curve()) == tiny.steps
    return tiny


def wait_for_step(tiny: TinyRun, step: int, process) -> None:
    """Until the run has logged `step`."""
    wait_for(lambda: any(line["step"] >= step for line in tiny.lines()), process)


def newest_save(tiny: TinyRun) -> int:
    return max((event["step"] for event in tiny.events("save")), default=0)


def train_until(tiny: TinyRun, step: int, *overrides: str) -> None:
    """Train, and stop the run by SIGTERM once it has logged `step`; it must save and exit with 75."""
    stop_at(tiny, step, lambda process: process.send_signal(signal.SIGTERM), *overrides)


def stop_at(tiny: TinyRun, step: int, ask: Callable[[Running], None], *overrides: str, code: int = 75) -> None:
    """Train a fresh run and ask it to stop at `step`; on a busy machine it may end first, and is then tried again."""
    for _ in range(5):
        process = start(tiny.train_command(*overrides))
        wait_for_step(tiny, step, process)
        ask(process)
        output, _ = process.communicate(timeout=100)
        if process.returncode == 0 and tiny.events("finish"):
            shutil.rmtree(tiny.directory)
            continue
        assert process.returncode == code, output
        return
    pytest.fail("the run always ended before it could be asked to stop")


def wait_for(condition, process) -> None:
    """Until something is so, while the process runs."""
    end = time.monotonic() + 90
    while not condition():
        assert process.poll() is None or condition(), process.communicate()[0]
        assert time.monotonic() < end, "no progress"
        time.sleep(0.02)


def test_an_undisturbed_run_ends_with_a_checkpoint_and_an_evaluation(undisturbed):
    assert undisturbed.events("save")[-1]["step"] == undisturbed.steps
    evaluated = undisturbed.lines()[-1]
    for source in ("en", "pl"):
        for memory in ("true", "zero", "foreign"):
            assert 0 <= evaluated[f"eval/{source}/{memory}/ar_accuracy"] <= 1
    assert undisturbed.curve()[-1][1] < undisturbed.curve()[0][1]


def test_another_life_on_a_finished_run_changes_nothing(undisturbed):
    before = undisturbed.lines()
    assert "finished" in run(undisturbed.train_command())
    assert undisturbed.lines() == before


def test_sigterm_saves_exits_75_and_the_next_life_goes_on_bit_equal(tmp_path, shards, undisturbed):
    tiny = TinyRun(tmp_path, shards, STEPS)
    train_until(tiny, 8)
    stopped = tiny.events("stop")[0]["step"]
    assert tiny.events("save")[-1]["step"] == stopped
    run(tiny.train_command())
    assert tiny.events("resume")[0]["step"] == stopped
    assert tiny.curve() == undisturbed.curve()


def test_a_stop_file_does_the_same(tmp_path, shards):
    tiny = TinyRun(tmp_path, shards, STEPS)
    stop_at(tiny, 3, lambda process: (tiny.directory / "STOP").touch(), code=76)
    assert "stop file" in tiny.events("stop")[0]["reason"]


def test_sigkill_at_random_moments_loses_nothing_committed(tmp_path, shards, undisturbed):
    chance = random.Random(7)
    tiny = TinyRun(tmp_path, shards, STEPS)
    for life in range(3):
        process = start(tiny.train_command())
        # Lines of the last life stand until the resume drops them.
        wait_for(lambda life=life: len(tiny.events("resume")) == life, process)
        saved = newest_save(tiny)
        # Saves go on beside the steps, and are not always done before the next.
        wait_for(lambda saved=saved: newest_save(tiny) > saved, process)
        wait_for_step(tiny, newest_save(tiny) + chance.randrange(1, 4), process)
        time.sleep(chance.random() * 0.1)
        process.kill()
        assert process.wait() == -signal.SIGKILL, "the run ended before the kill"
    run(tiny.train_command())
    assert len(tiny.events("resume")) == 3
    assert all(event["step"] > 0 for event in tiny.events("resume"))
    assert tiny.curve() == undisturbed.curve()


def test_a_damaged_checkpoint_is_passed_over_and_said_so(tmp_path, shards, undisturbed):
    tiny = TinyRun(tmp_path, shards, STEPS)
    train_until(tiny, 13)
    newest = sorted((tiny.directory / "checkpoints").glob("step-*"))[-1]
    flip_a_bit(newest / "rank-00000.safetensors")
    output = run(tiny.train_command())
    assert newest.name in output
    assert "rejected" in output
    assert tiny.events("resume")[0]["step"] == 10
    assert tiny.curve() == undisturbed.curve()


def test_a_run_whose_checkpoints_are_all_damaged_is_not_trained_over(tmp_path, shards):
    tiny = TinyRun(tmp_path, shards, STEPS)
    train_until(tiny, 12)
    for checkpoint in (tiny.directory / "checkpoints").glob("step-*"):
        flip_a_bit(checkpoint / "rank-00000.safetensors")
    before = tiny.lines(), sorted((tiny.directory / "checkpoints").rglob("*"))
    output = run(tiny.train_command(), expected=65)
    assert "will not start again from nothing" in output
    assert (tiny.lines(), sorted((tiny.directory / "checkpoints").rglob("*"))) == before


def test_two_processes_cannot_train_one_run(tmp_path, shards):
    tiny = TinyRun(tmp_path, shards, steps=400)
    first = start(tiny.train_command())
    wait_for_step(tiny, 2, first)
    assert "is being trained by another process" in run(tiny.train_command(), expected=64)
    first.send_signal(signal.SIGTERM)
    assert first.wait(100) == 75


def test_a_batch_ramp_goes_on_bit_equal_after_a_stop(tmp_path, shards):
    """From 4 to 8 rows over 60 rows; stopped inside the ramp."""
    ramp = f"train.ramp={{start_tokens: {4 * 64}, increment_tokens: {4 * 64}, over_tokens: {60 * 64}}}"
    whole, halves = (TinyRun(tmp_path / name, shards, steps=14) for name in ("whole", "halves"))
    for tiny in (whole, halves):
        tiny.folder.mkdir()
    overrides = (ramp, "train.micro_batch_rows=4")
    run(whole.train_command(*overrides))
    train_until(halves, 4, *overrides)
    run(halves.train_command(*overrides))
    assert halves.curve() == whole.curve()
    tokens = [line["tokens"] for line in whole.lines() if "ar_loss" in line]
    assert len(tokens) > 20
    assert [b - a for a, b in zip([0, *tokens], tokens, strict=False)] == [256] * 15 + [512] * (len(tokens) - 15)


@pytest.mark.distributed
def test_a_killed_rank_ends_the_others_and_the_launcher_starts_all_again(tmp_path, shards, monkeypatch):
    """Two ranks, ZeRO-3, expert parallelism 2; rank 1 is killed after the first checkpoint."""
    tiny = TinyRun(tmp_path, shards, steps=11)
    taken_down = note_who_is_taken_down(tmp_path, monkeypatch)
    process = start(tiny.launch_command("--resume-attempts", "1"))
    wait_for_step(tiny, 7, process)
    ranks = psutil.Process(process.pid).children()
    assert len(ranks) == 2
    victim = next(rank for rank in ranks if rank.environ()["RANK"] == "1")
    os.kill(victim.pid, signal.SIGKILL)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0, output
    assert [event["step"] for event in tiny.events("resume")] == [5]
    assert len(tiny.curve()) == tiny.steps
    assert tiny.events("finish")
    # The launcher alone; ranks end before that.
    assert taken_down.read_text() == "None\n"


def test_a_crash_in_native_code_leaves_the_stacks(tmp_path, shards):
    tiny = TinyRun(tmp_path, shards)
    process = start(tiny.train_command())
    wait_for_step(tiny, 1, process)
    process.send_signal(signal.SIGABRT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in output
    assert "in run_loop" in output
    assert "Thread 0x" in output, "those of other threads too"
