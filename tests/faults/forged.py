"""Run directories made by somebody hostile: nothing outside of them changes or runs, and every command ends with a sentence."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tiny import FINISHED, Tally, Tiny, command, forked

SECONDS = 20
COMMANDS: dict[str, tuple[str, ...]] = {
    "clean": ("clean", "RUN", "--yes", "--unfinished-harvests"),
    "report": ("report", "RUN"),
    "analyze": ("analyze", "RUN"),
    "verify": ("verify", "RUN"),
    "run": ("run", "RUN"),
    "train": ("train", "RUN", "--crosscoders.batchtopk.epochs", "2"),
    "null": ("null", "RUN", "--null", "RUN"),
    "push": ("push", "RUN", "a/b", "--dry-run"),
    "open": (),
}
"""`open` is `crossdiff.open`; the others are command lines."""


class Harm:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def manifests(run: Path, outside: Path) -> dict[str, Any]:
    """Contents of a run's manifest, by what is wrong with them."""
    good = json.loads((run / "manifest.json").read_text())
    deep: Any = "x"
    for _ in range(900):
        deep = {"x": deep}

    def swap(*moves: list[str]) -> dict[str, Any]:
        return {**good, "swap": moves}

    def with_record(**changes: Any) -> dict[str, Any]:
        return {**good, "stages": {**good["stages"], "report": {**good["stages"]["report"], **changes}}}

    up = f"../{outside.name}"
    return {
        "a list": [good],
        "a number": 1,
        "without swap": {key: value for key, value in good.items() if key != "swap"},
        "stages is a list": {**good, "stages": []},
        "a stage is a number": {**good, "stages": {**good["stages"], "report": 3}},
        "a stage without outputs": {**good, "stages": {"report": {"fingerprint": "x"}}},
        "a fingerprint is a list": with_record(fingerprint=[]),
        "outputs is a text": with_record(outputs="report.html"),
        "outputs lead out": with_record(outputs=[f"{up}/precious.txt", "report.html"]),
        "needs is a number": with_record(needs=7),
        "nested deeply": {**good, "stages": {"report": deep}},
        "swap is a text": {**good, "swap": "abc"},
        "swap from an absolute path": swap([f"{outside}/precious.txt", "report.html"]),
        "swap to an absolute path": swap(["report.html", f"{outside}/precious.txt"]),
        "swap from above": swap([f"{up}/precious.txt", "stolen.txt"]),
        "swap to above": swap(["report.html", f"{up}/new.html"]),
        "swap from above through work": swap([f"work/x/../../{up}/precious.txt", "report.html"]),
        "swap to above through old": swap(["report.html", f"old/x/../../{up}/new.html"]),
        "swap of the settings": swap(["config.yaml", "old/x/config.yaml"]),
        "swap with three places": swap(["a", "b", "c"]),
        "swap with a NUL": swap(["work/x/\0", "report.html"]),
        "another format": {**good, "format": 99},
    }


def bomb(levels: int) -> str:
    """YAML whose aliases multiply by ten on each level."""
    lines = ["a0: &a0 x"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels + 1)]
    return "\n".join(lines) + "\n"


def _link(run: Path, name: str, target: Path) -> None:
    path = run / name
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.symlink_to(target)


def _header(run: Path, n_bytes: int, text: bytes) -> None:
    (run / "batchtopk" / "model.safetensors").write_bytes(n_bytes.to_bytes(8, "little") + text)


def _unfinished_training(tiny: Tiny, outside: Path) -> None:
    """Put a pickle where a killed training leaves its checkpoints."""
    from kills import counting, kill_at

    tiny.restore(tiny.before("train"))
    command(tiny.words("train"), tiny.folder, counting(tiny.run, kill_at(60)))
    harm = pickle.dumps(Harm(outside / "executed"))
    for path in (tiny.run / "work").rglob("*"):
        if path.is_file() and path.suffix != ".jsonl":
            path.write_bytes(harm)


