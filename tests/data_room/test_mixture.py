from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from rxt_dist.config.run import DataConfig
from rxt_dist.data.manifest import SourceInfo, SplitInfo, Totals
from rxt_dist.data.mixture import PhaseDataset, phase_datasets, planned_order
from rxt_dist.data.sampler import BLOCK, GlobalOrder
from rxt_dist.errors import ConfigError

SEQ = 10


def source(name: str, language: str, rows: int) -> SourceInfo:
    return SourceInfo(name, language, SplitInfo(Totals(rows=rows)))


SOURCES = (
    source("web", "en", 60_000),
    source("wiki", "en", 20_000),
    source("sieć", "pl", 10_000),
    source("tiny", "en", 3),
)


def order(
    total_rows: int | None,
    *phases: dict[str, Any],
    max_epochs: float = 100,
    sources: Sequence[SourceInfo] = SOURCES,
) -> GlobalOrder:
    values = {"path": "x", "mixture": phases, "max_epochs": max_epochs}
    data = DataConfig.model_validate_json(json.dumps(values))
    read = phase_datasets(data, lambda path: PhaseDataset(path, f"digest of {path}", SEQ, "t", tuple(sources)))
    return planned_order(read, data, total_rows and total_rows * SEQ, seed=0)


def drawn(planned: GlobalOrder) -> dict[str, int]:
    return {plan.name: plan.rows for plan in planned.plan() if plan.rows}


def test_weights_and_budgets_are_drawn_to_the_row() -> None:
    assert drawn(order(BLOCK, {"weights": {"web": 3, "sieć": 1}})) == {"web": 3072, "sieć": 1024}
    budgets = {"tokens_per_source": {"web": 20_000, "wiki": 10_000, "sieć": 10_960}}
    assert drawn(order(BLOCK, budgets)) == {"web": 2000, "wiki": 1000, "sieć": 1096}


def test_languages_have_their_share_and_their_sources_go_by_size() -> None:
    planned = order(10 * BLOCK, {"languages": {"en": 0.75, "pl": 0.25}})
    rows = drawn(planned)
    assert rows["web"] == pytest.approx(3 * rows["wiki"], rel=1e-3)
    # Three rows of 80,003 cannot stand in every block; the share that they would have had stays English.
    assert "tiny" not in rows
    assert rows["sieć"] == 10 * BLOCK / 4
    assert drawn(order(BLOCK, {"languages": {"pl": 2}})) == {"sieć": BLOCK}
    assert drawn(order(BLOCK, {"languages": {"en": 1e308, "pl": 1e308}}))["sieć"] == BLOCK / 2


def test_a_language_that_is_named_is_read_or_refused() -> None:
    with pytest.raises(ConfigError, match=r"language 'pl', .* share of 0\.0001 .*1/4096 \(0\.000244140625\): raise"):
        order(BLOCK, {"languages": {"en": 0.9999, "pl": 0.0001}})
    many = [source(f"pl{number}", "pl", 10) for number in range(500)]
    with pytest.raises(
        ConfigError, match=r"mixture\.0 names the language 'pl', .* share of 0\.0002 .*as fewer sources"
    ):
        order(BLOCK, {"languages": {"en": 0.9, "pl": 0.1}}, sources=[SOURCES[0], *many])
    larger = source("larger", "pl", 1000)
    rows = drawn(order(10 * BLOCK, {"languages": {"en": 0.9, "pl": 0.1}}, sources=[SOURCES[0], *many, larger]))
    assert rows == pytest.approx({"web": 9 * BLOCK, "larger": BLOCK}, abs=1)


def test_a_source_that_is_named_is_read_or_refused() -> None:
    for share in (2e-4, 1e-12):
        with pytest.raises(ConfigError, match=r"source 'wiki' .* a share of .*1/4096 \(0\.000244140625\)"):
            order(BLOCK, {"weights": {"web": 1, "wiki": share}})
    with pytest.raises(ConfigError, match=r"gives source 'wiki' 0\.0003, a share of 0\.0001;"):
        order(BLOCK, {"weights": {"web": 2.9997, "wiki": 0.0003}})


def test_no_training_rows_are_said_to_be_none() -> None:
    for phase in ([], [{"weights": {"web": 1}}], [{"languages": {"en": 1}}]):
        with pytest.raises(ConfigError, match=r"no training rows in any of its 1 sources: lower build\.eval_fraction"):
            order(BLOCK, *phase, sources=[source("web", "en", 0)])
    with pytest.raises(ConfigError, match=r"None of the 5,000 sources holds 1/4096 of the 50,000 training rows"):
        order(BLOCK, sources=[source(f"s{number}", "en", 10) for number in range(5000)])


