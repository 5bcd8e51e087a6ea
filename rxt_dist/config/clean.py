"""Which documents a build keeps: normalisation, filters and de-duplication, each off unless asked for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator

from rxt_dist.config.base import Config, at_most

Share = Annotated[float, Field(ge=0, le=1)]
Length = Annotated[PositiveInt, at_most(65_536)]


class NearDuplicateConfig(Config):
    """Near-duplicates by MinHash: of documents as similar as this, the first is kept."""

    threshold: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.8, description="Jaccard similarity of word shingles from which on two documents are duplicates."
    )
    permutations: Length = Field(128, description="Length of a signature; more is more exact and dearer.")
    shingle_words: Length = Field(5, description="Words a shingle.")


class CleanConfig(Config):
    """What a document must pass before it is tokenised."""

    normalise: Literal["none", "nfc", "nfkc"] = Field("none", description="Unicode normalisation of the text.")
    check_language: bool = Field(
        False, description="Drop English and Polish documents whose words clearly belong to the other language."
    )
    min_characters: NonNegativeInt = Field(0, description="Drop shorter documents.")
    max_characters: PositiveInt | None = Field(None, description="Drop longer documents; null: no bound.")
    max_line_repetition: Share = Field(
        1.0, description="Drop a document when more than this share of its characters is in repeated lines."
    )
    max_ngram_repetition: Share = Field(
        1.0, description="Drop a document when more than this share of its words is in repeated 10-grams."
    )
    min_letters: Share = Field(
        0.0, description="Drop a document when letters are a smaller share of it, white space aside."
    )
    exact_duplicates: bool = Field(False, description="Drop all but the first document of equal text.")
    near_duplicates: NearDuplicateConfig | None = Field(
        None, description="Drop near-duplicates; `{}`: with the defaults, null: keep them."
    )

    @field_validator("near_duplicates", mode="before")
    @classmethod
    def _settings_and_no_switch(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError(
                "it holds settings and is no switch: `near_duplicates: {}` drops near-duplicates with the defaults, "
                "`near_duplicates: null` keeps them"
            )
        return value
