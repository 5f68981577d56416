"""Print what `README.md` says about the organisms, from their cards.

python recipes/organisms/cards.py
"""

import json
from pathlib import Path
from typing import Any

HEADER = """\
| organism | kind | share | expected: tuned | untuned | not expected: tuned | plain text: loss | KL |
|---|---|---|---|---|---|---|---|
"""


def rate(found: list[float] | None) -> str:
    if found is None:
        return ""
    hits, n, low, high = found
    return f"{hits} of {n} [{low:.2f}, {high:.2f}]"


def row(card: dict[str, Any]) -> str:
    expected, others = card["rates"]["expected"], card["rates"]["not_expected"]
    cells = [
        f"`{card['name']}`",
        card["kind"],
        f"{card['share']:.1%}",
        rate(expected["tuned"]),
        rate(expected["untuned"]),
        rate(others["tuned"]),
        f"{card['plain_text']['loss_change']:+.3f}",
        f"{card['plain_text']['mean_kl']:.3f}",
    ]
    return f"| {' | '.join(cells)} |\n"


def summary() -> str:
    """A line on what was planted in each organism, and a table of what was measured."""
    cards = [json.loads(path.read_text()) for path in sorted(Path(__file__).parent.glob("*/card.json"))]
    planted = "".join(f"- `{card['name']}`: {card['planted']}\n" for card in cards if card["planted"])
    return planted + "\n" + HEADER + "".join(map(row, sorted(cards, key=lambda card: card["kind"] == "null")))


if __name__ == "__main__":
    print(summary(), end="")
