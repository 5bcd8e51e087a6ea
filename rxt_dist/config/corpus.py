"""How a dataset is built from text: its sources, tokenizer, split and filters (the `build` part of a data file)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from rxt_dist.config.base import Config
from rxt_dist.config.clean import CleanConfig

_SOURCE_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
# What a dataset holds beside the folders of its sources.
RESERVED_NAMES = frozenset(
    {f"{name}.json" for name in ("dataset", "build", "plan", "tokenizer", "clean", "interactions", "origin")}
    | {"spare.zip", "units", "duplicates"}
)


def source_name_problem(name: str) -> str | None:
    """What is wrong with the name of a source, which becomes a folder of the dataset; None if nothing is."""
    if not _SOURCE_NAME.fullmatch(name):
        return f"'{name}' must be up to 100 lower-case letters, digits, '.', '_' or '-', as it names a folder"
    if name in RESERVED_NAMES:
        return f"'{name}' is the name of something else in a dataset; choose another one"
    return None


class SourceConfig(Config):
    """One source of a corpus: text files, or a dataset of the Hugging Face `datasets` library."""

    name: str = Field(description="Names the source in mixtures, folders and reports.")
    inputs: tuple[str, ...] = Field((), description="Files, folders or globs, relative to the current directory.")
    dataset: str | None = Field(None, description="Instead of inputs: a name that `datasets.load_dataset` knows.")
    config: str | None = Field(None, description="Configuration (subset) of `dataset`.")
    revision: str | None = Field(None, description="Revision of `dataset`; name a commit to make a build repeatable.")
    split: str = Field("train", description="Split of `dataset`.")
    data_files: tuple[str, ...] = Field((), description="Files of `dataset` to read; empty: all of the split.")
    language: str | None = Field(None, description="Language tag of every document; null: see language_column.")
    text_column: str | None = Field(None, description="Column of the text; null: the first of the usual names.")
    language_column: str | None = Field(
        None, description="Column of the language; null: `language` or `lang`, else names and a guess."
    )
    documents: PositiveInt | None = Field(None, description="Documents as published; only `data plan` uses it.")
    text_gb: PositiveFloat | None = Field(None, description="Text in GB as published; only `data plan` uses it.")

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        problem = source_name_problem(value)
        if problem:
            raise ValueError(problem)
        return value

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if bool(self.inputs) == bool(self.dataset):
            raise ValueError(f"source '{self.name}' needs either inputs or dataset, and not both")
        return self


class BuildConfig(Config):
    """How `rxt-dist data build DATA.yaml` makes the shards in `path`."""

    sources: tuple[SourceConfig, ...] = Field((), description="Where the text comes from.")
    tokenizer: Path | None = Field(None, description="tokenizer.json; null: one is trained on the sources.")
    vocab_size: PositiveInt = Field(
        4096, le=65536, description="Ids of the tokenizer that is trained when none is given."
    )
    backend: Literal["auto", "tokenizers", "gigatoken"] = Field(
        "auto", description="What encodes: auto takes gigatoken where it is installed and passes the parity check."
    )
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.02, description="Share of the documents held out, chosen by hash of their text."
    )
    unit_mb: float | None = Field(
        None, ge=0.001, description="Text in MB that is committed as one unit of work; null: a 64th of all, 16 to 256."
    )
    max_document_mb: PositiveFloat = Field(32.0, description="Skip, and count, documents above this many MB of text.")
    clean: CleanConfig = CleanConfig()

    @model_validator(mode="after")
    def _distinct_sources(self) -> Self:
        names = [source.name for source in self.sources]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"sources must have distinct names; given twice: {', '.join(twice)}")
        return self
