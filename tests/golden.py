"""Prove that a refactoring changes nothing that a user computes.

Run a small fixed set of commands with the code before and after, and compare every result with its counterpart:

    python tests/golden.py make /tmp/before --source /tmp/original/src   # about 4 minutes on one core
    python tests/golden.py make /tmp/after                               # the package that is installed
    python tests/golden.py compare /tmp/before /tmp/after
    python tests/golden.py resume /tmp/before /tmp/resumed

`make` runs the commands on the embedded pair in a new folder. `compare` fails if a number differs by more than 1e-6 of itself,
or anything else at all. Texts for people, such as the reason of a verdict, may change: they are listed. Times, figures and
TensorBoard's files are not compared. Of the pages, 95% of the numbers must be the same.
`resume` runs the same commands over a copy of finished runs and fails if a stage is done again, apart from the report, whose
fingerprint contains the code of the page.

The script uses only the command line, the files of a run and `crossdiff.open`, so it works with both versions. The output
of every command is kept in FOLDER/stdout.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import yaml
from safetensors import safe_open

TOLERANCE = 1e-6
LISTED = 5
"""Differences listed per column or tensor, the largest first; six times as many per file."""
SHARE = {"html": 0.95, "printed card": 0.95, "printed words": 0.8, "printed numbers": 1.0}
"""Smallest share of the numbers, or words, of two texts that must be in both."""
PRINTED = {"seeds-batchtopk": "numbers", "seeds-l1": "numbers", "push": "card", "steer-prompt": "words"}
"""Commands with results that are printed and written nowhere."""
IGNORED = {"seconds", "finished", "created", "time", "environment", "versions"}
"""Keys of JSON whose values differ between two runs of the same code."""
PROSE = re.compile(r"reason|notes?\b|remarks?\b|left_out/|/rule$|/shown$|metadata/activation$")
"""Keys, columns and rows with texts for people."""
NUMBER, WORD = re.compile(r"[-\N{MINUS SIGN}]?\d+(?:[.,]\d+)*(?:e[-+]?\d+)?"), re.compile(r"[\w'.]+")

SETTINGS = """
main.yaml:
  {base: demo:base, chat: demo:chat, layer: 5, harvest: &harvest {batch_tokens: 1024, shard_tokens: 4096},
   dataset: [{path: demo:plain, heldout_share: 0.5, max_documents: 16},
     {path: demo:chat_train, label_column: kind, sub_label_column: sub, heldout_share: 0.0, max_documents: 220},
     {path: demo:chat_test, label_column: kind, sub_label_column: sub, heldout_share: 1.0, max_documents: 140}],
   # Limits that give most verdicts some latents after so short a training.
   analyze: &analyze {blocks: 5, min_active: 15, pool_size: 40, examples: 4, examples_per_quantile: 1, twin_cosine: 0.3,
     template_share: 0.5, nu_error: 0.6, nu_reconstruction: 0.8, delta_norm: 0.55},
   compare: {max_tokens: 1000}, causal: {max_conversations: 5, resamples: 100, pool: 24},
   crosscoders: {
     l1: &l1 {sparsity: &mu {kind: l1, mu: 10, mu_warmup_share: 0.1}, decoder_norm: 0.3, n_latents: 256, batch_size: 128,
       lr: 3.0e-3, epochs: 1.5, warmup_steps: 10, dead_after_tokens: 128},
     l1_seed1: {<<: *l1, seed: 1}, l1_plain: {<<: *l1, sparsity: {<<: *mu, resamplings: 0}},
     batchtopk: &batchtopk {<<: *l1, sparsity: {kind: batchtopk, k: 8}, batch_size: 256, dead_after_tokens: 1500},
     batchtopk_seed1: {<<: *batchtopk, seed: 1}, topk: &topk {<<: *batchtopk, sparsity: {kind: topk, k: 8}},
     jumprelu: &jumprelu {<<: *batchtopk, sparsity: {kind: jumprelu, weight: 8}},
     designated: {<<: *l1, structure: {kind: designated}}, partitioned: {<<: *batchtopk, structure: {kind: partitioned}},
     norm: {<<: *batchtopk, reconstruction: norm}, difference: {<<: *batchtopk, inputs: {kind: difference}},
     base_sae: {<<: *batchtopk, inputs: {kind: single, source: base}}}}
