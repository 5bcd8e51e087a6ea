"""A chain of runs, link after link: what is passed over, what ends it, how it goes on, what is refused before."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from training_run import TinyRun, build_interaction_shards, build_shards

from launch.local import Launch
from launch.pipeline import Options, Pipeline, refusal_of
from launch.watching import Received
from rxt_dist.checkpoint.retention import MIN_KEEP
from rxt_dist.checkpoint.store import CheckpointStore
from rxt_dist.config.chain import Chain, DataJob, load_chain
from rxt_dist.config.load import load_run
from rxt_dist.errors import ConfigError, DataError, ExitCode
from rxt_dist.ranks import Ranks
from rxt_dist.report.chain import link_states, runs_of, status_lines
from rxt_dist.train.chain_check import check_chain
from rxt_dist.train.chain_dir import ChainDirectory
from rxt_dist.train.run import train
from rxt_dist.train.signals import StopRequest

STEPS = 3
READS = {"joint": "documents", "sft": "single", "memory": "dialogues", "smat": "dialogues"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("shards")
    documents = build_shards(folder / "documents")
    tokenizer = documents / "tokenizer.json"
    single = build_interaction_shards(folder / "single", tokenizer)
    return {
        "documents": documents,
        "single": single,
        "dialogues": build_interaction_shards(folder / "dialogues", tokenizer, "dialogues"),
    }


def content_of(folder: Path, shards: dict[str, Path]) -> dict[str, Any]:
    """joint -> sft -> memory -> smat, a few steps each."""
    run = TinyRun(folder, shards["documents"], STEPS).content()
    links: dict[str, Any] = {}
    for kind, read in READS.items():
        data = run["data"] | {"path": str(shards[read])}
        links[kind] = {"run": run | {"name": kind, "data": data, "stage": {"kind": kind}}}
    # Two turns are two rows' worth of tokens.
    links["memory"]["set"] = links["smat"]["set"] = {"stage": {"turns": 2}, "train": {"micro_batch_rows": 2}}
    return {"name": "chain", "output": str(folder / "runs"), "links": links}


def write(folder: Path, content: dict[str, Any]) -> Path:
    path = folder / "chain.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture
def file(tmp_path: Path, shards: dict[str, Path]) -> Path:
    return write(tmp_path, content_of(tmp_path, shards))


def in_process(wanted: Launch, received: Received) -> int:
    """Train in this process what a launch would start."""
    file, *overrides = wanted.command[4:]
    config = load_run(Path(file), overrides)
    with StopRequest(config.directory / "STOP") as stop:
        return int(train(config, Ranks(0, 1, 0), stop))


def weights_of(run: Path) -> tuple[int, Any]:
    store = CheckpointStore(run / "checkpoints", MIN_KEEP)
    newest = store.read(store.steps()[-1])
    return newest.step, newest.meta["state_checksum"]


def names(calls: list[Launch]) -> list[str]:
    return [call.run.name for call in calls if call.run is not None]


def noting(calls: list[Launch], *codes: int | Callable[[], int] | None) -> Callable[[Launch, Received], int]:
    """Notes what is launched; the first launches end with these codes without training, None and the others train."""
    left = list(codes)

    def start(wanted: Launch, received: Received) -> int:
        calls.append(wanted)
        if left:
            code = left.pop(0)
            if code is not None:
                return code() if callable(code) else code
        return in_process(wanted, received)

    return start


def finish(chain: Chain, name: str) -> int:
    """Make a link finished without training it."""
    run = chain.runs[name].directory
    (run / f"checkpoints/step-{STEPS:08d}").mkdir(parents=True)
    (run / "finished.json").write_text(json.dumps({"step": STEPS}))
    return 0


@pytest.mark.slow
def test_a_chain_goes_on_where_it_ended_with_the_same_result(file: Path, tmp_path: Path) -> None:
    chain = load_chain(file)
    check_chain(chain, 1)
    assert not (tmp_path / "runs").exists(), "to check makes nothing"
    calls: list[Launch] = []
    assert Pipeline(chain, Options(ranks=1), noting(calls)).run() == ExitCode.DONE
    assert names(calls) == ["joint", "sft", "memory", "smat"]
    wanted = [weights_of(run.directory) for run in chain.runs.values()]
    assert [step for step, _ in wanted] == [STEPS] * 4
    origin = json.loads((chain.runs["smat"].directory / "environment.json").read_text())["origin"]
    places = [(place["path"], place["step"], place["parts"]) for place in (origin, *origin["also"])]
    assert places == [
        (str(tmp_path / "runs/memory"), STEPS, ["embedding", "encoder", "memory_attention"]),
        (str(tmp_path / "runs/sft"), STEPS, ["decoder", "lm_head"]),
    ]

    again: list[Launch] = []
    check_chain(chain, 1)
    assert Pipeline(chain, Options(ranks=1), noting(again)).run() == ExitCode.DONE
    assert not again, "all are finished"

    other = load_chain(file, [f"output={tmp_path}/other"])
    calls = []
    stopped = noting(calls, lambda: stopped_at_once(other, "joint"))
    assert Pipeline(other, Options(1), stopped).run() == ExitCode.STOPPED
    assert 0 < weights_of(other.runs["joint"].directory)[0] < STEPS
    check_chain(other, 1)
    assert Pipeline(other, Options(1), noting(calls, None, None, 86)).run() == 86
    assert names(calls) == ["joint", "joint", "sft", "memory"]
    assert [weights_of(other.runs[name].directory) for name in ("joint", "sft")] == wanted[:2]

    # What was finished is no more what it was.
    text = refusal(load_chain(file, ["sft.seed=9"]))
    assert "link 'sft'" in text
    assert "seed was 1, is 9" in text
    text = refusal(load_chain(file, ["sft.optimizer.lr=0.5"]))
    assert "is finished, and optimizer.lr was 0.001, is 0.5: nothing would be trained with that" in text
    check_chain(load_chain(file, ["common.train.micro_batch_rows=2", "common.log.every_steps=2"]), 1)
    shutil.rmtree(chain.runs["joint"].directory)
    text = refusal(chain)
    assert "link 'sft': it has begun with the weights of link 'joint', but" in text
    assert "is not finished" in text
    shutil.copytree(other.runs["joint"].directory, chain.runs["joint"].directory)
    assert "is another training than the one whose weights it took" in refusal(chain)


def stopped_at_once(chain: Chain, name: str) -> int:
    """Train a link until a STOP that is there from the beginning."""
    config = load_run(ChainDirectory(chain).run_file(name))
    config.directory.mkdir(parents=True)
    (config.directory / "STOP").touch()
    with StopRequest(config.directory / "STOP", old_stop="") as stop:
        return int(train(config, Ranks(0, 1, 0), stop))


def refusal(chain: Chain) -> str:
    with pytest.raises((ConfigError, DataError)) as caught:
        check_chain(chain, 1)
    return str(caught.value)


@pytest.mark.parametrize("code", [64, 65, 75, 76, 86, 87, 93, 1])
def test_the_exit_code_of_a_link_is_that_of_the_chain(code: int, file: Path) -> None:
    chain = load_chain(file)
    calls: list[Launch] = []
    assert Pipeline(chain, Options(3, 2), noting(calls, lambda: finish(chain, "joint"), code)).run() == code
    assert names(calls) == ["joint", "sft"], "nothing comes after a link that did not end well"
    assert [(call.ranks, call.resume_attempts) for call in calls] == [(3, 2)] * 2
    events = ChainDirectory(chain).events.read()
    assert [(event["kind"], event["link"], event.get("code")) for event in events] == [
        ("begin", "joint", None), ("end", "joint", 0), ("begin", "sft", None), ("end", "sft", code)
    ]  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_comes_as_a_link_ends_ends_the_chain(number: int, file: Path) -> None:
    chain = load_chain(file)

    def finished_under_a_signal() -> int:
        signal.raise_signal(number)
        return finish(chain, "joint")

    calls: list[Launch] = []
    before = signal.getsignal(number)
    code = Pipeline(chain, Options(1), noting(calls, finished_under_a_signal)).run()
    assert code == (75 if number == signal.SIGTERM else 130)
    assert names(calls) == ["joint"]
    assert signal.getsignal(number) == before


def test_a_stop_file_of_the_chain_reaches_the_run_and_ends_the_chain(file: Path) -> None:
    chain = load_chain(file)
    run = chain.runs["joint"].directory

    def until_it_is_asked() -> int:
        run.mkdir(parents=True)
        (chain.directory / "STOP").touch()
        end = time.monotonic() + 20
        while not (run / "STOP").exists() and time.monotonic() < end:
            time.sleep(0.02)
        assert (run / "STOP").exists()
        return finish(chain, "joint")

    calls: list[Launch] = []
    assert Pipeline(chain, Options(1), noting(calls, until_it_is_asked)).run() == ExitCode.STOPPED
    assert names(calls) == ["joint"]
    # An old one asks for nothing any more; one that was made while the chain was checked is meant for this command.
    assert Pipeline(chain, Options(1), noting(calls, 86)).run() == 86
    late = Pipeline(chain, Options(1), noting(calls, 86))
    (chain.directory / "STOP").touch()
    assert late.run() == ExitCode.STOPPED
    assert names(calls) == ["joint", "sft"]


def test_a_chain_has_one_time_limit_for_all_its_links(file: Path) -> None:
    chain = load_chain(file, ["joint.train.time_limit=5m"])
    calls: list[Launch] = []
    ends = noting(calls, lambda: finish(chain, "joint"), 75)
    assert Pipeline(chain, Options(1, time_limit="1h"), ends).run() == 75
    first, second = calls
    assert first.seconds == 300, "its own is shorter"
    assert second.seconds is not None
    assert 3500 < second.seconds <= 3600
    assert all(call.command[-1] == "train.time_limit=1h" for call in calls)
    late = Pipeline(chain, Options(1, time_limit="1s"), noting(calls))
    late._end = time.time() - 1
    assert late.run() == 75
    assert len(calls) == 2


def test_a_second_process_is_kept_from_a_chain(file: Path) -> None:
    chain = load_chain(file)

    def while_another_tries() -> int:
        with pytest.raises(ConfigError, match="another process runs this chain"):
            Pipeline(chain, Options(1), noting([])).run()
        return 86

    assert Pipeline(chain, Options(1), noting([], while_another_tries)).run() == 86
    (chain.directory / "config.resolved.yaml").touch()
    with pytest.raises(ConfigError, match="holds a run, so it cannot be the folder of chain"):
        Pipeline(chain, Options(1), noting([])).run()


def job_chain(folder: Path, shards: dict[str, Path], script: str, makes: Path) -> Chain:
    """A data job that is a script in the place of `rxt-dist data`, before the runs."""
    content = content_of(folder, shards)
    content["links"] = {"texts": {"data": [script], "makes": str(makes)}, **content["links"]}
    return load_chain(write(folder, content))


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data jobs are the source of a script."""
    monkeypatch.setattr("launch.pipeline.DATA_COMMAND", (sys.executable, "-c"))


