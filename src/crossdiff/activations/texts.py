"""The text side of a harvest: documents in, token sequences out, with a record of what was read and omitted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import polars as pl

from crossdiff.activations.writer import DOCUMENT_COLUMNS
from crossdiff.config import DatasetConfig, HarvestConfig
from crossdiff.errors import UserError
from crossdiff.models.tokenizers import unknown_token
from crossdiff.text.chat import Flag
from crossdiff.text.documents import Document, read_dataset
from crossdiff.text.sequences import LOST_SHARE, TokenSequence, tokenise_all

FEW = 10
"""Up to this many damaged records are omitted whatever their share."""

ROWS = 8192
"""Number of rows of the table of documents that are kept as Python objects."""

SAMPLE_DOCUMENTS = 64
"""Number of documents of each dataset that are read before a harvest, and from which `plan` estimates the rest."""


@dataclass
class DatasetRecord:
    """What was read of one dataset.

    asked: max_documents and max_tokens, if set. damaged: number of omitted records; reasons: messages of the first few.
    formats: number of documents by layout. renamed: roles that had other names, by these names. also: layouts whose columns
    were there too.
    n_conversations, n_user, n_assistant: stored conversations, and their tokens of either side; assistant_lost: tokens of the
    assistant beyond max_length.
    """

    name: str
    asked: dict[str, int]
    n_documents: int = 0
    n_tokens: int = 0
    damaged: int = 0
    reasons: list[str] = field(default_factory=list)
    formats: dict[str, int] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    also: list[str] = field(default_factory=list)
    n_conversations: int = 0
    n_user: int = 0
    n_assistant: int = 0
    assistant_lost: int = 0

    def __post_init__(self) -> None:
        self.n_records = 0
        """Number of records that were read, damaged ones included; not in the report."""

    @property
    def lost_share(self) -> float:
        """Share of the assistant's tokens that are beyond max_length; 0 if it has none."""
        return self.assistant_lost / max(1, self.n_assistant + self.assistant_lost)

    def shortfall(self) -> str | None:
        """A message if the dataset holds less than was requested."""
        found = {"max_documents": self.n_records, "max_tokens": self.n_tokens}
        short = [f"{found[key]:,} of {key} {number:,}" for key, number in self.asked.items() if found[key] < number]
        # Reading stops at either limit, so a dataset is short only if it reached neither.
        return f"{self.name} is shorter than requested: {', '.join(short)}" if short and len(short) == len(self.asked) else None

    def layout(self) -> str | None:
        """A message about layouts and names of roles that were found rather than set."""
        found = [name for name in self.formats if name not in ("messages", "text")]
        if not found and not self.renamed and not self.also and len(self.formats) < 2:
            return None
        renamed = ", ".join(f"{name} as {role}" for name, role in sorted(self.renamed.items()))
        also = f"; it also has the columns of {' and '.join(self.also)}: set its format if they are meant" if self.also else ""
        roles = f"; roles: {renamed}" if renamed else ""
        return f"dataset {self.name}: read as {' and '.join(sorted(self.formats))}{roles}{also}"

    def count(self, document: Document, parts: list[TokenSequence]) -> None:
        """Count a document with its sequences."""
        self.n_documents += 1
        self.n_tokens += sum(len(part.token_ids) for part in parts)
        self.formats[document.format] = self.formats.get(document.format, 0) + 1
        self.renamed |= document.renamed
        if document.also is not None and document.also not in self.also:
            self.also.append(document.also)
        if document.messages is None:
            return
        for part in parts:
            self.n_conversations += 1
            self.n_user += int(np.count_nonzero(part.flags & Flag.USER))
            self.n_assistant += int(np.count_nonzero(part.flags & Flag.ASSISTANT))
            self.assistant_lost += part.assistant_lost