def test_phases_end_where_the_run_ends() -> None:
    first, second = {"tokens": 10 * BLOCK, "weights": {"web": 1}}, {"weights": {"wiki": 1}}
    assert drawn(order(3 * BLOCK, first, second)) == {"web": BLOCK, "wiki": 2 * BLOCK}
    assert drawn(order(BLOCK // 2, first, second)) == {"web": BLOCK // 2}
    long = {"tokens": 10 * 900_000, "weights": {"wiki": 1}}
    assert drawn(order(2 * BLOCK, first, long, max_epochs=1)) == {"web": BLOCK, "wiki": BLOCK}
    with pytest.raises(ConfigError, match=r"passes over source 'wiki' 44\.\d+ times"):
        order(900_000, first, long, max_epochs=4)


UNEVEN = 101 * BLOCK - 1000  # rows; in whole blocks 0.24 % more


def test_the_plan_is_what_is_read_where_phases_are_rounded() -> None:
    first = {"tokens": UNEVEN * SEQ, "weights": {"web": 1}}
    for last in ({"weights": {"wiki": 1}}, {"tokens": 10**9, "weights": {"wiki": 1}}):
        planned = order(UNEVEN + 20_000, first, last)
        assert planned.total_rows == UNEVEN + 20_000
        read = np.bincount(planned.rows(np.arange(UNEVEN + 20_000))[0], minlength=len(SOURCES))
        assert [plan.rows for plan in planned.plan()] == read.tolist() == [101 * BLOCK, 19_000, 0, 0]
    # 138,000 rows of 'wiki' are 6.9 passes; the 1,000 that the blocks took from it do not count.
    order(UNEVEN + 139_000, first, {"weights": {"wiki": 1}}, max_epochs=6.9)


def test_phases_that_blocks_would_change_are_refused() -> None:
    short = [{"tokens": 1000 * SEQ, "weights": {name: 1}} for name in ("web", "wiki", "sieć")]
    with pytest.raises(
        ConfigError, match=r"mixture\.0 lasts 10,000 tokens, .* blocks of 40,960 .* last 40,960: give it 40960 tokens"
    ):
        order(3000, *short)
    second = {"tokens": 50 * BLOCK * SEQ + SEQ, "weights": {"wiki": 1}}
    with pytest.raises(ConfigError, match=r"mixture\.1 lasts 2,048,010 tokens, .*: give it 2048000 or 2088960 tokens"):
        order(60 * BLOCK, {"tokens": BLOCK * SEQ, "weights": {"web": 1}}, second, {"weights": {"web": 1}})
    # The run ends in it: nothing follows, and nothing is rounded.
    assert drawn(order(900, *short)) == {"web": 900}
    assert drawn(order(1000, *short)) == {"web": 1000}


def test_budgets_are_kept_within_a_percent_or_refused() -> None:
    first = {"tokens_per_source": {"web": UNEVEN * SEQ}}
    for rows in (100_000, 200_000):
        planned = order(UNEVEN + rows, first, {"tokens_per_source": {"wiki": rows * SEQ}})
        assert drawn(planned) == {"web": 101 * BLOCK, "wiki": rows - 1000}
    with pytest.raises(ConfigError, match=r"mixture\.1 has the last 990,000 of .*, of which 980,000 are left"):
        order(UNEVEN + 99_000, first, {"tokens_per_source": {"wiki": 99_000 * SEQ}})


def test_a_phase_that_would_never_begin_is_refused() -> None:
    first, second = {"tokens": UNEVEN * SEQ, "weights": {"web": 1}}, {"weights": {"wiki": 1}}
    with pytest.raises(ConfigError, match=r"mixture\.1 has the last 5,000 of .* 0 are left .* a multiple of 40,960"):
        order(UNEVEN + 500, first, second)
    # A run that is shorter than the mixture reads its beginning.
    assert drawn(order(UNEVEN, first, second)) == {"web": UNEVEN}
    assert drawn(order(UNEVEN - 5, first, second)) == {"web": UNEVEN - 5}


def test_phases_must_cover_the_run_in_order() -> None:
    with pytest.raises(ConfigError, match=r"mixture\.0\.tokens is not set"):
        order(9 * BLOCK, {"weights": {"web": 1}}, {"tokens": 1e4, "weights": {"wiki": 1}})
    with pytest.raises(ConfigError, match=r"covers 81,920 tokens of a training of 81,930"):
        order(2 * BLOCK + 1, *[{"tokens": BLOCK * SEQ, "weights": {"web": 1}}] * 2)


def test_without_a_run_the_plan_is_as_long_as_its_phases() -> None:
    first = {"tokens": UNEVEN * SEQ, "weights": {"web": 1}}
    one_pass = sum(source.train.totals.rows for source in SOURCES)
    assert order(None).total_rows == one_pass
    assert order(None, first).total_rows == UNEVEN
    assert drawn(order(None, first, {"weights": {"sieć": 1}})) == {"web": 101 * BLOCK, "sieć": one_pass}
    assert order(None, first, {"tokens": UNEVEN * SEQ, "weights": {"sieć": 1}}).total_rows == 2 * UNEVEN


def test_the_begun_past_does_not_depend_on_the_end_of_the_run() -> None:
    first, second = {"tokens": 10 * BLOCK, "weights": {"web": 1}}, {"weights": {"wiki": 1}}
    hashes = {order(rows, first, second).plan_hash(2 * BLOCK) for rows in (2 * BLOCK + 1, 3 * BLOCK, 10 * BLOCK)}
    assert len(hashes) == 1


@pytest.mark.parametrize(
    ("phase", "said"),
    [
        ({}, "a phase needs one of weights, tokens_per_source, languages"),
        ({"languages": {}}, "and has none"),
        ({"weights": {"web": 1}, "languages": {"en": 1}}, r"has \['weights', 'languages'\]"),
        ({"tokens": 5, "tokens_per_source": {"web": 3, "wiki": 3}}, "tokens is 5, but tokens_per_source adds up to 6"),
    ],
)
def test_a_phase_has_one_form(phase: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        order(BLOCK, phase)


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(
        ConfigError, match=r"mixture\.0 names the source 'wik', but x holds web, .* Did you mean 'wiki'"
    ):
        order(BLOCK, {"weights": {"wik": 1}})
    with pytest.raises(ConfigError, match=r"mixture\.1 names the language 'de', but x holds en, pl"):
        order(BLOCK * 9, {"tokens": 10, "weights": {"web": 1}}, {"languages": {"en": 1, "de": 1}})
