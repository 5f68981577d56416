"""Settings of the texts and of the harvest."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    field_validator,
)

from crossdiff.config.base import Config
from crossdiff.errors import UserError


def check_url(url: str) -> str:
    """Check the URL of a folder, which is stored in files that others read."""
    if "://" not in url or "::" in url:
        raise UserError(f"{url!r} is not the URL of a folder; expected something like s3://bucket/folder")
    host = url.partition("://")[2].partition("/")[0]
    if ":" in host.rpartition("@")[0]:
        raise UserError("a URL must not contain a password; give credentials the way the protocol's driver expects them")
    return url


class DatasetConfig(Config):
    """One source of text: plain documents or conversations."""

    path: str | tuple[str, ...] = Field(
        description="local .jsonl, .json, .csv, .parquet or .txt file (all but .parquet also as .gz), a pattern such as "
        "texts/*.jsonl, a list of either, or the name of a Hub dataset"
    )
    name: str | None = Field(None, description="its name in tables; default: the file's stem, or the folder of a pattern")
    subset: str | None = Field(
        None, description="configuration of a Hub dataset that has several", exclude_if=lambda value: value is None
    )
    split: str = Field("train", description="the split of a Hub dataset")
    format: Literal["auto", "messages", "sharegpt", "prompt_completion", "prompt_chosen", "alpaca", "text"] = Field(
        "auto",
        description="layout of a record; auto: messages, else text, else the first layout whose columns the record has",
        exclude_if=lambda value: value == "auto",
    )
    text_column: str = "text"
    messages_column: str = "messages"
    roles: dict[str, str] = Field(
        {},
        description="roles of the conversations under other names, and the role that each stands for, such as {pupil: user}",
        exclude_if=lambda value: not value,
    )
    label_column: str | None = Field(None, description="column with the label of each conversation, for the behaviour tables")
    sub_label_column: str | None = None
    heldout_share: float = Field(0.1, ge=0, le=1, description="share of documents held out of training, chosen by content hash")
    max_documents: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1, description="stop after the document that reaches this many tokens")
    weight: float | None = Field(
        None,
        gt=0,
        description="share of the tokens in a mix of the datasets, relative to the other weights; the mix ends with the first "
        "dataset that ends; default: one dataset after the other, each to its end",
        exclude_if=lambda value: value is None,
    )

    @property
    def paths(self) -> tuple[str, ...]:
        """The files, patterns or Hub name, as given."""
        return (self.path,) if isinstance(self.path, str) else self.path

    @property
    def title(self) -> str:
        if self.name:
            return self.name
        path = Path(self.paths[0].replace(":", "/"))
        return path.parent.name if "*" in path.name and path.parent.name else path.name.split(".")[0]

    @field_validator("path")
    @classmethod
    def _is_given(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not value or not all(value):
            raise ValueError("give at least one file, pattern or name")
        return value


def _dataset_from_text(value: Any) -> Any:
    return {"path": value} if isinstance(value, str | list | tuple) else value


MASSIVE_NORM = 10.0
"""Times the median norm above which a token is massive. Ordinary tokens stay below 5 times, massive ones begin at about 30."""


class HarvestConfig(Config):
    """Which activations are collected and how they are stored."""

    max_length: int = Field(256, ge=2, description="tokens per sequence; longer plain text is cut into windows")
    dtype: Literal["float32", "float16", "bfloat16", "int8"] = Field(
        "float16", description="dtype of the stored activations; int8 stores a scale per token and source"
    )
    batch_tokens: int = Field(8192, ge=1, description="padded tokens per forward pass")
    shard_tokens: int = Field(65536, ge=1, description="tokens per shard of the store")
    leave_out: int = Field(1, ge=0, description="leading positions of each sequence to exclude from training and statistics")
    max_norm_multiple: float | None = Field(
        MASSIVE_NORM,
        gt=1,
        description="tokens whose activation in either model has more than this many times the median norm are excluded from "
        "training and statistics, wherever they are; null: none",
        exclude_if=lambda value: value == MASSIVE_NORM,  # stores from before this setting existed keep their fingerprint
    )
    storage: Literal["blocks", "passes", "live"] = Field(
        "blocks",
        description="blocks: activations on disk, shuffled in blocks of 128 tokens; passes: on disk, shuffled by whole forward "
        "passes; live: only the tokens on disk, and the models run again for every reading, in the order of passes",
        exclude_if=lambda value: value == "blocks",  # stores from before this setting existed keep their fingerprint
    )
    compile: bool = Field(
        False,
        description="compile the decoder layers; worth it for long harvests on a GPU. Activations change in the last bits",
        exclude_if=lambda value: not value,  # stores from before this setting existed keep their fingerprint
    )
    store: Annotated[str, AfterValidator(check_url)] | None = Field(
        None,
        description="URL of a folder such as s3://bucket/stores, to keep the activations there instead of in the run directory "
        "(s3:// needs pip install 'crossdiff[remote]')",
        exclude_if=lambda value: value is None,
    )
    max_damaged: float = Field(
        0.01, ge=0, le=1, description="share of a dataset's records that may be damaged; they are skipped"
    )
    base_tokens: dict[str, str] = Field(
        {},
        description="tokens that the base model was never trained on, such as template tokens, and the tokens it reads instead",
    )
    template_date: date | None = Field(
        None,
        description="the date that a chat template writes if it asks for today's; default: the day of the run's first harvest",
        exclude_if=lambda value: value is None,  # templates that do not read the clock keep their fingerprint
    )
