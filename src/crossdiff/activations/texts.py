"""The text side of a harvest: documents in, token sequences out, with a record of what was read and omitted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import polars as pl

from crossdiff.activations.writer import DOCUMENT_COLUMNS
from crossdiff.config import DatasetConfig, HarvestConfig
from crossdiff.errors import UserError
from crossdiff.text.documents import Document, read_dataset
from crossdiff.text.sequences import TokenSequence, tokenise_all

FEW = 10
"""Up to this many damaged records are omitted whatever their share."""

ROWS = 8192
"""Number of rows of the table of documents that are kept as Python objects."""


@dataclass
class DatasetRecord:
    """What was read of one dataset.

    asked: max_documents and max_tokens, if set. damaged: number of omitted records; reasons: messages of the first few.
    """

    name: str
    asked: dict[str, int]
    n_documents: int = 0
    n_tokens: int = 0
    damaged: int = 0
    reasons: list[str] = field(default_factory=list)

    def shortfall(self) -> str | None:
        """A message if the dataset holds less than was requested."""
        found = {"max_documents": self.n_documents + self.damaged, "max_tokens": self.n_tokens}
        short = [f"{found[key]:,} of {key} {number:,}" for key, number in self.asked.items() if found[key] < number]
        # Reading stops at either limit, so a dataset is short only if it reached neither.
        return f"{self.name} is shorter than requested: {', '.join(short)}" if short and len(short) == len(self.asked) else None


class Texts:
    """The datasets of a harvest as token sequences, read lazily.

    Attributes:
        records: one per dataset, updated while reading.
        is_training: for each document, whether it is in the training split.
    """

    def __init__(
        self, datasets: tuple[DatasetConfig, ...], tokenizer: Any, config: HarvestConfig, advance: Callable[[], None]
    ) -> None:
        self.datasets, self.tokenizer, self.config, self._advance = datasets, tokenizer, config, advance
        self.records = []
        for dataset in datasets:
            limits = {"max_documents": dataset.max_documents, "max_tokens": dataset.max_tokens}
            self.records.append(DatasetRecord(dataset.title, {key: n for key, n in limits.items() if n is not None}))
        self.is_training: list[bool] = []
        self._rows: list[dict[str, Any]] = []
        self._frames: list[pl.DataFrame] = []
        self._n_read = 0  # of the current dataset

    def sequences(self) -> Iterator[TokenSequence]:
        """Yield all sequences in order. A `UserError` names a dataset that is unreadable, empty or too damaged."""
        for index, (config, record) in enumerate(zip(self.datasets, self.records, strict=True)):
            self._n_read = 0
            on_damage = self._omit_damaged(record)
            documents = self._counted(read_dataset(config, index, len(self.is_training), on_damage))
            for document, parts in tokenise_all(documents, self.tokenizer, self.config.max_length, on_damage):
                self._add(document, record, sum(len(part.token_ids) for part in parts))
                yield from parts
                if config.max_tokens is not None and record.n_tokens >= config.max_tokens:
                    break
            if not record.n_tokens:
                reason = f"; the first record is damaged: {record.reasons[0]}" if record.reasons else ""
                raise UserError(f"{config.path} has no readable text{reason}")

    def _counted(self, documents: Iterator[Document]) -> Iterator[Document]:
        for document in documents:
            self._n_read += 1
            yield document

    def _omit_damaged(self, record: DatasetRecord) -> Callable[[UserError], None]:
        def on_damage(error: UserError) -> None:
            record.damaged += 1
            n_records = self._n_read + record.damaged
            if record.damaged <= FEW:
                record.reasons.append(str(error))
            elif record.damaged > self.config.max_damaged * n_records:
                raise UserError(
                    f"{record.damaged} of the first {n_records} records of {record.name} are damaged, a larger share than "
                    f"harvest.max_damaged {self.config.max_damaged:g}; repair them or raise it. The first: {record.reasons[0]}"
                ) from error

        return on_damage

    def _add(self, document: Document, record: DatasetRecord, n_tokens: int) -> None:
        questions = [message["content"] for message in document.messages or () if message["role"] == "user"]
        self._rows.append(
            {
                "document": document.number, "dataset": record.name, "split": document.split, "label": document.label,
                "sub_label": document.sub_label, "prompt": questions[0] if questions else None,
                "n_messages": len(document.messages) if document.messages else 0, "n_tokens": n_tokens,
            }
        )  # fmt: skip
        if len(self._rows) == ROWS:
            self._frames.append(pl.DataFrame(self._rows, schema=DOCUMENT_COLUMNS))
            self._rows = []
        assert document.number == len(self.is_training)
        self.is_training.append(document.split == "train")
        record.n_documents += 1
        record.n_tokens += n_tokens
        self._advance()

    def table(self) -> pl.DataFrame:
        """The documents read so far."""
        return pl.concat([*self._frames, pl.DataFrame(self._rows, schema=DOCUMENT_COLUMNS)])

    def report(self) -> list[dict[str, Any]]:
        """The records as plain data, for the manifest."""
        return [asdict(record) for record in self.records]

    def remarks(self) -> list[str]:
        """Messages about datasets that are shorter than requested, and about damaged records."""
        short = [remark for record in self.records if (remark := record.shortfall())]
        damaged = [
            f"{record.damaged:,} damaged records of {record.name} were omitted; the first: {record.reasons[0]}"
            for record in self.records
            if record.damaged
        ]
        return short + damaged
