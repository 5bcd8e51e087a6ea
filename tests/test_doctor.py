"""The doctor on this machine, and what it says of a machine that cannot train."""

from __future__ import annotations

import pytest

from rxt_dist import doctor


def test_this_machine_can_train() -> None:
    checks = doctor.examine()
    assert {check.name: check.found for check in checks if check.status == "fail"} == {}
    assert {"torch", "deepspeed", "gloo loopback", "deepspeed: AutoEPMoELayer"} <= {check.name for check in checks}


def test_requirements_are_the_pinned_ones() -> None:
    assert doctor.requirements()["deepspeed"].startswith("==")


def test_another_version_than_the_pinned_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "requirements", lambda: {"torch": "==1.0"})
    check = doctor._version("torch")
    assert (check.status, check.advice) == ("fail", 'Run: pip install "torch==1.0"')
    monkeypatch.setattr(doctor, "requirements", lambda: {"no-such-package": "==1.0"})
    assert doctor._version("no-such-package").found == "not installed"


def test_a_missing_compiler_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
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