class Texts:
    """The datasets of a harvest as token sequences, read lazily.

    Args:
        unreadable: ids that the base model lacks, with their tokens. Conversations and texts with such a token are omitted.
        is_sample: the datasets go on after what is read of them, so it may be empty.

    Attributes:
        records: one per dataset, updated while reading.
        in_statistics: for each document, whether its tokens enter the statistics of the store: it is in the training split, or
            every document of every dataset is held out.
    """

    def __init__(
        self,
        datasets: tuple[DatasetConfig, ...],
        tokenizer: Any,
        config: HarvestConfig,
        advance: Callable[[], None],
        unreadable: Mapping[int, str] | None = None,
        is_sample: bool = False,
    ) -> None:
        self.datasets, self.tokenizer, self.config, self._advance = datasets, tokenizer, config, advance
        self._unreadable, self._is_sample = unreadable or {}, is_sample
        self.records = []
        for dataset in datasets:
            limits = {"max_documents": dataset.max_documents, "max_tokens": dataset.max_tokens}
            self.records.append(DatasetRecord(dataset.title, {key: n for key, n in limits.items() if n is not None}))
        self.in_statistics: list[bool] = []
        self._nothing_to_train_on = all(dataset.heldout_share == 1 for dataset in datasets)
        self._ended: str | None = None  # the dataset with which a mix ended
        self._rows: list[dict[str, Any]] = []
        self._frames: list[pl.DataFrame] = []

    def sequences(self) -> Iterator[TokenSequence]:
        """Yield all sequences in order. A `UserError` names a dataset that is unreadable, empty or too damaged."""
        datasets = [self._dataset(index) for index in range(len(self.datasets))]
        if self.datasets[0].weight is None:
            for dataset in datasets:
                for parts in dataset:
                    yield from parts
            return
        while True:  # a mix: the dataset that is furthest behind is next, until one of them ends
            behind = [record.n_tokens / (each.weight or 1) for record, each in zip(self.records, self.datasets, strict=True)]
            index = behind.index(min(behind))
            found = next(datasets[index], None)
            if found is None:
                self._ended = self.records[index].name
                return
            yield from found

    def _dataset(self, index: int) -> Iterator[list[TokenSequence]]:
        """Read one dataset and yield the sequences of each document."""
        config, record = self.datasets[index], self.records[index]
        damage = _Damage(record, self.config.max_damaged)
        documents = damage.counted(read_dataset(config, index, len(self.in_statistics), damage.omit_unread))
        for document, found in tokenise_all(documents, self.tokenizer, self.config.max_length):
            error = found if isinstance(found, UserError) else self._unknown(found)
            if error is not None:
                damage.omit(UserError(f"document {len(self.in_statistics)} (of dataset {index}): {error}"))
            parts = [] if error is not None or isinstance(found, UserError) else found
            self._add(document, record, parts, None if parts else str(error or "the text has no tokens"))
            yield parts
            if config.max_tokens is not None and record.n_tokens >= config.max_tokens:
                break
        if not record.n_tokens and not (self._is_sample and record.n_documents == SAMPLE_DOCUMENTS):
            reason = f"; the first record is damaged: {record.reasons[0]}" if record.reasons else ""
            raise UserError(f"{', '.join(config.paths)} has no readable text{reason}")

    def _unknown(self, parts: list[TokenSequence]) -> UserError | None:
        """What is wrong with a document that contains a token which the base model lacks.

        One that the template writes is in every conversation, so it is raised.
        """
        for part in parts if self._unreadable else ():
            at = np.flatnonzero(np.isin(part.token_ids, list(self._unreadable)))
            if len(at):
                error = unknown_token(self._unreadable[int(part.token_ids[at[0]])])
                if part.flags[at[0]] & Flag.TEMPLATE:
                    raise error
                return error
        return None

    def _add(self, document: Document, record: DatasetRecord, parts: list[TokenSequence], left_out: str | None) -> None:
        """Number a document, and add its row to the table."""
        number = len(self.in_statistics)
        for part in parts:
            part.document = number
        record.count(document, parts)
        questions = [message["content"] for message in document.messages or () if message["role"] == "user"]
        self._rows.append(
            {
                "document": number, "dataset": record.name, "split": document.split, "label": document.label,
                "sub_label": document.sub_label, "prompt": questions[0] if questions else None,
                "n_messages": len(document.messages) if document.messages else 0,
                "n_tokens": sum(len(part.token_ids) for part in parts), "left_out": left_out,
            }
        )  # fmt: skip
        if len(self._rows) == ROWS:
            self._frames.append(pl.DataFrame(self._rows, schema=DOCUMENT_COLUMNS))
            self._rows = []
        self.in_statistics.append(document.split == "train" or self._nothing_to_train_on)
        self._advance()

    def table(self) -> pl.DataFrame:
        """The documents read so far."""
        return pl.concat([*self._frames, pl.DataFrame(self._rows, schema=DOCUMENT_COLUMNS)])

    def report(self) -> list[dict[str, Any]]:
        """The records as plain data, for the manifest."""
        return [asdict(record) for record in self.records]

    def check_sides(self) -> None:
        """Check that the conversations hold tokens of both sides, if there are conversations.

        Raises:
            UserError: none of them is the user's, or none the assistant's.
        """
        n_conversations = sum(record.n_conversations for record in self.records)
        sides = {"user": sum(record.n_user for record in self.records), "assistant": sum(r.n_assistant for r in self.records)}
        missing = [side for side, n_tokens in sides.items() if not n_tokens]
        if not n_conversations or not missing:
            return
        lost = sum(record.assistant_lost for record in self.records)
        limit = f"harvest.max_length {self.config.max_length}"
        remedy = "check the roles and the format of the dataset"
        if lost and missing == ["assistant"]:
            remedy = f"{lost:,} tokens of the assistant are beyond {limit}, so raise it"
        raise UserError(
            f"{n_conversations:,} conversations were read, and none of their tokens is the {' or the '.join(missing)}'s; "
            f"{remedy}, or pass --force to harvest them as they are"
        )

    def remarks(self) -> list[str]:
        """Messages about layouts, datasets that are shorter than requested, damaged records and cut answers."""
        short = [remark for record in self.records if (remark := record.shortfall())]
        if self._ended is not None:
            sizes = ", ".join(f"{record.n_tokens:,} of {record.name}" for record in self.records)
            short = [f"the mix ended with the end of {self._ended}; tokens: {sizes}"]
        damaged = [
            f"{record.damaged:,} damaged records of {record.name} were omitted; the first: {record.reasons[0]}"
            for record in self.records
            if record.damaged
        ]
        return self.layouts() + short + damaged + self.lost()

    def lost(self) -> list[str]:
        """A message about each dataset with tokens of the assistant beyond max_length; a warning from `LOST_SHARE` on."""
        limit = f"harvest.max_length {self.config.max_length}"
        return [
            f"{record.lost_share:.1%} of the assistant's tokens of {record.name} are beyond {limit} and left out"
            + ("; raise it, or results will say little about the answers" if record.lost_share >= LOST_SHARE else "")
            for record in self.records
            if record.assistant_lost
        ]

    def layouts(self) -> list[str]:
        """Messages about layouts and names of roles that were found rather than set."""
        return [remark for record in self.records if (remark := record.layout())]


