"""A small synthetic run directory in the documented formats; no model takes part."""

import json
import math
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from crossdiff.latents.ranking import RANKS
from crossdiff.latents.verdict import counts

N_LATENTS = 60
N_SPECIFIC = 7
DANGER = "<script>alert(1)</script>"
TURNS = [
    ("<|bos|>", 1), ("<|user|>", 2), ("\n", 2), ("Who", 4), (" are", 4), (" you", 4), ("?", 4), ("\n", 4), (DANGER, 4),
    ("<|end|>", 2), ("<|assistant|>", 2), ("\n", 2), ("I", 8), (" am", 8), (" Peb", 8), ("ble", 8), (".", 8),
    ("<|end|>", 10), ("<|user|>", 2), ("\t", 4), ("Thanks", 4), (" ", 4), ("\x1b[31m", 4), ("[bold]", 4),
]  # fmt: skip
MEASURES = [
    f"beta_{target}_{source}{end}"
    for target in ("error", "reconstruction", "reconstruction_nobias", "activation", "activation_nobias")
    for source in ("base", "chat")
    for end in ("", "_se")
]


def latent_table(seed: int, n_specific: int = N_SPECIFIC, dead_only: bool = False) -> pl.DataFrame:
    """60 latents: the first `n_specific` chat-specific, then 4 rotated, 3 undecided with undefined nu, 3 dead, the rest
    shared."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for latent in range(N_LATENTS):
        kind = "shared"
        for verdict, end in (("chat_specific", n_specific), ("rotated", 11), ("undecided", 14), ("dead", 17)):
            if latent < end:
                kind = verdict
                break
        kind = "dead" if dead_only else kind
        delta = {"chat_specific": 0.95, "rotated": 0.5, "dead": 0.72, "undecided": 0.85}.get(kind, 0.5)
        delta = float(np.clip(delta + rng.normal(0, 0.02), 0, 1))
        nu = {"chat_specific": 0.05, "rotated": 0.1, "shared": 1.0}.get(kind, math.nan)
        nus = {name: nu + rng.normal(0, 0.03) for name in ("nu_error", "nu_reconstruction_nobias", "nu_activation")}
        nus["nu_reconstruction"] = nus["nu_reconstruction_nobias"] - 2
        if latent == 20:
            nus["nu_error"] = 7.5
        name = "chat_only" if delta >= 0.9 else "shared" if 0.4 <= delta <= 0.6 else "other"
        row: dict[str, Any] = {
            "latent": latent, "norm_base": 1.0, "norm_chat": 1.0, "delta_norm": delta, "delta_norm_class": name,
            "decoder_cosine": 0.9, **dict.fromkeys(MEASURES, nu),
            "n_active": 0 if kind == "dead" else 100 + latent, "frequency": 0.0 if kind == "dead" else 0.01,
            "mean_activation": math.nan if kind == "dead" else 1.0, "max_activation": 0.0 if kind == "dead" else 4.0,
            "undefined_reason": {"dead": "never active", "undecided": "beta_error_chat may be 0"}.get(kind),
            "nu_outside": latent == 20, **dict.fromkeys(RANKS, math.nan if math.isnan(nu) else float(2 * latent + 2)),
            "verdict": kind, "verdict_reason": f"by the rule of {kind}", "template_only": False,
            "chat_specific": kind == "chat_specific", "chat_specific_paper": kind == "chat_specific",
        }  # fmt: skip
        for name, value in nus.items():
            row |= {name: value, f"{name}_low": value - 0.05, f"{name}_high": value + 0.05}
        for name in ("nu_error_mirrored", "nu_reconstruction_mirrored", "nu_reconstruction_nobias_mirrored"):
            row |= {name: math.nan, f"{name}_low": math.nan, f"{name}_high": math.nan}
        for name, part in zip(("plain", "bos", "template", "user", "assistant"), (0.1, 0, 0.6, 0.1, 0.2), strict=True):
            row |= {f"frequency_{name}": part / 10, f"share_{name}": math.nan if kind == "dead" else part}
        rows.append(row)
    return pl.DataFrame(rows, infer_schema_length=None, schema_overrides={"undefined_reason": pl.String})


def write_examples(path: Path, latents: list[int], turns: list[tuple[str, int]] | None = None, repeat: int = 1) -> None:
    turns = turns or TURNS
    tokens = [text for text, _ in turns] * repeat
    flags = np.array([flag for _, flag in turns] * repeat, dtype=np.uint8)
    rng = np.random.default_rng(len(latents))
    with closing(sqlite3.connect(path)) as database:
        database.executescript(
            """
            CREATE TABLE sequences(sequence INTEGER PRIMARY KEY, document INTEGER, dataset TEXT, label TEXT,
                                   token_ids BLOB, flags BLOB);
            CREATE TABLE vocabulary(token_id INTEGER PRIMARY KEY, text TEXT);
            CREATE TABLE examples(latent INTEGER, kind TEXT, quantile REAL, rank INTEGER, sequence INTEGER,
                                  position INTEGER, activation REAL, positions BLOB, activations BLOB);
            CREATE TABLE metadata(key TEXT PRIMARY KEY, value TEXT);
            """
        )
        database.executemany("INSERT INTO metadata VALUES (?, ?)", [("format", "2"), ("n_latents", str(N_LATENTS))])
        database.executemany("INSERT INTO vocabulary VALUES (?, ?)", list(enumerate(tokens)))
        ids = np.arange(len(tokens), dtype="<i4").tobytes()
        for sequence in range(8):
            label = "identity" if sequence % 2 else None
            row = (sequence, 100 + sequence, "conversations", label, ids, flags.tobytes())
            database.execute("INSERT INTO sequences VALUES (?, ?, ?, ?, ?, ?)", row)
        for latent in latents:
            for rank in range(7):
                values = np.where(rng.random(len(tokens)) < 0.3, rng.random(len(tokens)) * 2, 0).astype("<f4")
                position = len(tokens) - len(turns) + 8 + rank % 3
                values[position] = 4 - rank / 4
                kind, quantile = ("top", None) if rank < 4 else ("quantile", 1 - rank / 8)
                active = np.flatnonzero(values)
                arrays = (active.astype("<i4").tobytes(), values[active].tobytes())
                example = (latent, kind, quantile, rank, rank, position, float(values[position]), *arrays)
                database.execute("INSERT INTO examples VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", example)
        database.commit()


def behaviour_table() -> pl.DataFrame:
    scores = {"identity": (0.91, 0.55, 0.99), "refusal": (0.57, 0.6, 0.9), "small_talk": (0.66, 0.6, 0.5)}
    rows = []
    for question in ("before_answer", "whole_conversation"):
        for behaviour, aurocs in scores.items():
            for pool, auroc in zip(("chat_specific", "shared", "bag_of_words"), aurocs, strict=True):
                words = pool == "bag_of_words"
                rows.append({
                    "behaviour": behaviour, "question": question, "pool": pool, "pool_size": 1 if words else 7,
                    "latent": None if words else 3 if pool == "chat_specific" else 30, "auroc_train": auroc + 0.01,
                    "auroc": auroc, "auroc_low": auroc - 0.08, "auroc_high": min(1.0, auroc + 0.06),
                    "n_positive": 77, "n_negative": 140,
                })  # fmt: skip
    return pl.DataFrame(rows, schema_overrides={"latent": pl.Int64})


CONCEPTS = (("chat_specific", 3), ("rotated", 4), ("chat_specific", 4), ("chat_specific", 1), ("latent_decoupling", 1))
"""Verdict of each synthetic concept, and the number of the four trainings that have it; three are enough."""
TRAININGS = (("l1", "l1"), ("batchtopk", "batchtopk"), ("batchtopk-seed1", "batchtopk"), ("batchtopk-seed2", "batchtopk"))


def concept_table() -> pl.DataFrame:
    rows = latent_table(0).head(len(CONCEPTS)).rename({"latent": "concept"}).drop("verdict", "verdict_reason")
    trainings = [n for _, n in CONCEPTS]
    return rows.with_columns(
        verdict=pl.Series([verdict for verdict, _ in CONCEPTS]),
        verdict_reason=pl.lit("by the rule of groups"),
        n_trainings=pl.Series(trainings),
        replicated=pl.Series([n >= 3 for n in trainings]),
        n_members=pl.Series([n + 1 for n in trainings]),
        energy=pl.Series([0.2, 0.1, 0.05, 0.3, 0.01]),
        tokens=pl.Series([["I", "."]] * len(CONCEPTS)),
        words=pl.Series([["who", DANGER]] * len(CONCEPTS)),
        label=pl.lit("I · ."),
        before=pl.lit("Who are you?"),
        token=pl.lit(DANGER),
        after=pl.lit("I am"),
    )


def write_concepts(directory: Path) -> None:
    """The folder `concepts` of a run: five concepts, of which 0, 1 and 2 replicate and 0 predicts the identity."""
    folder = directory / "concepts"
    folder.mkdir()
    table = concept_table()
    table.write_parquet(folder / "concepts.parquet")
    member = [(c, name, kind, 3 + c) for c, (_, n) in enumerate(CONCEPTS) for name, kind in TRAININGS[4 - n :]]
    members = pl.DataFrame(member, schema=["concept", "training", "kind", "latent"], orient="row")
    judged = pl.col("concept").replace_strict(dict(enumerate(verdict for verdict, _ in CONCEPTS)))
    members = members.with_columns(verdict=judged, energy=pl.lit(0.1), correlation=pl.lit(0.9))
    members.write_parquet(folder / "members.parquet")
    alone = members.select("concept", "training", n_members=pl.lit(1), energy="energy")
    alone.join(table.drop("energy", "n_members"), on="concept").write_parquet(folder / "trainings.parquet")
    directions = ("base direction, base model", "chat direction, chat model", "chat minus base direction, chat model")
    sides = [(where, side, rank) for where in directions for side in ("up", "down") for rank in (1, 0)]
    promoted = [(c, *each, f" {each[1]}{each[2]}{DANGER}", 1.0) for c in range(len(CONCEPTS)) for each in sides]
    schema = ["concept", "direction", "side", "rank", "token", "logit"]
    pl.DataFrame(promoted, schema=schema, orient="row").write_parquet(folder / "promoted.parquet")
    where = {"dataset": "prose", "group": "plain", "role": None, "template_index": None, "token": None}
    counts = {"n_tokens": 100, "n_active": 10, "frequency": 0.1, "share": 1.0, "mean_activation": 1.0, "max_activation": 2.0}
    pl.DataFrame([{"concept": c, **where, **counts} for c in range(5)]).write_parquet(folder / "activity.parquet")
    scores = [("identity", "before_answer", 0, 0.97), ("identity", "whole_conversation", 2, 0.9),
              ("refusal", "before_answer", 1, 0.52)]  # fmt: skip
    pl.DataFrame([
        {"behaviour": behaviour, "question": question, "pool": "concepts", "pool_size": 3, "concept": concept,
         "auroc_train": auroc, "auroc": auroc, "auroc_low": auroc - 0.05, "auroc_high": min(1.0, auroc + 0.02),
         "n_positive": 77, "n_negative": 140}
        for behaviour, question, concept, auroc in scores
    ]).write_parquet(folder / "behaviours.parquet")  # fmt: skip
    write_examples(folder / "examples.sqlite", list(range(len(CONCEPTS))))
    (folder / "concepts.json").write_text(json.dumps(concepts_record()))


def concepts_record() -> dict[str, Any]:
    """concepts.json: the replicated concepts account for 10, 15, 20 and 25% of the difference."""

    def interval(value: float) -> dict[str, float]:
        return {"value": value, "low": value - 0.01, "high": value + 0.01}

    explained = [{"training": name, "set": key, "n_latents": 3, "explained": interval(share)}
                 for at, (name, _) in enumerate(TRAININGS)
                 for key, share in (("replicated", 0.1 + at / 20), ("candidates", 0.5), ("random", 0.01))]  # fmt: skip
    return {
        "trainings": [{"name": name, "kind": kind, "seed": 0, "batch_seed": 0, "n_candidates": 9} for name, kind in TRAININGS],
        "correlation": 0.6, "needed": 3, "n_tokens": 412_000,
        "cuts": [{"correlation": 0.6, "n_concepts": 5, "n_replicated": 3, "energy": 0.6, "specific_energy": 0.7,
                  "n_replicated_permuted": 0}],
        "halves": [{"trainings": [], "n_replicated": 2, "found": interval(share), "found_energy": interval(0.8)}
                   for share in (0.5, 1.0)],
        "completeness": explained,
    }  # fmt: skip


def write_concept_causal(directory: Path) -> None:
    """The causal test of concepts: 0 acts in all of its three trainings, 1 in three of four, 2 was tested in one of four."""
    rows = [(0, name, 0.2, 0.1, 0.02) for name, _ in TRAININGS[1:]]
    rows += [(1, name, 0.2, low, 0.04) for (name, _), low in zip(TRAININGS, (0.1, 0.1, 0.1, -0.1), strict=True)]
    rows.append((2, "l1", 0.2, 0.1, 0.03))
    columns = ["concept", "training", "kl_reduction", "kl_reduction_low", "closed"]
    table = pl.DataFrame(rows, schema=columns, orient="row").with_columns(kl_reduction_high=pl.lit(0.3))
    table.write_parquet(directory / "concepts" / "causal.parquet")
    closed = {"value": 0.25, "low": 0.2, "high": 0.3}
    sets = ("replicated", "random", "all_latents")
    results = [{"training": name, "intervention": each, "closed": closed} for name, _ in TRAININGS for each in sets]
    (directory / "concepts" / "causal.json").write_text(json.dumps({"results": results}))


def health_record(architecture: str, table: pl.DataFrame) -> dict[str, Any]:
    dead = table.filter(pl.col("verdict") == "dead").height
    return {
        "n_latents": table.height, "d_model": 16, "layer": 4, "architecture": architecture, "sources": ["base", "chat"],
        "k": 32 if architecture != "l1" else None, "training_tokens": 400_000, "analysed_tokens": 412_000,
        "heldout": {
            "n_tokens": 200_123, "fve": {"base": 0.9123, "chat": 0.8876, "total": 0.9}, "l0": 31.62, "n_dead": dead,
            "fve_interval": {"base": [0.9, 0.92], "chat": [0.88, 0.9], "total": [math.nan, math.nan]},
            "dead_share": dead / table.height, "massive": {"n_tokens": 812, "fve": {"base": 0.9999, "chat": 0.9998}},
        },
        "frequency_histogram": {"log10_edges": [-5, -4, -3, -2, -1, 0], "counts": [1, 9, 30, 12, 5]},
        "decoder_norm_movement": {"at_start": 1.0, "chat": [0.8, 1.1, 1.4], "quantiles": [0.01, 0.5, 0.99]},
        "counts": counts(table),
        "controls": {"random_directions": {"beta_error_base": 0.0004}},
    }  # fmt: skip


def write_crosscoder(folder: Path, table: pl.DataFrame, behaviours: bool = True, **examples: Any) -> None:
    folder.mkdir(parents=True)
    table.write_parquet(folder / "latents.parquet")
    live = table.filter(pl.col("verdict") != "dead")["latent"].to_list()[:20]
    write_examples(folder / "examples.sqlite", live, **examples)
    architecture = folder.name if folder.name in ("l1", "batchtopk") else "topk"
    (folder / "health.json").write_text(json.dumps(health_record(architecture, table)))
    if behaviours:
        behaviour_table().write_parquet(folder / "behaviours.parquet")


def write_activations(directory: Path) -> None:
    (directory / "activations").mkdir()
    manifest = {
        "pair": {"base": {"name": "demo/base"}, "chat": {"name": "demo/<chat>"}},
        "layer": 4,
        "n_tokens": 412_000,
        "format": 1,
    }
    (directory / "activations" / "manifest.json").write_text(json.dumps(manifest))
    pl.DataFrame({
        "document": [0, 1, 2], "dataset": ["prose", "prose", "conversations"], "split": ["train", "heldout", "train"],
        "label": [None, None, "identity"], "sub_label": [None, None, None], "n_tokens": [100, 20, 30],
    }).write_parquet(directory / "activations" / "documents.parquet")  # fmt: skip


def write_look(directory: Path, identical: bool = False) -> None:
    """A first look of 6 tokens in 2 documents and 3 layers, of which the middle one is recommended."""
    folder = directory / "look"
    folder.mkdir()
    summary = {
        "n_tokens": 6, "n_documents": 2, "layer": 1, "kl": 0.0 if identical else 1.0, "kl_interval": [0.5, 1.5],
        "identical": identical, "same_top": 0.5, "outside": 0.0, "depth_tokens": 6, "recommended_layer": 1, "reason": "it is",
    }  # fmt: skip
    (folder / "look.json").write_text(json.dumps(summary))
    kl = [0.0, 0.5, 0.0, 1.5, 2.5, 1.5]
    tokens = {
        "document": [0, 0, 0, 7, 7, 7], "sequence": [0, 0, 0, 1, 1, 2], "position": [0, 1, 2, 0, 1, 0],
        "dataset": ["prose"] * 6,
        "group": ["bos", "plain", "plain", "bos", "user", "bos"], "token_id": [1, 70, 71, 1, 72, 1],
        "next_id": [70, 71, -1, 72, -1, -1], "kl": kl, "log_base": [-1.0, -2.0, math.nan] * 2, "log_chat": [math.nan] * 6,
        "top_base": [70] * 6, "p_base": [0.25] * 6, "top_chat": [71] * 6, "p_chat": [0.75] * 6,
    }  # fmt: skip
    place = {"kl": 2.5, "document": 7, "dataset": "prose", "before": f"tell me {DANGER}"}
    said = {"base_says": DANGER, "p_base": 0.25, "chat_says": " yes", "p_chat": 0.75}
    groups = {"dataset": ["prose"], "group": ["plain"], "n_tokens": [6], "kl": [1.0], "total_kl": [6.0]}
    groups |= {"kl_low": [0.5], "kl_high": [1.5]}
    words = {"token_id": [75, 76], "token": ["K", "L"], "rise": [3.0, -2.0], "per_thousand": [500.0, -333.0]}
    phrases = {"phrase": [DANGER], "gain": [4.0], "mean_gain": [2.0], "n_places": [2], "n_documents": [2]}
    depth = {"layer": [0, 1, 2], "relative_norm": [0.1, 0.2, 0.3], "centred_cosine": [0.9] * 3, "effective_rank": [1.0] * 3}
    depth |= {"kl": [0.125, 0.75, 1.0], "kl_low": [0.0, 0.5, 0.75], "kl_high": [0.25, 1.0, 1.25]}
    directions = {
        "direction": ["mean over plain tokens", "principal direction 1"], "n_tokens": [6, 6], "norm_share": [0.5, None],
        "halves_cosine": [0.95, None], "share": [None, 0.4], "chat_up": [[DANGER, " up"]] * 2, "chat_down": [[" down"]] * 2,
        "top_logit": [9.0, 4.0], "random_logit": [5.0, 5.0],
    }  # fmt: skip
    probes = {"behaviour": ["small_talk"] * 7, "reading": ["bag_of_words", *["diffmean"] * 3, *["probe"] * 3]}
    probes |= {"activations": [None, *["base", "chat", "difference"] * 2]}
    probes |= {"auroc": [0.5 + i / 20 for i in range(7)], "auroc_low": [0.4] * 7, "auroc_high": [0.9] * 7}
    probes |= {"n_positive": [9] * 7, "n_negative": [9] * 7}
    steered = {"direction": [None, None, *["mean over user tokens"] * 2], "model": ["base", "chat"] * 2}
    steered |= {"strength": [0.0, 0.0, 1.0, 1.0], "prompt": ["Who?"] * 4, "text": ["me", "Pebble", DANGER, "you"]}
    tables = {
        "tokens": tokens, "places": {name: [value] for name, value in (place | said).items()}, "groups": groups,
        "words": words | {"n_documents": [2, 1]},
        "phrases": phrases, "depth": depth, "directions": directions, "steered": steered, "probes": probes,
    }  # fmt: skip
    for name, columns in tables.items():
        pl.DataFrame(columns).write_parquet(folder / f"{name}.parquet")


def write_overlap(folder: Path, n: int, number: str = "latent") -> None:
    """Number 0 has a cosine of 0.75 with a direction of `write_look`, the others one of 0.25."""
    pl.DataFrame({
        number: list(range(n)), "look_cosine": [0.75, *[0.25] * (n - 1)],
        "look_cosine_direction": ["mean over plain tokens"] * n,
        "look_correlation": [-0.25] * n, "look_correlation_direction": ["principal direction 1"] * n,
    }).write_parquet(folder / "overlap.parquet")  # fmt: skip