small.yaml:
  {base: demo:base, chat: demo:chat, layer: 5, harvest: *harvest, analyze: *analyze,
   dataset: [{path: demo:plain, heldout_share: 0.5, max_documents: 6}, {path: demo:chat_train, max_documents: 70}],
   crosscoders: {l1: &small_l1 {<<: *l1, batch_size: 32, dead_after_tokens: 32, epochs: 1, lr: 0.01}, l1_batch: *small_l1,
     l1_plain: &small_plain {<<: *small_l1, sparsity: {<<: *mu, resamplings: 0}}, l1_plain_batch: *small_plain,
     jumprelu: *jumprelu, jumprelu_batch: *jumprelu,
     batchtopk: &small {<<: *batchtopk, batch_size: 128, dead_after_tokens: 500}, batchtopk_batch: *small,
     topk: &small_topk {<<: *topk, batch_size: 128, dead_after_tokens: 500}, topk_batch: *small_topk}}
truth.yaml:
  {l0_trials: 3, analyze: {blocks: 5, min_active: 15}, planted: {d_model: 24, shared: 10, chat_only: 4, base_only: 2, weaker: 4,
     rotated: 2, decoupled: 2, active: 1.5, documents: 400, document_tokens: 20, topics: 4},
   crosscoders: {
     batchtopk: &planted {sparsity: {kind: batchtopk, k: 2}, n_latents: 48, batch_size: 128, lr: 3.0e-3, epochs: 4,
       warmup_steps: 10},
     l1: {<<: *planted, sparsity: {kind: l1, mu: 3}, decoder_norm: 0.3}, diff_sae: {<<: *planted, inputs: {kind: difference}},
     dfc: {<<: *planted, structure: {kind: partitioned, exclusive_share: 0.1}}}}
"""
LATENT = 69
"""A chat-specific latent of `main/batchtopk`."""
STEER, SMALL = f"steer main --crosscoder batchtopk --latent {LATENT}", "--config small.yaml --only"
COMMANDS = {
    "analyze": "analyze main --config main.yaml",
    "compare": "compare main --only l1 batchtopk difference base_sae",
    "causal": "causal main --only batchtopk difference",
    "interpret": "interpret main --crosscoders batchtopk --tokens 6000 --per_selection 4 --contexts 5",
    "null-run": f"analyze null {SMALL} batchtopk",
    "null": "null main --null null",
    "steer-prompt": f"{STEER} --strength 3 -9 --prompt Hello! Why? --model base --max_new_tokens 20",
    "steer-table": f"{STEER} --strength 6 --labels refusal identity --prompts_per_label 3 --controls 1 --max_new_tokens 15 "
    "--temperature 0.7",
    "steer-ablate": f"{STEER} --mode ablate --labels refusal --prompts_per_label 2 --controls 0 --max_new_tokens 9 "
    "--tokens template",
    "run": "run main --only batchtopk l1 base_sae",
    "seeds-batchtopk": "seeds main batchtopk batchtopk_seed1 --cosine 0.5",
    "seeds-l1": "seeds main l1 l1_seed1 --cosine 0.99",
    "export": f"export main --crosscoder batchtopk --latents {LATENT} 3-5 rotated -o page.html",
    "store-verify": "store verify main/activations",
    "examples-export": "examples export main/batchtopk/examples.sqlite examples.db",
    "examples-import": "examples import examples.db examples.sqlite --tokenizer demo:chat",
    "push": "push main owner/name --dry-run",
    "import": "import main/batchtopk imported",
    "truth": "truth truth --config truth.yaml",
    "passes": f"train passes {SMALL} batchtopk --harvest.storage passes --harvest.dtype bfloat16",
    "live": f"train live {SMALL} topk --harvest.storage live",
    "layers": "harvest layers --config small.yaml --layers 2 3 --harvest.dtype int8",
    "int8": "train layers/layer-3 --only jumprelu",
    "ranks-latents": f"analyze ranks {SMALL} l1 l1_plain batchtopk topk jumprelu",
    "ranks-batch": f"train ranks {SMALL} l1_batch l1_plain_batch batchtopk_batch topk_batch jumprelu_batch --latent_ranks 1",
}
"""Command lines by name; two processes share those called ranks-."""
RESUMED = re.compile(r"(analyze|compare|causal|interpret|steer|run|truth|train|harvest)\b(?!.*--prompt )")
"""Command lines whose stages are already done when they are run a second time."""
ABORTED = "terminate called without an active exception"
"""Printed by a rank that ends before the threads of its process group do: about one in four short commands of two ranks."""
OPENED = """
import json, crossdiff
from pathlib import Path

