"""The doctor on this machine, and what it says of a machine that cannot train."""

from __future__ import annotations

import inspect
import io
import logging

import pytest
from deepspeed.accelerator import real_accelerator

from rxt_dist import doctor


@pytest.mark.slow
def test_this_machine_can_train() -> None:
    checks = doctor.examine()
    assert {check.name: check.found for check in checks if check.status == "fail"} == {}
    assert {"torch", "deepspeed", "gloo loopback", "deepspeed: AutoEPMoELayer"} <= {check.name for check in checks}


def test_what_the_table_says_is_not_logged_above_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed has such a line for every machine without a GPU; whatever else it logs is shown."""
    line = "Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it."
    assert line in inspect.getsource(real_accelerator.get_accelerator)
    logger, lines = logging.getLogger("DeepSpeed"), io.StringIO()
    handler = logging.StreamHandler(lines)
    logger.addHandler(handler)

    def fact(*_: object) -> doctor.Check:
        logger.warning(line)
        logger.warning("something else")
        return doctor.Check("fact", "ok", "")

    monkeypatch.setattr(doctor, "_engine_fact", fact)
    monkeypatch.setattr(doctor, "ENGINE_FACTS", (("a", "b", ()),))
    try:
        doctor.examine()
        assert lines.getvalue() == "something else\n"
        logger.warning(line)
        assert line in lines.getvalue(), "training still logs it"
    finally:
        logger.removeHandler(handler)


def test_requirements_are_the_pinned_ones() -> None:
    assert doctor.requirements()["deepspeed"].startswith("==")


def test_another_version_than_the_pinned_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "requirements", lambda: {"torch": "==1.0"})
    check = doctor._version("torch")
    assert (check.status, check.advice) == ("fail", 'Run: pip install "torch==1.0"')
    monkeypatch.setattr(doctor, "requirements", lambda: {"no-such-package": "==1.0"})
    assert doctor._version("no-such-package").found == "not installed"


def test_a_missing_compiler_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert doctor._compiler().status == "warn"


@pytest.mark.parametrize(
    ("fact", "found"),
    [
        (("json", "no_such_name", ()), "no attribute 'no_such_name'"),
        (("no_such_module", "x", ()), "No module named 'no_such_module'"),
        (("json", "JSONEncoder", ("self.no_such_field",)), "json has no self.no_such_field"),
    ],
)
def test_an_engine_fact_that_does_not_hold_is_named(fact: tuple[str, str, tuple[str, ...]], found: str) -> None:
    check = doctor._engine_fact(*fact)
    assert check.status == "fail"
    assert found in check.found


def test_a_trial_that_raises_is_a_finding() -> None:
    def trial() -> str:
        """Mend it."""
        raise RuntimeError("first line\nsecond line")

    assert doctor._attempt("trial", trial) == doctor.Check("trial", "fail", "first line", "Mend it.")
