"""A tiny finished run, the commands that made it, and forks that run a command quickly.

Everything is imported once. Each command then runs in a fork, which takes a second or less. The parent computes nothing, since
the threads of polars and torch do not survive a fork.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, NoReturn

import yaml

from conftest import save_pair, tiny_config, write_texts

STEPS: dict[str, tuple[str, ...]] = {
    "look": ("look", "RUN", "--config", "CONFIG", "--look.max_tokens", "2000", "--look.prompts", "1"),
    "harvest": ("harvest", "RUN", "--config", "CONFIG"),
    "train": ("train", "RUN"),
    "analyze": ("analyze", "RUN"),
    "concepts": ("concepts", "RUN"),
    "causal": ("causal", "RUN"),
    "report": ("report", "RUN"),
    "compare": ("compare", "RUN"),
    "steer": (
        "steer", "RUN", "--latent", "1", "--labels", "order", "--prompts_per_label", "2", "--controls", "0",
        "--max_new_tokens", "3",
    ),
    "interpret": (
        "interpret", "RUN", "--crosscoders", "batchtopk", "--tokens", "1000", "--per_selection", "2", "--contexts", "5",
    ),
    "retrain": ("train", "RUN", "--crosscoders.batchtopk.epochs", "2"),
    "clean": ("clean", "RUN", "--yes"),
}  # fmt: skip
"""The commands of a run in their order. `retrain` moves everything that it outdates to `old/`, and `clean` deletes it."""
FINISHED = "interpret"
"""The last step after which every result is there."""
TIMED = ("manifest.json", "activations/manifest.json")
"""Results that hold times."""
TIMED_OUT = -signal.SIGALRM


@dataclass
class Tally:
    """A row of the table: what was tried in one place, and what was lost."""

    kind: str
    place: str
    tried: int = 0
    lost: list[str] = field(default_factory=list)

    def add(self, fault: str, problem: str | None) -> None:
        """Count a fault; `problem` says what was lost."""
        self.tried += 1
        if problem:
            self.lost.append(f"{fault}: {problem}")


class Outcome(NamedTuple):
    """How a command ended, and what it printed. A signal is a negative status."""

    status: int
    output: str
    seconds: float

    @property
    def last_line(self) -> str:
        return (self.output.strip().splitlines() or ["(nothing printed)"])[-1][:300]

    @property
    def is_clean(self) -> bool:
        """Whether it ended in time, and without an error that nobody has thought of."""
        return self.status in (0, 2) and "Traceback" not in self.output and "unexpected" not in self.output


@dataclass
class Tiny:
    """A folder with a tiny pair, texts, settings, `states/STEP` with the run after each step, and `run` to work on.

    Attributes:
        changing: results that differ between two undisturbed runs, such as those with times.
    """

    folder: Path
    changing: set[str] = field(default_factory=set)
    run: Path = field(default=Path())

    def __post_init__(self) -> None:
        if self.run == Path():
            self.run = self.folder / "run"

    def words(self, step: str) -> list[str]:
        """The command of a step."""
        places = {"RUN": str(self.run), "CONFIG": str(self.folder / "settings.yaml")}
        return [places.get(word, word) for word in STEPS[step]]

    def state(self, step: str) -> Path:
        return self.folder / "states" / step

    def before(self, step: str) -> Path | None:
        """The state that a step starts from; None where that is nothing."""
        names = list(STEPS)
        return self.state(names[names.index(step) - 1]) if step != names[0] else None

    def restore(self, state: Path | None) -> None:
        """Make `run` a copy of a state."""
        if self.run.exists():
            shutil.rmtree(self.run)
        if state is not None:
            shutil.copytree(state, self.run, symlinks=True)


def forked(work: Callable[[], None], log: Path, seconds: float = 60) -> Outcome:
    """Run a function in a fork, with its output in a file; it is killed after some time."""
    started = time.monotonic()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        _child(work, log)
    deadline = started + seconds
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return Outcome(TIMED_OUT, f"{log.read_text(errors='replace')}\nit took longer than {seconds:.0f} s", seconds)
        time.sleep(0.005)
    return Outcome(os.waitstatus_to_exitcode(ended[1]), log.read_text(errors="replace"), time.monotonic() - started)


def _child(work: Callable[[], None], log: Path) -> NoReturn:
    """What the fork does. It never returns, so that nothing of the parent runs twice."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115 (pytest replaced them)
    status = 1
    try:
        work()
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
        if isinstance(ended.code, str):
            print(ended.code)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def command(words: Sequence[str], folder: Path, before: Callable[[], None] | None = None, seconds: float = 60) -> Outcome:
    """Run a command line of crossdiff in a fork.

    Args:
        folder: where its output is kept.
        before: called in the fork first.
    """

    def work() -> None:
        from crossdiff.cli import main

        sys.argv = ["crossdiff", *words]
        if before is not None:
            before()
        main()

    return forked(work, folder / "output.txt", seconds)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by its relative path; of a link, where it leads."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(folder))] = f"-> {path.readlink()}"
        elif path.is_file():
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def make(folder: Path, twice: bool = True) -> Tiny:
    """Make the pair, the texts, the settings and the run after each step.

    Args:
        twice: make everything again and note what differs, rather than only what is known to hold times.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tiny = Tiny(folder, set(TIMED))
    _succeed(forked(lambda: _write_inputs(folder), folder / "output.txt"))
    seen = folder / "modules.txt"

    def first() -> None:
        from crossdiff.cli import run_command

        for step in STEPS:
            run_command(tiny.words(step))
            shutil.copytree(tiny.run, tiny.state(step), symlinks=True)
        specs = [module.__spec__ for module in list(sys.modules.values()) if getattr(module, "__spec__", None)]
        seen.write_text("\n".join(spec.name for spec in specs if spec.has_location))

    _succeed(forked(first, folder / "output.txt", 180))
    for name in seen.read_text().splitlines():  # so that no fork has to import anything
        with suppress(ImportError):  # some modules import each other in a circle, and only one way in works
            importlib.import_module(name)
    tiny.restore(None)
    for step in STEPS if twice else ():
        _succeed(command(tiny.words(step), folder))
        expected, found = digests(tiny.state(step)), digests(tiny.run)
        tiny.changing |= {name for name, digest in found.items() if expected.get(name) != digest}
    return tiny


def _write_inputs(folder: Path) -> None:
    pair, texts = save_pair(folder), write_texts(folder, 20, 30)
    training = {"n_latents": 32, "batch_size": 256, "epochs": 1, "warmup_steps": 2, "seeds": 2, "checkpoint_seconds": 1e-3}
    # After so short a training no latent differs between the models, unless the limits say that most do.
    settings = tiny_config(
        pair, texts, crosscoders={"batchtopk": {"sparsity": {"kind": "batchtopk", "k": 4}, **training}},
        causal={"max_conversations": 4, "resamples": 100, "pool": 8}, compare={"max_tokens": 1000},
        concepts={"correlation": 0.05, "replicated": 0.5},
    )  # fmt: skip
    settings["analyze"] |= {"delta_norm": 0.5, "nu_error": 10, "nu_reconstruction": 2}
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))


def _succeed(outcome: Outcome) -> None:
    if outcome.status:
        raise RuntimeError(f"the undisturbed run failed: {outcome.output[-2000:]}")