def fields(found, names):
    return {name: getattr(found, name) for name in names.split()}

def record(view):
    names = "latent verdict verdict_reason delta_norm delta_norm_class decoder_cosine frequency n_active rank_sum"
    ends = {name: fields(getattr(view.record, name), "value low high") for name in ("nu_error", "nu_reconstruction")}
    return fields(view.record, names) | ends | {"shown": repr(view)}

def example(found):
    tokens = [[token.text, token.flags, token.activation] for token in found.tokens]
    return fields(found, "kind quantile dataset label document position activation") | {"tokens": tokens}

def activations(found):
    return fields(found, "tokens roles latents highest") | {"values": found.values.tolist()}

Path("api").mkdir()
for name in ("batchtopk", "l1"):
    run = crossdiff.open("main", crosscoder=name)
    tables = {"latents": run.latents, "scaling": run.scaling()} | ({"causal": run.causal()} if name == "batchtopk" else {})
    first, chat = run.scaling()["latent"].head(6).to_list(), [{"role": "user", "content": "Where is my key?"}]
    texts = [activations(run.activations("The sea is cold.")), activations(run.activations(chat, latents=first))]
    latents = {j: record(run.latent(j)) | {"examples": [example(found) for found in run.examples(j)]} for j in first}
    found = {key: table.to_dict(as_series=False) for key, table in tables.items()} | {"texts": texts, "latent": latents}
    Path(f"api/{name}.json").write_text(json.dumps(found | {"name": run.name, "names": run.names}))
"""


def call(folder: Path, name: str, arguments: Sequence[str], source: Path | None) -> bool:
    """Run Python in `folder` with one thread and the package in `source`; returns whether it succeeded."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "COLUMNS": "300", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"PYTHONPATH": str(source.resolve())} if source else {}
    started = time.monotonic()
    for _ in range(5):
        result = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
        if ABORTED not in result.stderr:
            break
        print(f"{name}: a rank aborted; running it again", flush=True)
    (folder / "stdout").mkdir(exist_ok=True)
    (folder / "stdout" / f"{name}.txt").write_text(result.stdout)
    print(f"{time.monotonic() - started:6.1f} s  {name}" + (": FAILED" if result.returncode else ""), flush=True)
    if result.returncode:
        print("\n".join((result.stdout + result.stderr).splitlines()[-15:]))
    return not result.returncode


def run_commands(folder: Path, source: Path | None, commands: dict[str, str]) -> int:
    """Run commands in order; returns how many failed."""
    found = call(folder, "package", ["-c", "import crossdiff; print(crossdiff.__file__)"], source)
    package = (folder / "stdout" / "package.txt").read_text().strip()
    print(f"package: {package}")
    if not found or (source and not Path(package).is_relative_to(source.resolve())):
        sys.exit(f"the commands do not run the package in {source}")
    launcher, n_failed = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"], 0
    for name, line in commands.items():
        n_failed += not call(folder, name, [*launcher * name.startswith("ranks-"), "-m", "crossdiff", *line.split()], source)
    return n_failed


def make(folder: Path, source: Path | None) -> int:
    """Run every command in a new folder; returns the exit status."""
    folder.mkdir(parents=True)
    for name, settings in yaml.safe_load(SETTINGS).items():
        (folder / name).write_text(yaml.safe_dump(settings, sort_keys=False))
    started = time.monotonic()
    n_failed = run_commands(folder, source, COMMANDS) + (not call(folder, "open", ["-c", OPENED], source))
    print(f"{time.monotonic() - started:6.1f} s  in all, {n_failed} failed")
    idle = [] if n_failed else [what for what, acts in acting(folder) if not acts]
    print("\n".join(f"nothing tests {what}: it does not act; change SETTINGS" for what in idle))
    return 1 if n_failed or idle else 0


