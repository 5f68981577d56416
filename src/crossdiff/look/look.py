"""One pass of both models over a sample of the texts, and the tables of the first look that come from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from safetensors.torch import save_file

from crossdiff.activations.passes import right_padded
from crossdiff.activations.texts import Texts
from crossdiff.config import DatasetConfig, HarvestConfig
from crossdiff.config.look_config import LookConfig
from crossdiff.errors import UserError
from crossdiff.files import replacing, write_json
from crossdiff.latents.groups import GROUPS, group_of
from crossdiff.look.depth import Continuations, LayerPair, blockwise, depth_table, recommended
from crossdiff.look.directions import MeanDifferences, direction_table
from crossdiff.look.phrases import phrase_table, token_table
from crossdiff.look.predictions import Shifts, compare
from crossdiff.look.probes import ConversationMeans, probe_table
from crossdiff.models.access import residuals_and_logits
from crossdiff.models.pair import Pair
from crossdiff.shapes import Float, Tensor
from crossdiff.sources import SOURCES
from crossdiff.text.sequences import POOL, TokenSequence, bucketed

CONTEXT = 24
"""Tokens before and after a listed position."""
FILES = ("tokens.parquet", "places.parquet", "groups.parquet", "words.parquet", "phrases.parquet", "depth.parquet",
         "directions.parquet", "directions.safetensors", "probes.parquet", "look.json")  # fmt: skip
"""What a look writes."""


@dataclass
class _Sample:
    """The residual streams of the tokens that are compared layer by layer."""

    base: list[list[Tensor]] = field(default_factory=list)
    chat: list[list[Tensor]] = field(default_factory=list)
    document: list[npt.NDArray[np.int64]] = field(default_factory=list)

    @property
    def n_tokens(self) -> int:
        return sum(map(len, self.document))

    def layers(self) -> list[LayerPair]:
        """One pair per layer."""
        return [
            LayerPair(*(torch.cat([batch[layer] for batch in side]).double() for side in (self.base, self.chat)))
            for layer in range(len(self.base[0]))
        ]


def sampled(datasets: tuple[DatasetConfig, ...], max_tokens: int) -> tuple[DatasetConfig, ...]:
    """The datasets, cut so that each has an equal part of the tokens."""
    share = max(1, max_tokens // len(datasets))
    return tuple(
        dataset.model_copy(update={"max_tokens": min(share, dataset.max_tokens or share), "weight": None})
        for dataset in datasets
    )


class Look:
    """Compares two models on a sample of texts.

    Args:
        layer: where directions are read and probes are fitted.
        advance: called with the number of tokens of each batch.
    """

    def __init__(
        self,
        pair: Pair,
        layer: int,
        datasets: tuple[DatasetConfig, ...],
        config: LookConfig,
        harvest: HarvestConfig,
        advance: Callable[[int], None] = lambda n_tokens: None,
    ) -> None:
        self.pair, self.layer, self.config, self._advance = pair, layer, config, advance
        self._texts = Texts(sampled(datasets, config.max_tokens), pair.tokenizer, harvest, lambda: None, pair.unreadable)
        self._datasets = [dataset.title for dataset in datasets]
        self._every = max(1, round(config.max_tokens / config.depth_tokens))
        self._shifts: Shifts | None = None
        self._means = MeanDifferences(pair.n_layers, pair.d_model)
        self._conversations = ConversationMeans()
        self._sample, self._continuations = _Sample(), Continuations(pair)
        self._columns: list[dict[str, npt.NDArray[Any]]] = []
        self._n_sequences = 0

    def read(self) -> None:
        """Run both models over the sample."""
        for batch in bucketed(self._texts.sequences(), self.config.batch_tokens, POOL):
            self._add(batch)
            self._advance(sum(len(sequence.token_ids) for sequence in batch))

    def _add(self, batch: list[TokenSequence]) -> None:
        """Compare the models on a batch of sequences."""
        ids, kept = right_padded([sequence.token_ids for sequence in batch])
        self.pair.check_length(ids.shape[1], f"a sequence of {ids.shape[1]} tokens", "lower harvest.max_length")
        lengths = np.array([len(sequence.token_ids) for sequence in batch])
        ends = np.cumsum(lengths) - 1
        nexts, streams, logits = [], [], []
        for source, model in zip(SOURCES, self.pair.models, strict=True):
            own = self.pair.ids_of(source, ids)
            hidden, predicted = residuals_and_logits(model, own.to(next(model.parameters()).device))
            streams.append([_unpadded(h, kept) for h in hidden])
            logits.append(_unpadded(predicted, kept))
            flat = own.flatten() if kept is None else own.flatten()[kept]
            following = flat.roll(-1)
            following[torch.from_numpy(ends)] = -1
            nexts.append(following)
        if self._shifts is None:
            self._shifts = Shifts(min(part.shape[1] for part in logits), logits[0].device)
        base_next, chat_next = (each.to(logits[0].device) for each in nexts)
        found = compare(logits[0], logits[1], base_next, chat_next, self._shifts)
        if not bool(found.kl.isfinite().all()):
            raise _not_finite(self.pair, logits)
        flags = np.concatenate([sequence.flags for sequence in batch])
        document = np.repeat([sequence.document for sequence in batch], lengths)
        position = np.concatenate([np.arange(length) for length in lengths])
        sequence = np.repeat(np.arange(len(batch)), lengths)
        base, chat = streams
        self._means.add(base, chat, flags, position, document)
        self._conversations.add(base[self.layer], chat[self.layer], flags, sequence, document)
        self._columns.append({
            "document": document, "sequence": sequence + self._n_sequences, "position": position,
            "dataset": np.repeat([each.dataset for each in batch], lengths), "group": group_of(flags),
            "token_id": (ids.flatten() if kept is None else ids.flatten()[kept]).numpy(), "next_id": nexts[1].numpy(),
            **{name: getattr(found, name).numpy() for name in found.__dataclass_fields__},
        })  # fmt: skip
        self._go_deeper(batch, ids, streams, logits[1])
        self._n_sequences += len(batch)

    def _go_deeper(self, batch: list[TokenSequence], ids: Tensor, streams: list[list[Tensor]], chat_logits: Tensor) -> None:
        """Compare the models layer by layer on every so many-th sequence."""
        lengths = [len(sequence.token_ids) for sequence in batch]
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        chosen = [i for i in range(len(batch)) if (self._n_sequences + i) % self._every == 0]
        if not chosen:
            return
        rows = np.concatenate([np.arange(bounds[i], bounds[i + 1]) for i in chosen])
        taken = torch.from_numpy(rows).to(chat_logits.device)
        base, chat = ([h[taken].float() for h in side] for side in streams)
        self._sample.base.append([h.cpu() for h in base])
        self._sample.chat.append([h.cpu() for h in chat])
        self._sample.document.append(np.repeat([batch[i].document for i in chosen], [lengths[i] for i in chosen]))
        longest = max(lengths[i] for i in chosen)
        mask = torch.zeros(len(chosen), longest, dtype=torch.int64)
        for row, i in enumerate(chosen):
            mask[row, : lengths[i]] = 1
        padded = [torch.zeros(len(chosen), longest, h.shape[1], dtype=h.dtype, device=h.device) for h in base]
        for target, h in zip(padded, base, strict=True):
            target[mask.bool().to(h.device)] = h
        device = chat_logits.device
        read = ids[chosen, :longest].to(device)
        self._continuations.add(padded, chat_logits[taken], read, mask.to(device))

    def tokens(self) -> pl.DataFrame:
        """One row per position, with the predictions of both models for the next token."""
        merged = {name: np.concatenate([part[name] for part in self._columns]) for name in self._columns[0]}
        return pl.DataFrame(merged).with_columns(
            dataset=pl.Series([self._datasets[i] for i in merged["dataset"]], dtype=pl.Categorical),
            group=pl.Series([GROUPS[i] for i in merged["group"]], dtype=pl.Categorical),
        )

    def write(self, folder: Path) -> dict[str, Any]:
        """Write every table into a folder and return the summary, which is `look.json`."""
        config, tokenizer = self.config, self.pair.tokenizer
        tokens = self.tokens()
        assert self._shifts is not None
        kl = torch.cat(self._continuations.kl, dim=1)
        layers = self._sample.layers()
        block = np.concatenate(self._sample.document) % config.blocks
        depth = depth_table(layers, kl, block)
        directions, vectors = direction_table(
            self.pair, self._means, self.layer, layers[self.layer], config.components, config.seed
        )
        tables = {
            "tokens": tokens,
            "places": places(tokens, tokenizer, config.positions),
            "groups": group_table(tokens, config.blocks),
            "words": token_table(self._shifts, tokens["document"].to_numpy(), tokenizer, config.phrases),
            "phrases": phrase_table(tokens, tokenizer, config.longest_phrase, config.phrases),
            "depth": depth,
            "directions": directions,
            "probes": probe_table(self._conversations, self._texts.table(), config.seed),
        }
        for name, table in tables.items():
            with replacing(folder / f"{name}.parquet") as partial:
                table.write_parquet(partial)
        with replacing(folder / "directions.safetensors") as partial:
            save_file({"directions": vectors.float().contiguous()}, partial)
        summary = self._summary(tokens, depth, tables["probes"])
        write_json(folder / "look.json", summary)
        return summary

    def _summary(self, tokens: pl.DataFrame, depth: pl.DataFrame, probes: pl.DataFrame) -> dict[str, Any]:
        labels = set(self._texts.table()["label"].drop_nulls()) - set(probes["behaviour"])
        block = tokens["document"].to_numpy() % self.config.blocks
        kl, outside = (tokens[name].cast(pl.Float64).to_numpy() for name in ("kl", "outside"))
        mean = blockwise(kl, block)
        layer, reason = recommended(depth)
        return {
            "n_tokens": tokens.height, "n_documents": tokens["document"].n_unique(), "layer": self.layer,
            "kl": mean[0], "kl_interval": None if np.isnan(mean[1]) else list(mean[1:]), "identical": not kl.max() > 0,
            "same_top": float((tokens["top_base"] == tokens["top_chat"]).to_numpy().mean()),
            "outside": float(outside.mean()), "depth_tokens": self._sample.n_tokens,
            "recommended_layer": layer, "reason": reason, "skipped": sorted(labels),
        }  # fmt: skip


def group_table(tokens: pl.DataFrame, blocks: int) -> pl.DataFrame:
    """The mean KL of each dataset and group of tokens, with its interval from the jackknife over blocks of documents."""
    rows = []
    for (dataset, group), part in tokens.group_by("dataset", "group"):
        block = part["document"].to_numpy() % blocks
        mean = blockwise(part["kl"].cast(pl.Float64).to_numpy(), block)
        share = float(part["kl"].cast(pl.Float64).sum())
        rows.append({"dataset": dataset, "group": group, "n_tokens": part.height, "kl": mean[0], "kl_low": mean[1],
                     "kl_high": mean[2], "total_kl": share})  # fmt: skip
    schema = {"dataset": pl.String, "group": pl.String, "n_tokens": pl.Int64} | dict.fromkeys(
        ("kl", "kl_low", "kl_high", "total_kl"), pl.Float64
    )
    return pl.DataFrame(rows, schema=schema).sort("total_kl", "dataset", "group", descending=[True, False, False])


def places(tokens: pl.DataFrame, tokenizer: Any, n: int) -> pl.DataFrame:
    """The positions of the largest KL in context, at most one per document: what both models would say next."""
    first = (
        tokens.with_row_index("row")
        .sort("kl", "row", descending=[True, False])
        .unique("document", keep="first", maintain_order=True)
    )
    ids, sequence = tokens["token_id"].to_numpy(), tokens["sequence"].to_numpy()
    rows = []
    for row in first.head(n).iter_rows(named=True):
        at = row["row"]
        inside = sequence == row["sequence"]
        start, stop = int(inside.argmax()), int(len(inside) - inside[::-1].argmax())
        before, after = ids[max(start, at - CONTEXT + 1) : at + 1], ids[at + 1 : min(stop, at + 1 + CONTEXT)]
        rows.append({
            "kl": row["kl"], "document": row["document"], "position": row["position"], "dataset": row["dataset"],
            "group": row["group"], "before": tokenizer.decode(before.tolist()), "after": tokenizer.decode(after.tolist()),
            "base_says": tokenizer.decode([row["top_base"]]), "p_base": row["p_base"],
            "chat_says": tokenizer.decode([row["top_chat"]]), "p_chat": row["p_chat"],
        })  # fmt: skip
    texts = ("dataset", "group", "before", "after", "base_says", "chat_says")
    return pl.DataFrame(rows, schema_overrides=dict.fromkeys(texts, pl.String))


def _unpadded(h: Float[Tensor, "sequence position width"], kept: Tensor | None) -> Float[Tensor, "token width"]:
    flat = h.flatten(0, 1)
    return flat if kept is None else flat.index_select(0, kept.to(flat.device))


def _not_finite(pair: Pair, logits: list[Tensor]) -> UserError:
    """Which of the models it was that gave logits that are not finite."""
    source = next(source for source, found in zip(SOURCES, logits, strict=True) if not bool(found.isfinite().all()))
    return UserError(
        f"the {source} model ({pair.identity[source]['name']}) gives NaN or infinite logits: set model_dtype to float32 if "
        "they overflow, otherwise check the model's weights"
    )
