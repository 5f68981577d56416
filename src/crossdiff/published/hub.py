"""Publish a run on the Hugging Face Hub, fetch one, and load crosscoders and latent tables by name.

A published run has the layout of a run directory, without the activations, and a model card as its README.md. Transfers use the
`huggingface_hub` client, which reads its token and endpoint (`HF_TOKEN`, `HF_ENDPOINT`) itself. To resume a broken transfer,
repeat the call: files that arrived are not sent or fetched twice.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from crossdiff.config import RunConfig, default_crosscoder, validate
from crossdiff.diff import open as open_run
from crossdiff.errors import UserError
from crossdiff.integrity import verify
from crossdiff.published import WEIGHTS
from crossdiff.run_manifest import MANIFEST
from crossdiff.yaml_files import read_yaml

if TYPE_CHECKING:
    import polars as pl
    from huggingface_hub import HfApi

    from crossdiff.crosscoder.crosscoder import Crosscoder

FILES = (
    "config.json", "model.safetensors", "latents.parquet", "twins.parquet", "neighbours.parquet", "activity.parquet",
    "examples.sqlite", "health.json", "behaviours.parquet", "train.jsonl", "causal.json", "causal_latents.parquet",
    "causal_conversations.parquet", "interpretation.parquet", "interpretation_contexts.parquet", "interpretation.json",
    "overlap.parquet", "promoted.parquet",
)  # fmt: skip
"""The files of each crosscoder that are published if they exist."""
CONCEPTS = (
    "concepts.parquet", "members.parquet", "trainings.parquet", "concepts.json", "activity.parquet", "behaviours.parquet",
    "examples.sqlite", "promoted.parquet", "neighbours.parquet", "directions.safetensors", "causal.parquet", "causal.json",
    "interpretation.parquet", "interpretation_contexts.parquet", "interpretation.json", "overlap.parquet",
)  # fmt: skip
"""The files of the folder `concepts` of a run that are published if they exist."""
LOOK = (
    "look.json", "places.parquet", "groups.parquet", "words.parquet", "phrases.parquet", "depth.parquet", "directions.parquet",
    "directions.safetensors", "steered.parquet", "probes.parquet",
)  # fmt: skip
"""The files of the first look that are published if they exist: not `tokens.parquet`, which holds whole texts."""
SETTINGS = ("config.json", "trainer_config.json", "cfg.json")
"""Settings files that published weights come with."""
RUN_SETTINGS = "config.yaml"
EARLY_TABLES = "science-of-finetuning/max-activating-examples-gemma-2-2b-l13"
PUBLISHED_TABLES = {
    "Butanium/gemma-2-2b-crosscoder-l13-mu4.1e-02-lr1e-04": f"{EARLY_TABLES}-mu4.1e-02-lr1e-04",
    "ckkissane/crosscoder-gemma-2-2b-model-diff": f"{EARLY_TABLES}-ckissane",
}
"""Data sets with the latent tables of crosscoders whose names do not follow the rule of `_table_repository`."""
TABLE = "feature_df.csv"
NAME = re.compile(r"(?!.*(\.\.|--|\.git$))[A-Za-z0-9][\w.-]*(?<![.-])/(?![.-])[\w.-]{1,96}(?<![.-])", re.ASCII)
"""A name on the Hub, by the Hub's rules, which allow no `..`."""


@dataclass(frozen=True)
class Upload:
    """What `push` sends: the repository, each file with its size in bytes, the card's text, and remarks to read first."""

    repository: str
    sizes: dict[str, int]
    card: str
    remarks: tuple[str, ...]


def push(run: str | Path, repository: str, *, dry_run: bool = False, private: bool = False, licence: str = "") -> Upload:
    """Publish a run's crosscoders, latent tables, concepts, examples, first look and settings with a generated model card.

    The run itself does not change. Its activations and the texts of the first look are not published.

    Examples:
        >>> crossdiff.push("runs/demo", "me/my-diff", dry_run=True).sizes["batchtopk/config.json"] > 0
        True

    Args:
        repository: `owner/name`; created if it does not exist.
        dry_run: return what would be sent without using the network.
        private: create the repository as private if it is new.
        licence: the licence of the two models, such as `mit`; looked up by default.

    Raises:
        UserError: the run is not finished, the name is malformed, or the Hub refuses.
    """
    from crossdiff.crosscoder.checkpoint import harvest_of, origin_of
    from crossdiff.report.model_card import model_card
    from crossdiff.report.reading import read_run

    _check_name(repository)
    path = open_run(run).path
    report = read_run(path)
    files = _files_of(path, (coder.name for coder in report.crosscoders))
    if (path / MANIFEST).is_file() and (problems := verify(path, only=files).problems):
        raise UserError(f"{path} is damaged and was not published: {'; '.join(problems)}; `crossdiff verify {path}` checks it")
    with _explained(repository):
        found = licence or _licences(report.base, report.chat, look_up=not dry_run)
        # The run's settings may have changed since a crosscoder was trained, or no longer name it.
        trained = {coder.name: origin_of(path / coder.name).get("settings") or {} for coder in report.crosscoders}
        card = model_card(report, repository, found, harvest_of(path / report.primary.name), trained)
        sizes = {name: file.stat().st_size for name, file in files.items()} | {"README.md": len(card.encode())}
        upload = Upload(repository, sizes, card, _remarks(path, report.base, report.chat))
        if not dry_run:
            _send(repository, files, card, private)
    return upload


