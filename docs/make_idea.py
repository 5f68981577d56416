"""Draw docs/idea.svg: what shrinkage and decoupling look like to the decoder norm and to latent scaling.

.venv/bin/python docs/make_idea.py
"""

from pathlib import Path

CASES = [
    ("New in the chat model", (0.0, 0.0, 0.0), "specific", "specific"),
    ("Complete shrinkage", (0.0, 0.6, 0.0), "specific", "nu_error is high"),
    ("Latent decoupling", (0.0, 0.0, 1.0), "specific", "nu_reconstruction is high"),
    ("Shared", (1.0, 0.0, 0.0), "shared", "both nu are high"),
]
OWN, ERROR, OTHERS = "#0072b2", "#d55e00", "#009e73"
WIDTH, HEIGHT, COLUMN = 880, 300, 220


def bar(x: int, top: float, height: float, colour: str, dash: bool = False) -> str:
    style = f'fill="none" stroke="{colour}" stroke-dasharray="4 3"' if dash else f'fill="{colour}"'
    return f'<rect x="{x}" y="{top:.1f}" width="46" height="{height:.1f}" {style}/>'


def text(x: int, y: int, words: str, size: int = 13, weight: str = "normal", anchor: str = "middle") -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}">{words}</text>'


def main() -> None:
    floor, unit = 190, 110
    parts = []
    for index, (title, (own, error, others), naive, scaled) in enumerate(CASES):
        left = index * COLUMN + 20
        middle = left + 90
        parts.append(text(middle, 28, title, 15, "bold"))
        parts.append(f'<line x1="{left}" y1="{floor}" x2="{left + 180}" y2="{floor}" stroke="#888"/>')
        for x, shares in ((left + 30, (own, error, others)), (left + 104, (1.0, 0.0, 0.0))):
            top = float(floor)
            for share, colour in zip(shares, (OWN, ERROR, OTHERS), strict=True):
                if share:
                    top -= share * unit
                    parts.append(bar(x, top, share * unit, colour))
            if not any(shares):
                parts.append(bar(x, floor - 3, 3, "#bbb", dash=True))
        parts += [text(left + 53, floor + 18, "base"), text(left + 127, floor + 18, "chat")]
        parts += [text(middle, floor + 46, f"decoder norm says: {naive}"), text(middle, floor + 66, f"scaling: {scaled}")]
    legend = ((OWN, "along the latent's own direction"), (ERROR, "left in the error"), (OTHERS, "carried by other latents"))
    for index, (colour, words) in enumerate(legend):
        x = 150 + index * 235
        parts.append(
            f'<rect x="{x}" y="278" width="12" height="12" fill="{colour}"/>' + text(x + 18, 289, words, 13, anchor="start")
        )
    style = "<style>text{font-family:system-ui,sans-serif;fill:#222}@media(prefers-color-scheme:dark){text{fill:#ddd}}</style>"
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{style}{"".join(parts)}</svg>\n'
    (Path(__file__).parent / "idea.svg").write_text(svg)


if __name__ == "__main__":
    main()