@pytest.mark.usefixtures("script")
def test_a_data_job_is_done_once(tmp_path: Path, shards: dict[str, Path]) -> None:
    made = tmp_path / "made"
    chain = job_chain(tmp_path, shards, f"import os; os.mkdir({str(made)!r})", made)
    for _ in range(2):
        assert Pipeline(chain, Options(1), noting([], 86)).run() == 86
    assert [state["state"] for state in link_states(chain)] == ["finished", *["waiting"] * 4]
    other = job_chain(tmp_path, shards, "pass", made)
    assert "link 'texts': it has made" in refusal(other)


@pytest.mark.usefixtures("script")
def test_data_that_was_removed_is_made_again_where_it_is_read(tmp_path: Path, shards: dict[str, Path]) -> None:
    made = tmp_path / "made"
    content = content_of(tmp_path, shards)
    content["links"]["joint"]["run"]["data"]["path"] = str(made / "shards")
    job = {"data": [f"import os; os.mkdir({str(made)!r})"], "makes": str(made)}
    content["links"] = {"texts": job, **content["links"]}
    chain = load_chain(write(tmp_path, content))
    folder = ChainDirectory(chain)
    for _ in range(2):
        assert Pipeline(chain, Options(1), noting([], 86)).run() == 86
        assert folder.job_is_done("texts")
        made.rmdir()
        assert not folder.job_is_done("texts")
        check_chain(chain, 1)  # the run will find it
    finish(chain, "joint")
    assert folder.job_is_done("texts"), "nobody reads it any more"
    # What jobs read counts as well, and other arguments are no fault where nothing has been made by the old ones.
    content["links"]["texts"]["data"] = ["pass"]
    more = {"data": ["pass", str(made / "x")], "makes": str(tmp_path)}
    content["links"] = {"texts": content["links"].pop("texts"), "more": more, **content["links"]}
    other = load_chain(write(tmp_path, content))
    assert not ChainDirectory(other).job_is_done("texts")
    ChainDirectory(other).check_job("texts", DataJob(("pass",), made))


