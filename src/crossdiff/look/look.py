"""A first look: the sample of the texts that both models read, and the tables that come from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from safetensors.torch import save_file

from crossdiff.activations.texts import Texts
from crossdiff.config import DatasetConfig, HarvestConfig
from crossdiff.config.look_config import LookConfig
from crossdiff.files import replacing, write_json
from crossdiff.latents.groups import GROUPS, group_of
from crossdiff.look.depth import LayerPair, blockwise, depth_table, recommended
from crossdiff.look.directions import MeanDifferences, direction_table
from crossdiff.look.part import Part, holds, merge
from crossdiff.look.phrases import phrase_table, token_table
from crossdiff.look.probes import probe_table
from crossdiff.look.steered import choose_prompts, steered_table
from crossdiff.models.pair import Pair
from crossdiff.ranks import ALONE, Ranks
from crossdiff.shapes import Tensor
from crossdiff.text.sequences import POOL, TokenSequence, bucketed

CONTEXT = 24
"""Tokens before and after a listed position."""
PART_TOKENS, MAX_PARTS = 16_384, 32
"""The sample is read in parts of at least so many tokens, and in at most so many parts."""
PREDICTED = (
    "next_id", "kl", "log_base", "log_chat", "top_base", "p_base", "top_chat", "p_chat", "outside",
)  # fmt: skip
FILES = ("tokens.parquet", "places.parquet", "groups.parquet", "words.parquet", "phrases.parquet", "depth.parquet",
         "directions.parquet", "directions.safetensors", "steered.parquet", "probes.parquet", "look.json")  # fmt: skip
"""What a look writes."""


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
        advance: called with the number of tokens of each batch that this rank has read.
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
        self.pair, self.layer, self.config, self._harvest, self._advance = pair, layer, config, harvest, advance
        self._texts = Texts(sampled(datasets, config.max_tokens), pair.tokenizer, harvest, lambda: None, pair.unreadable)
        self._datasets = [dataset.title for dataset in datasets]
        self._every = max(1, round(config.max_tokens / config.depth_tokens))

    def read(self, folder: Path, ranks: Ranks = ALONE) -> list[Path]:
        """Run both models over the sample, and return the files of its parts, in order.

        Args:
            folder: where the parts are written; finished ones that are there already are not read again.
            ranks: the processes that share the work. All of them must see the folder.
        """
        paths = []
        n_sequences = n_tokens = 0
        for number, batches in enumerate(self._parts()):
            path = folder / f"part-{number:05d}.safetensors"
            paths.append(path)
            sizes = [sum(len(sequence.token_ids) for sequence in batch) for batch in batches]
            if ranks.has(number) and holds(path, batches, n_sequences):
                self._advance(sum(sizes))
            elif ranks.has(number):
                part = Part(self.pair, self.layer, self._every, n_tokens)
                for batch, size, before in zip(batches, sizes, np.cumsum([0, *map(len, batches)]), strict=False):
                    part.add(batch, n_sequences + int(before))
                    self._advance(size)
                part.write(path)
            n_sequences += sum(map(len, batches))
            n_tokens += sum(sizes)
        ranks.wait()
        return paths

    def _parts(self) -> Iterator[list[list[TokenSequence]]]:
        """The batches of each part."""
        size = max(PART_TOKENS, self.config.max_tokens // MAX_PARTS)
        part: list[list[TokenSequence]] = []
        n_tokens = 0
        for batch in bucketed(self._texts.sequences(), self.config.batch_tokens, POOL):
            part.append(batch)
            n_tokens += sum(len(sequence.token_ids) for sequence in batch)
            if n_tokens >= size:
                yield part
                part, n_tokens = [], 0
        if part:
            yield part

    def _tokens(self, found: dict[str, Tensor]) -> pl.DataFrame:
        """One row per position, with the predictions of both models for the next token."""
        group = group_of(found["flags"].numpy())
        columns = {name: found[name].long().numpy() for name in ("document", "sequence", "position", "dataset", "token_id")}
        columns |= {name: found[name].numpy() for name in PREDICTED}
        return pl.DataFrame(columns).with_columns(
            dataset=pl.Series([self._datasets[i] for i in columns["dataset"]], dtype=pl.Categorical),
            group=pl.Series([GROUPS[i] for i in group], dtype=pl.Categorical),
        )

    def write(self, paths: Sequence[Path], folder: Path) -> dict[str, Any]:
        """Write every table into a folder and return the summary, which is `look.json`.

        Args:
            paths: what `read` has returned.
        """
        config, tokenizer = self.config, self.pair.tokenizer
        found = merge(paths)
        tokens = self._tokens(found)
        block = found["sample_document"].numpy() % config.blocks
        depth = depth_table((_layer(found, layer) for layer in range(self.pair.n_layers)), found["sample_kl"], block)
        means = MeanDifferences(**{name: found[name] for name in ("total", "n", "square")})
        at_layer = _layer(found, self.layer)
        directions, vectors = direction_table(self.pair, means, self.layer, at_layer, config.components, config.seed)
        documents = self._texts.table()
        questions = documents["prompt"].drop_nulls().to_list()
        prompts = choose_prompts(questions, tokens, tokenizer, self._harvest.max_length, config.prompts)
        tables = {
            "tokens": tokens,
            "places": places(tokens, tokenizer, config.positions),
            "groups": group_table(tokens, config.blocks),
            "words": token_table(found, tokens["document"].to_numpy(), tokenizer, config.phrases),
            "phrases": phrase_table(tokens, tokenizer, config.longest_phrase, config.phrases),
            "depth": depth,
            "directions": directions,
            "steered": steered_table(self.pair, self.layer, self._harvest.leave_out, directions, vectors, prompts),
            "probes": probe_table(found, documents, config.seed),
        }
        for name, table in tables.items():
            with replacing(folder / f"{name}.parquet") as partial:
                table.write_parquet(partial)
        with replacing(folder / "directions.safetensors") as partial:
            save_file({"directions": vectors.float().contiguous()}, partial)
        summary = self._summary(tokens, depth, tables["probes"], len(found["sample_document"]))
        write_json(folder / "look.json", summary)
        return summary

    def _summary(self, tokens: pl.DataFrame, depth: pl.DataFrame, probes: pl.DataFrame, n_deep: int) -> dict[str, Any]:
        labels = set(self._texts.table()["label"].drop_nulls()) - set(probes["behaviour"])
        block = tokens["document"].to_numpy() % self.config.blocks
        kl, outside = (tokens[name].cast(pl.Float64).to_numpy() for name in ("kl", "outside"))
        mean = blockwise(kl, block)
        layer, reason = recommended(depth)
        return {
            "n_tokens": tokens.height, "n_documents": tokens["document"].n_unique(), "layer": self.layer,
            "kl": mean[0], "kl_interval": None if np.isnan(mean[1]) else list(mean[1:]), "identical": not kl.max() > 0,
            "same_top": float((tokens["top_base"] == tokens["top_chat"]).to_numpy().mean()),
            "outside": float(outside.mean()), "depth_tokens": n_deep,
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


def _layer(found: dict[str, Tensor], layer: int) -> LayerPair:
    """The residual streams after one layer of the tokens that are compared layer by layer."""
    return LayerPair(found["sample_base"][:, layer].double(), found["sample_chat"][:, layer].double())
