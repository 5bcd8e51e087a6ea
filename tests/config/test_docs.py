"""docs/configuration.md states every field of the configuration with its default and its description.

The expected rows are made here from the classes, so that the page and the code cannot drift apart: a failure prints
the rows that the page needs.
"""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rxt_dist.config.chain import ChainConfig, LinkConfig
from rxt_dist.config.run import RunConfig, run_class
from rxt_dist.config.stages import STAGES, StageConfig

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/configuration.md"


def classes(kind: type[BaseModel]) -> list[type[BaseModel]]:
    """`kind` and every configuration class below it, each once, outer ones first."""
    found = [kind]
    for current in found:
        for field in current.model_fields.values():
            found += [inner for inner in inner_classes(field.annotation) if inner not in found]
    return found


def inner_classes(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [inner for argument in typing.get_args(annotation) for inner in inner_classes(argument)]


def row_start(name: str, field: FieldInfo) -> str:
    """`| name | default | description`, the description left out where the field has none."""
    if inner_classes(field.annotation):
        return f"| `{name}` | "
    default = "required" if field.is_required() else f"`{as_yaml(field.default)}`"
    return f"| `{name}` | {default} | {field.description or ''}"


def as_yaml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(as_yaml(item) for item in value)}]"
    if isinstance(value, float):
        return f"{value:g}"
    plain = str(value) if isinstance(value, Path) else value
    return yaml.safe_dump(plain, default_flow_style=True).removesuffix("\n").removesuffix("...").strip()


# Every stage's own classes stand for the base that they have in common; stages that other tests add have no file.
OWN = [kind for kind, stage in STAGES.items() if (ROOT / f"{stage.code.split(':')[0].replace('.', '/')}.py").exists()]
ALL = dict.fromkeys(found for kind in OWN for found in classes(run_class(kind)))
KINDS = [kind for kind in ALL if kind not in (StageConfig, *map(run_class, OWN))]
KINDS += [RunConfig, ChainConfig, LinkConfig]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_page_states_every_field(kind: type[BaseModel]) -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    wanted = [row_start(name, field) for name, field in kind.model_fields.items()]
    missing = [row for row in wanted if not any(line.startswith(row) for line in lines)]
    assert missing == [], f"{PAGE.name} lacks these rows of {kind.__name__}:\n" + "\n".join(missing)