def test_a_chain_that_is_taken_is_refused_whoever_else_looks(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the attempt to lock and a second look who held it may be gone: that must not let two in."""
    chain = load_chain(file)
    with ChainDirectory(chain).taken():
        monkeypatch.setattr("rxt_dist.train.chain_dir.held", lambda path: False)
        with pytest.raises(ConfigError, match="another process runs this chain"), ChainDirectory(chain).taken():
            pass


def test_a_refusal_by_the_check_is_told_whole() -> None:
    text = "link 'joint': x cannot be read: parse error: line 3. Name another file."
    assert refusal_of(f"UserWarning: some error: of torch\nerror: {text}\n") == text
    assert refusal_of("Killed") == "Killed"


@pytest.mark.usefixtures("script")
@pytest.mark.parametrize(("text", "code"), [("import sys; sys.exit(65)", 65), ("pass", 64)])
def test_a_data_job_that_fails_ends_the_chain(text: str, code: int, tmp_path: Path, shards: dict[str, Path]) -> None:
    chain = job_chain(tmp_path, shards, text, tmp_path / "made")
    calls: list[Launch] = []
    assert Pipeline(chain, Options(1), noting(calls)).run() == code
    assert not calls
    assert link_states(chain)[0]["state"] == "waiting"


@pytest.mark.usefixtures("script")
def test_a_signal_ends_a_data_job(tmp_path: Path, shards: dict[str, Path]) -> None:
    text = "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    chain = job_chain(tmp_path, shards, text, tmp_path / "made")
    started = time.monotonic()
    assert Pipeline(chain, Options(1), noting([])).run() == 75
    assert time.monotonic() - started < 30


def test_data_that_a_link_before_makes_need_not_be_there(tmp_path: Path, shards: dict[str, Path]) -> None:
    content = content_of(tmp_path, shards)
    content["links"]["joint"]["run"]["data"]["path"] = str(tmp_path / "made/shards")
    assert "link 'joint'" in refusal(load_chain(write(tmp_path, content)))
    content["links"] = {"texts": {"data": ["build"], "makes": str(tmp_path / "made")}, **content["links"]}
    check_chain(load_chain(write(tmp_path, content)), 1)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("memory.model.dim=64", "link 'memory': The parts embedding, encoder of start.run .*/runs/sft are not those"),
        ("memory.data.path={joint}", "link 'memory': .* but dialogues are"),
        ("sft.data.path={nothing}", "link 'sft': "),
        ("memory.train.global_batch_tokens=500", "link 'memory': train.global_batch_tokens"),
        ("memory.start={fresh: [encoder]}", "link 'memory': stage 'memory' builds on trained parts"),
        ("sft.start={run: {nothing}, parts: [decoder]}", "link 'sft': .* holds no run"),
    ],
)
def test_every_link_is_checked_before_the_first_begins(
    override: str, said: str, tmp_path: Path, shards: dict[str, Path]
) -> None:
    content = content_of(tmp_path, shards)
    text = override.replace("{joint}", str(shards["documents"])).replace("{nothing}", str(tmp_path / "nothing"))
    name, _, value = text.partition(".start=")
    if value:
        content["links"][name]["start"] = yaml.safe_load(value)
    chain = load_chain(write(tmp_path, content), [] if value else [text])
    with pytest.raises((ConfigError, DataError), match=said):
        check_chain(chain, 1)
    assert not (tmp_path / "runs").exists()


def test_status_says_how_far_each_link_is(file: Path) -> None:
    chain = load_chain(file)
    assert [state["state"] for state in link_states(chain)] == ["waiting"] * 4
    run = chain.runs["sft"].directory
    finish(chain, "joint")
    run.mkdir()
    (run / "events.jsonl").write_text('{"kind": "start"}\n{"kind": "exit", "code": 86, "reason": "diverged"}\n')
    (run / "metrics.jsonl").write_text('{"step": 2, "tokens": 1024, "tokens_per_s": 10.0}\n')
    states = link_states(chain)
    assert [state["state"] for state in states] == ["finished", "stopped", "waiting", "waiting"]
    line = status_lines(states)[1]
    assert line.startswith("sft     stopped   sft, 1,024 of 1,536 tokens; exit code 86: diverged")


def test_the_folder_of_a_chain_stands_for_its_runs(file: Path, tmp_path: Path) -> None:
    chain = load_chain(file)
    assert Pipeline(chain, Options(1), noting([], 86)).run() == 86
    with pytest.raises(ConfigError, match="of which no run has begun"):
        runs_of(chain.directory)
    for name in ("joint", "memory"):
        chain.runs[name].directory.mkdir()
        (chain.runs[name].directory / "events.jsonl").touch()
    begun = [tmp_path / "runs/joint", tmp_path / "runs/memory"]
    assert runs_of(chain.directory) == runs_of(file) == begun
    assert runs_of(tmp_path / "elsewhere") == [tmp_path / "elsewhere"]