def acting(folder: Path) -> Iterator[tuple[str, bool]]:
    """What is to be tested, and whether it takes place in trainings that are so short."""
    logs = {str(path.parent.relative_to(folder)): read_lines(path) for path in folder.rglob("train.jsonl")}
    for start, end in (("main/", ""), ("ranks/", ""), ("ranks/", "_batch")):
        for kind, term in {"batchtopk": "aux", "topk": "aux", "jumprelu": "sparsity", "l1": "sparsity"}.items():
            yield f"{term} of {start}{kind}{end}", any(record[term] > 0 for record in logs[f"{start}{kind}{end}"])
        yield f"resampling in {start}", logs[f"{start}l1{end}"] != logs[f"{start}l1_plain{end}"]
    for name in ("l1/twins", "batchtopk/behaviours", "batchtopk/interpretation", "batchtopk/causal_latents"):
        yield name, pl.read_parquet(folder / "main" / f"{name}.parquet").height > 0
    specific = pl.read_parquet(folder / "main/batchtopk/latents.parquet").filter("chat_specific")["latent"]
    yield f"a chat-specific latent {LATENT}", LATENT in specific


def stages(folder: Path) -> dict[tuple[Path, str], Any]:
    """The manifests' records of finished stages, by run and stage."""
    manifests = {path.parent: json.loads(path.read_text()) for path in folder.rglob("manifest.json")}
    records = ((run, manifest.get("stages", {})) for run, manifest in manifests.items())
    return {(run.relative_to(folder), name): record for run, found in records for name, record in found.items()}


def resume(old: Path, folder: Path, source: Path | None) -> int:
    """Run the commands over a copy of finished runs; returns the exit status."""
    shutil.copytree(old, folder)
    before = stages(folder)
    n_failed = run_commands(folder, source, {name: line for name, line in COMMANDS.items() if RESUMED.match(line)})
    after = stages(folder)
    again = [key for key in before | after if before.get(key) != after.get(key) and key[1] != "report"]
    print("\n".join(f"not considered done: {name} of {run}" for run, name in again))
    print(f"{len(before)} stages, {len(again)} done again; {n_failed} commands failed")
    return 1 if again or n_failed else 0