def _files_of(path: Path, names: Iterable[str]) -> dict[str, Path]:
    """The files of a run that are published: name in the repository -> file."""
    files = {f"{name}/{file}": path / name / file for name in names for file in FILES}
    files |= {f"concepts/{file}": path / "concepts" / file for file in CONCEPTS}
    files |= {f"look/{file}": path / "look" / file for file in LOOK}
    found = {name: file for name, file in files.items() if file.is_file()}
    return {"config.yaml": path / "config.yaml"} | found


def _send(repository: str, files: dict[str, Path], card: str, private: bool) -> None:
    from huggingface_hub import CommitOperationAdd

    api = _api()
    api.create_repo(repository, private=private, exist_ok=True)
    contents: dict[str, Any] = {**files, "README.md": card.encode()}
    operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
    with warnings.catch_warnings():
        # The client suggests a data set for tables, but here they belong to the weights.
        warnings.filterwarnings("ignore", message="It seems that you are about to commit a data file")
        api.create_commit(repository, operations, commit_message="Upload a diff by crossdiff")


def _remarks(path: Path, base: str | None, chat: str | None) -> tuple[str, ...]:
    """What to know before publishing."""
    local = [name for name in (base, chat) if name is not None and not (name.startswith("demo:") or NAME.fullmatch(name))]
    remarks = []
    if local:
        remarks.append(
            f"the settings and weights name the models by local paths ({' and '.join(local)}), from which nobody else can load "
            "them"
        )
    if (path / "activations").is_dir():
        remarks.append("the activations are not published, but the examples and the first look contain excerpts of the texts")
    return tuple(remarks)


def _licences(base: str | None, chat: str | None, look_up: bool) -> str:
    """The licences of the two models: one identifier, both, or "unknown"."""
    found = dict.fromkeys(_licence(name, look_up) for name in (base, chat) if name is not None)
    return ", ".join(found) or "unknown"


def _licence(model: str, look_up: bool) -> str:
    if model.startswith("demo:"):
        return "mit"
    folder = Path(model).expanduser()
    if folder.is_dir():
        card = folder / "README.md"
        text = card.read_text(encoding="utf-8") if card.is_file() else ""
        found = re.match(r"---\n.*?^license:\s*(\S+)\s*$", text, re.DOTALL | re.MULTILINE)
        return found[1] if found else "unknown"
    if not look_up:
        return "looked up when it is published"
    from huggingface_hub import errors

    try:
        data: Any = _api().model_info(model).card_data
    except errors.RepositoryNotFoundError:
        return "unknown"
    return str((data or {}).get("license") or "unknown")


def pull(repository: str, directory: str | Path | None = None, *, revision: str | None = None) -> Path:
    """Fetch a published run into a folder that `crossdiff.open` reads; returns the folder.

    Args:
        directory: target folder; default `runs/NAME` for `owner/NAME`. A run of this machine is never overwritten.
        revision: branch, tag or commit.

    Raises:
        UserError: the repository does not exist or does not contain a run, or the Hub refuses.

    Examples:
        >>> crossdiff.open(crossdiff.pull("me/my-diff")).names
        ('l1', 'batchtopk')
    """
    _check_name(repository)
    folder = Path(directory) if directory is not None else Path("runs") / repository.partition("/")[2]
    if (folder / "manifest.json").exists():
        raise UserError(f"{folder} is a run made on this machine; name another folder to pull {repository} into")
    with _explained(repository):
        api = _api()
        commit = api.model_info(repository, revision=revision).sha
        files = api.list_repo_files(repository, revision=commit)
        if "config.yaml" not in files:
            raise UserError(
                f"{repository} was not published by crossdiff: it has no config.yaml; use `crossdiff.load({repository!r})` to "
                "read crosscoders of other formats"
            )
        wanted = ["config.yaml", "README.md", *(f"*/{name}" for name in FILES), *(f"concepts/{name}" for name in CONCEPTS)]
        wanted += [f"look/{name}" for name in LOOK]
        api.snapshot_download(repository, revision=commit, local_dir=folder, allow_patterns=wanted)
    return folder


