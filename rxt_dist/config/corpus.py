"""How a dataset is built from text: its sources, tokenizer, split and filters (the `build` part of a data file)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from rxt_dist.config.base import Config
from rxt_dist.config.clean import CleanConfig

_SOURCE_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")


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
        None, description="Column of the language; null: `language` or `lang`, else the file's name, else a guess."
    )
    documents: PositiveInt | None = Field(None, description="Documents as published; only `data plan` uses it.")
    text_gb: PositiveFloat | None = Field(None, description="Text in GB as published; only `data plan` uses it.")

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if not _SOURCE_NAME.fullmatch(value):
            raise ValueError(f"'{value}' must be lower-case letters, digits, '.', '_' or '-', as it names a folder")
        return value

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if bool(self.inputs) == bool(self.dataset):
            raise ValueError(f"source '{self.name}' needs either inputs or dataset, and not both")
        return self


class BuildConfig(Config):
    """How `rxt-dist data build DATA.yaml` makes the shards in `path`."""

    sources: tuple[SourceConfig, ...] = Field(description="Where the text comes from.")
    tokenizer: Path | None = Field(None, description="tokenizer.json; null: one is trained on the sources.")
    vocab_size: PositiveInt = Field(4096, description="Ids of the tokenizer that is trained when none is given.")
    backend: Literal["auto", "tokenizers", "gigatoken"] = Field(
        "auto", description="What encodes: auto takes gigatoken where it is installed and passes the parity check."
    )
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.02, description="Share of the documents held out, chosen by hash of their text."
    )
    unit_mb: PositiveInt = Field(256, description="Text in MB that is committed as one unit of work.")
    max_document_mb: PositiveInt = Field(64, description="Skip, and count, documents above this many MB of text.")
    clean: CleanConfig = CleanConfig()

    @model_validator(mode="after")
    def _distinct_sources(self) -> Self:
        names = [source.name for source in self.sources]
        twice = sorted({name for name in names if names.count(name) > 1})
        if not names or twice:
            raise ValueError(f"sources must be one or more with distinct names; given twice: {twice}")
        return self