@dataclass
class Comparison:
    """How two files differ.

    Attributes:
        largest: largest relative difference of a number.
        problems: every difference above the tolerance.
        reworded: changed texts for people (place, old, new), with # for numbers.
        share: share of the numbers or words in both, where nothing else is compared.
    """

    exact: bool = True
    largest: float = 0.0
    problems: list[str] = field(default_factory=list)
    reworded: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    share: float = 1.0

    def differ(self, where: str, old: object, new: object) -> None:
        self.exact = False
        self.problems.append(f"{where}: {str(old)[:100]} -> {str(new)[:100]}")

    def array(self, where: str, old: npt.NDArray[Any], new: npt.NDArray[Any]) -> None:
        """Compare numbers, each relative to itself; those listed also relative to the largest of the array."""
        if old.shape != new.shape or old.dtype != new.dtype:
            return self.differ(where, f"{old.dtype}{list(old.shape)}", f"{new.dtype}{list(new.shape)}")
        same = (old == new) | ((old != old) & (new != new))
        if same.all():
            return
        self.exact, at = False, np.argwhere(~same)
        a, b = (values[~same].astype(np.float64) for values in (old, new))
        with np.errstate(all="ignore"):
            relative = np.abs(a - b) / np.maximum(np.abs(a), np.abs(b))
        relative[~np.isfinite(relative)] = math.inf
        scale = float(np.abs(old[np.isfinite(old)].astype(np.float64)).max(initial=0.0)) or 1.0
        self.largest = max(self.largest, float(relative.max()))
        wrong = np.flatnonzero(relative > (TOLERANCE if old.dtype.kind == "f" else 0.0))
        for index in wrong[np.argsort(-relative[wrong], kind="stable")][:LISTED]:
            far = f"{relative[index]:.1e} of itself, {abs(a[index] - b[index]) / scale:.1e} of the largest"
            self.problems.append(f"{where}{at[index].tolist()}: {a[index]} -> {b[index]}, {far}; 1 of {len(wrong)} values")

    def value(self, where: str, old: Any, new: Any) -> None:
        """Compare plain values key by key."""
        if isinstance(old, np.ndarray) and isinstance(new, np.ndarray):
            self.array(where, old, new)
        elif isinstance(old, dict) and isinstance(new, dict):
            for key in sorted({*old, *new} - IGNORED):
                compared = self.value if key in old and key in new else self.differ
                compared(f"{where}/{key}", old.get(key, "(missing)"), new.get(key, "(missing)"))
        elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
            self.column(where, old, new)
        elif {type(old), type(new)} in ({float}, {float, int}):
            self.array(where, np.array(old, np.float64), np.array(new, np.float64))
        elif isinstance(old, str) and isinstance(new, str) and PROSE.search(where):
            self.exact = self.exact and old == new
            numbers = "" if NUMBER.findall(old) == NUMBER.findall(new) else ", and other numbers"
            self.reworded[NUMBER.sub("#", where) + numbers, NUMBER.sub("#", old), NUMBER.sub("#", new)] += old != new
        elif (type(old) is not type(new) or old != new) and not where.endswith("stages/report/fingerprint"):
            self.differ(where, old, new)

    def column(self, where: str, old: list[Any], new: list[Any]) -> None:
        """Compare lists of the same length; lists of numbers, perhaps with gaps, as arrays."""
        kinds = {type(item) for item in (*old, *new)}
        gaps = [[item is None for item in items] for items in (old, new)]
        if float in kinds and kinds <= {float, int, type(None)} and gaps[0] == gaps[1]:
            return self.array(where, np.array(old, np.float64), np.array(new, np.float64))
        for index, (left, right) in enumerate(zip(old, new, strict=True)):
            if left != right:
                self.value(f"{where}/{index}", left, right)

    def texts(self, kind: str, old: str, new: str) -> None:
        """Compare the numbers, or words, of two pages or outputs; of pages each counts once."""
        found = [(WORD if kind == "printed words" else NUMBER).findall(text) for text in (old, new)]
        a, b = (Counter(set(items) if kind == "html" else items) for items in found)
        self.exact, self.share = a == b, (a & b).total() / max(1, (a | b).total())
        if self.share < SHARE[kind]:
            self.differ(f"only {self.share:.1%} in both", list(a - b), list(b - a))