def load(name: str | Path, crosscoder: str | None = None) -> Crosscoder:
    """Load a crosscoder from a folder or from the Hub: one of ours, or one that others have published.

    The formats are those of this package, of the paper's `dictionary_learning`, of C. Kissane's replication and of SAELens, for
    example `load("science-of-finetuning/gemma-2-2b-L13-k100-lr1e-04-local-shuffling-CCLoss")`.

    Examples:
        >>> crossdiff.load("runs/demo", "l1").sources
        ('base', 'chat')

    Args:
        name: a crosscoder's folder, a run directory, or `owner/name` on the Hub.
        crosscoder: which folder, if there are several; default: that of `crossdiff.open`.

    Raises:
        UserError: nothing has that name, there are several crosscoders (the message names them), or the format cannot be read.
    """
    from crossdiff.published.formats import read_published

    return read_published(locate(name, crosscoder))


def locate(name: str | Path, crosscoder: str | None = None) -> Path:
    """The folder or file behind the name of a crosscoder, which is fetched if it is on the Hub; arguments and errors as `load`.

    A name on the Hub may end in `@` and a branch, tag or commit.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        return path / _choose(_local_files(path), crosscoder, str(path), path.joinpath)
    repository, _, revision = str(name).partition("@")
    if not NAME.fullmatch(repository):
        raise UserError(
            f"{name} does not exist; give the folder of a published coder or its file, a run directory, or owner/name on the "
            "Hub"
        )
    with _explained(repository):
        api = _api()
        commit = api.model_info(repository, revision=revision or None).sha
        files = api.list_repo_files(repository, revision=commit)
        folder = _choose(files, crosscoder, str(name), lambda file: _fetched(repository, file, commit))
        wanted = [str(PurePosixPath(folder, file)) for file in (*WEIGHTS, *SETTINGS)]
        local = api.snapshot_download(repository, revision=commit, allow_patterns=wanted)
    return Path(local) / folder


def pinned(name: str) -> str:
    """The name of a crosscoder by which it is found again: a path is made absolute, and a name on the Hub gets its commit."""
    path = Path(name).expanduser()
    if path.exists():
        return str(path.absolute())
    repository, _, revision = name.partition("@")
    _check_name(repository)
    with _explained(repository):
        return f"{repository}@{_api().model_info(repository, revision=revision or None).sha}"


def _fetched(name: str, file: str, revision: str | None = None) -> Path:
    return Path(_api().hf_hub_download(name, file, revision=revision))


def _local_files(folder: Path) -> list[str]:
    return [str(file.relative_to(folder)) for pattern in ("*", "*/*") for file in folder.glob(pattern)]


def _default(names: Iterable[str], settings: Path) -> str | None:
    """The default crosscoder among a run's folders, by the run's settings."""
    known = validate(RunConfig, read_yaml(settings), str(settings)).trainings
    kinds = {name: (coder.sparsity.kind, coder.inputs.kind) for name, coder in known.items() if name in names}
    return default_crosscoder(kinds) if kinds else None


def _choose(files: Collection[str], wanted: str | None, where: str, fetch: Callable[[str], Path]) -> str:
    """The folder of the crosscoder among a repository's files; "." for the top.

    Args:
        fetch: from the name of a file to a local copy; only the settings of a run are read.
    """
    folders = sorted({str(PurePosixPath(file).parent) for file in files if PurePosixPath(file).name in WEIGHTS})
    names = [folder for folder in folders if not fnmatch(folder, "old/*") and not fnmatch(folder, "work/*")]
    if not names:
        raise UserError(f"{where} has no crosscoder: expected one of {', '.join(WEIGHTS)} in it or in one of its folders")
    if wanted is not None and wanted not in names:
        raise UserError(f"{where} has no crosscoder {wanted!r}; it has {', '.join(names)}")
    chosen = wanted or (names[0] if len(names) == 1 else None)
    if chosen is None and RUN_SETTINGS in files:
        chosen = _default(names, fetch(RUN_SETTINGS))
    if chosen is None:
        raise UserError(f"{where} has {len(names)} crosscoders; name one of them: {', '.join(names)}")
    return chosen


def load_table(name: str | Path, crosscoder: str | None = None, scales: tuple[float, float] | None = None) -> pl.DataFrame:
    """Load a latent table: of a local run, of a run on the Hub, or the published table of one of the paper's crosscoders.

    Published tables are separate data sets; give the name of the data set or of the crosscoder. Their columns are converted to
    ours (delta_norm is 1 for chat-only; see `published/feature_df.py`).

    Examples:
        >>> crossdiff.load_table("runs/demo", "l1").columns[0]
        'latent'

    Args:
        name: a run, a table's file, a folder with a published table, or a name on the Hub.
        crosscoder: which one of a run.
        scales: the scales of base and chat, for the published table of a crosscoder that has one per source: converts its
            norms, betas and nus to the models' space (`crossdiff.load(name).origin["published"]["scales"]`).

    Raises:
        UserError: the table does not exist or cannot be read.
    """
    import polars as pl

    from crossdiff.published.feature_df import FILES as TABLES
    from crossdiff.published.feature_df import read_published_table

    path = Path(name)
    published = next((path / file for file in TABLES if (path / file).is_file()), path)
    if published.is_file() and published.suffix != ".parquet":
        return read_published_table(published, scales)
    if scales is not None and path.exists():
        raise UserError(f"{path} has a table of crossdiff, which is in the models' space; omit the scales")
    if path.is_file():
        return pl.read_parquet(path)
    if path.is_dir():
        table = path / _choose(_local_files(path), crosscoder, str(path), path.joinpath) / "latents.parquet"
        if not table.is_file():
            raise UserError(f"{table} is missing; run `crossdiff analyze {path}` first")
        return pl.read_parquet(table)
    _check_name(str(name))
    with _explained(str(name)):
        return _fetch_table(str(name), crosscoder, scales)


def _fetch_table(name: str, crosscoder: str | None, scales: tuple[float, float] | None) -> pl.DataFrame:
    import polars as pl

    from crossdiff.published.feature_df import read_published_table

    api = _api()
    repository = _table_repository(name)
    if api.repo_exists(repository, repo_type="dataset") and api.file_exists(repository, TABLE, repo_type="dataset"):
        return read_published_table(Path(api.hf_hub_download(repository, TABLE, repo_type="dataset")), scales)
    if not api.repo_exists(name):
        raise UserError(
            f"{name} does not exist on the Hub, or it is private and no token is set; check the name, or set HF_TOKEN"
        )
    files = api.list_repo_files(name)
    table = str(PurePosixPath(_choose(files, crosscoder, name, lambda file: _fetched(name, file)), "latents.parquet"))
    if table not in files:
        raise UserError(f"{name} has no latent table: it has no {table}, and there is no data set of it with {TABLE}")
    return pl.read_parquet(api.hf_hub_download(name, table))


def _table_repository(name: str) -> str:
    """The data set that may hold the published table of a crosscoder, or that has this name itself."""
    owner, _, title = name.partition("/")
    if title.startswith(("diffing-stats-", "max-activating-examples-")):
        return name
    return PUBLISHED_TABLES.get(name, f"{owner}/diffing-stats-{title}")


def _check_name(repository: str) -> None:
    if not NAME.fullmatch(repository):
        raise UserError(f"{repository!r} is not a name on the Hub; expected owner/name, such as me/my-diff")


def _api() -> HfApi:
    """The client at the current endpoint; it finds its token itself."""
    from huggingface_hub import HfApi

    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"), library_name="crossdiff")


def _clean(text: str) -> str:
    """A message without the token, which a server or a proxy may quote."""
    from huggingface_hub import get_token

    token = get_token()
    shown = text.replace(token, "hf_***") if token else text
    return re.sub(r"hf_[A-Za-z0-9]{8,}", "hf_***", " ".join(shown.split()))


@contextmanager
def _explained(repository: str) -> Iterator[None]:
    """Turn the client's errors into messages without secrets."""
    from huggingface_hub import errors

    try:
        yield
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{repository} does not exist on the Hub, or you have no access to it; check the name, and for a private one "
            "log in with `hf auth login` or set HF_TOKEN"
        ) from None
    except errors.HfHubHTTPError as error:
        remedy = "run the same command again to resume"
        if error.response.status_code in (401, 403):
            remedy = "log in with `hf auth login`, or set HF_TOKEN to a token with write access"
        raise UserError(f"the Hub refused {repository}: {_clean(str(error))}; {remedy}") from None
    except (errors.HTTPError, ConnectionError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:  # type: ignore[attr-defined]
        raise UserError(
            f"cannot reach the Hub for {repository}: {_clean(str(error))}; check the network, and run the same command again "
            "to resume"
        ) from None