class _Damage:
    """Counts the damaged records of a dataset and refuses too many."""

    def __init__(self, record: DatasetRecord, max_damaged: float) -> None:
        self._record, self._max_damaged = record, max_damaged

    def counted(self, documents: Iterator[Document]) -> Iterator[Document]:
        for document in documents:
            self._record.n_records += 1
            yield document

    def omit_unread(self, error: UserError) -> None:
        """Omit a record that has not become a document."""
        self._record.n_records += 1
        self.omit(error)

    def omit(self, error: UserError) -> None:
        """Omit a record that was counted."""
        record = self._record
        record.damaged += 1
        if record.damaged <= FEW:
            record.reasons.append(str(error))
        elif record.damaged > self._max_damaged * record.n_records:
            raise UserError(
                f"{record.damaged} of the first {record.n_records} records of {record.name} are damaged, a larger share than "
                f"harvest.max_damaged {self._max_damaged:g}; repair them or raise it. The first: {record.reasons[0]}"
            ) from error


def sample(
    datasets: tuple[DatasetConfig, ...], tokenizer: Any, config: HarvestConfig, unreadable: Mapping[int, str] | None = None
) -> tuple[Texts, list[TokenSequence]]:
    """The first `SAMPLE_DOCUMENTS` documents of each dataset, to see what a harvest will find."""
    limited = tuple(
        each.model_copy(update={"max_documents": min(SAMPLE_DOCUMENTS, each.max_documents or SAMPLE_DOCUMENTS), "weight": None})
        for each in datasets
    )
    texts = Texts(limited, tokenizer, config, lambda: None, unreadable, is_sample=True)
    return texts, list(texts.sequences())