def read_tensors(path: Path) -> dict[str, Any]:
    with safe_open(path, "numpy") as file:
        metadata = {key: json.loads(text) if text.startswith("{") else text for key, text in (file.metadata() or {}).items()}
        return {"metadata": metadata} | {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def read_table(table: pl.DataFrame) -> dict[str, Any]:
    types = {column.name: str(column.dtype) for column in table}
    return {"types": types} | {
        c.name: c.to_list() if c.null_count() or not c.dtype.is_numeric() else c.to_numpy() for c in table
    }


def read_database(path: Path) -> dict[str, Any]:
    """Tables of an SQLite file, by column in the order of the rows."""
    found: dict[str, Any] = {}
    with closing(sqlite3.connect(path)) as database:
        for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name").fetchall():
            rows = database.execute(f"SELECT * FROM {name}").fetchall()
            names = [column[1:3] for column in database.execute(f"PRAGMA table_info({name})")]
            found[f"{name} columns"] = [f"{column} {kind}" for column, kind in names]
            columns: dict[str, Any] = {column: [row[index] for row in rows] for index, (column, _) in enumerate(names)}
            for column in {"activations", "activation_values"} & set(columns):
                columns[column] = np.frombuffer(b"".join(columns[column]), "<f4")
            found[name] = dict(rows) if list(columns) == ["key", "value"] else columns
    return found


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


READERS: dict[str, Callable[[Path], Any]] = {
    ".safetensors": read_tensors,
    ".parquet": lambda path: read_table(pl.read_parquet(path)),
    ".csv": lambda path: read_table(pl.read_csv(path, infer_schema_length=None)),
    ".json": lambda path: json.loads(path.read_text()),
    ".jsonl": lambda path: {"line": read_lines(path)},
    ".yaml": lambda path: yaml.safe_load(path.read_text()),
    ".sqlite": read_database,
    ".db": read_database,
    ".npy": np.load,
}


def kind_of(path: Path) -> str:
    """How a file is compared, by its path in the folder; empty if it is ignored."""
    if {"old", "work"} & set(path.parts) or path.name == ".lock":
        return ""
    if path.parts[0] == "stdout":
        return f"printed {PRINTED[path.stem]}" if path.stem in PRINTED else ""
    if {"tensorboard", "figures"} & set(path.parts):
        return "only existence"
    if path.name.startswith("shard-") or path.suffix not in (*READERS, ".html"):
        return "bytes (store shards)"
    return path.suffix.removeprefix(".")


def compare_files(kind: str, old: Path, new: Path) -> Comparison:
    found = Comparison()
    if not old.exists() or not new.exists():
        found.differ("file", *("exists" if path.exists() else "missing" for path in (old, new)))
    elif kind == "bytes (store shards)":
        if old.read_bytes() != new.read_bytes():
            found.differ("bytes", f"{old.stat().st_size} bytes", f"{new.stat().st_size} bytes")
    elif kind in SHARE:
        tags = re.compile(r"(?s)<(script|style)\b.*?</\1>|<[^>]*>")
        found.texts(kind, *(tags.sub(" ", path.read_text()) for path in (old, new)))
    elif kind != "only existence":
        found.value("", *(READERS[old.suffix](path) for path in (old, new)))
    return found


def files(folder: Path) -> dict[Path, str]:
    """Relative paths and their kinds; of TensorBoard's files, which are named after the time, the folders."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    paths = (path.parent if path.name.startswith("events.out") else path for path in paths)
    return {path: kind for path in paths if (kind := kind_of(path))}


def compare(old: Path, new: Path) -> int:
    """Print how the results in two folders differ; returns the exit status."""
    groups: dict[str, list[Comparison]] = defaultdict(list)
    for path, kind in sorted((files(old) | files(new)).items()):
        found = compare_files(kind, old / path, new / path)
        groups[kind].append(found)
        print("".join(f"{path}: {problem.lstrip('/')}\n" for problem in found.problems[: 6 * LISTED]), end="")
        if len(found.problems) > 6 * LISTED:
            print(f"{path}: {len(found.problems) - 6 * LISTED} more")
    print("| file kind | files | exact | within tolerance | largest relative difference | different |\n" + "|---" * 6 + "|")
    for kind, group in sorted(groups.items()):
        exact, wrong = sum(found.exact for found in group), sum(bool(found.problems) for found in group)
        far = f"{max(found.largest for found in group):.1e}"
        far = f"{min(found.share for found in group):.1%} in both" if kind in SHARE else far
        print(f"| {kind} | {len(group)} | {exact} | {len(group) - exact - wrong} | {far} | {wrong} |")
    reworded = sum((found.reworded for group in groups.values() for found in group), Counter())
    print("Texts for people that changed, which is no failure:" if reworded else "No text for people changed.")
    for (where, before, after), n in reworded.most_common():
        print(f"{n:6} x {where}\n         - {before}\n         + {after}")
    return 1 if any(found.problems for group in groups.values() for found in group) else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(dest="task", required=True)
    for task, names in {"make": ("folder",), "compare": ("old", "new"), "resume": ("old", "folder")}.items():
        options = tasks.add_parser(task)
        for name in names:
            options.add_argument(name, type=Path, metavar=name.upper())
        if task != "compare":
            options.add_argument("--source", type=Path, metavar="SRC", help="folder with the package, such as src")
    args = parser.parse_args()
    if args.task == "compare":
        sys.exit(compare(args.old, args.new))
    if args.folder.exists():
        sys.exit(f"{args.folder} exists already; name a new folder")
    sys.exit(make(args.folder, args.source) if args.task == "make" else resume(args.old, args.folder, args.source))


if __name__ == "__main__":
    main()