def forgeries(tiny: Tiny, outside: Path) -> Iterator[tuple[str, str, Callable[[], None]]]:
    """Kind, name and a function that forges `tiny.run`, a copy of a finished run."""
    run = tiny.run
    for name, content in manifests(tiny.state(FINISHED), outside).items():
        yield "manifest.json", name, lambda content=content: (run / "manifest.json").write_text(json.dumps(content))  # type: ignore[misc]
    yield "manifest.json", "brackets", lambda: (run / "manifest.json").write_text("[" * 100_000) and None
    for name in ("config.yaml.partial", "manifest.json.partial", "report.html.partial", ".lock", "report.html", "null.json",
                 "config.yaml", "manifest.json", "batchtopk/model.safetensors", "batchtopk/latents.parquet"):  # fmt: skip
        yield "links", f"{name} to a file", lambda name=name: _link(run, name, outside / "precious.txt")  # type: ignore[misc]
    for name in ("work", "old", "batchtopk", "concepts", "figures", "steering", "tensorboard"):
        yield "links", f"{name} to a folder", lambda name=name: _link(run, name, outside)  # type: ignore[misc]
    yield "links", "report.html.partial to a new file", lambda: _link(run, "report.html.partial", outside / "new.txt")
    yield "links", "a link in a circle", lambda: _link(run, "report.html", run / "report.html")
    for levels in (7, 9):
        yield "config.yaml", f"aliases, {levels} levels", lambda n=levels: (run / "config.yaml").write_text(bomb(n))  # type: ignore[misc]
    yield "config.yaml", "not UTF-8", lambda: (run / "config.yaml").write_bytes(b"base: \xff\xfe\n") and None
    yield "config.yaml", "a list", lambda: (run / "config.yaml").write_text("[1]") and None
    yield "config.yaml", "nested deeply", lambda: (run / "config.yaml").write_text("[" * 20_000) and None
    yield "config.yaml", "a Python object", lambda: _python_object(run, outside)
    yield "checkpoint", "a pickle that makes a folder", lambda: _unfinished_training(tiny, outside)
    yield "safetensors", "a header of 2^62 bytes", lambda: _header(run, 2**62, b"{}")
    yield "safetensors", "a tensor of 2^60 bytes", lambda: _header(run, *_absurd())
    yield "safetensors", "a header that is not JSON", lambda: _header(run, 4, b"{{{{")


def _python_object(run: Path, outside: Path) -> None:
    (run / "config.yaml").write_text(f"base: !!python/object/apply:os.mkdir ['{outside}/executed']\n")


def _absurd() -> tuple[int, bytes]:
    text = json.dumps({"x": {"dtype": "F32", "shape": [2**58], "data_offsets": [0, 2**60]}}).encode()
    return len(text), text


def snapshot(outside: Path) -> dict[str, Any]:
    """Contents and times of everything in a folder, and its own."""
    return {
        str(path): (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in (outside, *sorted(outside.rglob("*")))
    }


def try_commands(tiny: Tiny, outside: Path, forge: Callable[[], None], name: str) -> str | None:
    """Forge a run for each command, and run it. Returns what went wrong first."""
    for title, words in COMMANDS.items():
        tiny.restore(tiny.state(FINISHED))
        forge()
        before = snapshot(outside)
        if title == "open":
            outcome = forked(lambda: _open(tiny.run), tiny.folder / "output.txt", SECONDS)
        else:
            given = [str(tiny.run) if word == "RUN" else word for word in words]
            outcome = command(given, tiny.folder, seconds=SECONDS)
        if snapshot(outside) != before:
            return f"`{title}` changed something outside of the run"
        if not outcome.is_clean and "there is no command" not in outcome.output:
            return f"`{title}` ended with {outcome.status}: {outcome.last_line}"
    return None


def _open(run: Path) -> None:
    import crossdiff

    try:
        found = crossdiff.open(run)
        found.latent(0), found.examples(0), found.crosscoder
    except crossdiff.UserError as error:
        print(error)


def _plain_config(tiny: Tiny, content: bytes) -> str | None:
    """Give hostile settings to `--config`."""
    path = tiny.folder / "hostile.yaml"
    path.write_bytes(content)
    tiny.restore(None)
    outcome = command(["run", str(tiny.run), "--config", str(path)], tiny.folder, seconds=SECONDS)
    return None if outcome.is_clean and outcome.status else f"status {outcome.status}: {outcome.last_line}"


def _store_elsewhere(tiny: Tiny) -> str | None:
    """A link to a store on another disk is no forgery."""
    tiny.restore(tiny.state(FINISHED))
    elsewhere = tiny.folder / "big-disk"
    shutil.move(tiny.run / "activations", elsewhere / "activations")
    (tiny.run / "activations").symlink_to(elsewhere / "activations")
    words = [["run", str(tiny.run)], ["train", str(tiny.run), "--crosscoders.batchtopk.epochs", "2"]]
    outcomes = [command(each, tiny.folder) for each in words]
    return next((f"status {each.status}: {each.last_line}" for each in outcomes if each.status), None)


def forged(tiny: Tiny, every: int = 1) -> Iterator[Tally]:
    """Every forgery, or every `every`-th, with each of the `COMMANDS`."""
    outside = tiny.folder / "outside"
    (outside / "folder").mkdir(parents=True, exist_ok=True)
    for name in ("precious.txt", "folder/precious.txt"):
        (outside / name).write_text("precious")
    tallies: dict[str, Tally] = {}
    for kind, name, forge in list(forgeries(tiny, outside))[::every]:
        tallies.setdefault(kind, Tally("forged", kind)).add(name, try_commands(tiny, outside, forge, name))
    yield from tallies.values()
    settings = Tally("forged", "--config")
    for name, content in {"aliases": bomb(9).encode(), "not UTF-8": b"base: \xff\n", "nested deeply": b"[" * 20_000}.items():
        settings.add(name, _plain_config(tiny, content))
    yield settings
    legitimate = Tally("forged", "a store on another disk works")
    (tiny.folder / "big-disk").mkdir(exist_ok=True)
    legitimate.add("activations is a link", _store_elsewhere(tiny))
    yield legitimate
