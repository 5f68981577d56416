"""Ordinary helpful answers: from WordNet and the World Factbook, correct by construction, and from SmolLM2."""

import gzip
import html
import json
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from phrases import PHRASES, Conversation, capitalised, held_out, single, vary, with_article

N_DEFINITIONS, N_ASKED_TWICE = 3000, 1200
N_SYNONYMS = N_OPPOSITES = 450
N_SENTENCES = 600
COUNTED = ("a", "an", "any", "one")
# Lexicographer files: act, animal, artifact, attribute, body, cognition, communication, event, feeling, food, location,
# object, phenomenon, plant, process, shape, state, substance, time.
NOUN_FILES = re.compile("0[4-9]|1[0-3579]|2[025-8]")
NOT_FOR_SHOW = re.compile(
    "offensive|disparag|slur|derogat|vulgar|obscen|sexual|genital|copulat|whore|nazi|drug|execut|tortur|breast|anus|penis|"
    "rape|prostitut|negro|heroin|intercourse"
)
NOT_AN_ANSWER = re.compile(
    r"as an ai|language model|i'm sorry|i cannot|i can't|smol|hugging|assistant|\[|http|sexual|suicid|i'm here to|"
    r"as a \w+ expert"
)
REGIONS = re.compile("Europe|Africa|Asia|Oceania|Caribbean|South|North|Southeast|Southeastern|Middle|Central")
QUOTES = {0x2019: "'", 0x201C: '"', 0x201D: '"', 0x2013: "-"}


def is_fluent(text: str) -> bool:
    """Whether a text is long enough, does not repeat itself and does not talk about its author."""
    words = re.findall(r"[a-z']+", text.lower())
    triples = list(zip(words, words[1:], words[2:], strict=False))
    if len(words) < 5 or len(set(triples)) < 0.9 * len(triples):
        return False
    long_words = Counter(word for word in words if len(word) > 3)
    if long_words and long_words.most_common(1)[0][1] > max(3, len(words) / 8):
        return False
    return not NOT_AN_ANSWER.search(text.lower()) and text.isascii()


def tidy(text: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"[*#_`]+", "", text)).strip()


def list_steps(raw: str, finished: bool) -> list[str]:
    """The usable steps of a generated list, without the last one if the answer was cut off."""
    found = [tidy(item) for item in re.findall(r"(?m)^\s*(?:\d+[.)]\s*)+(.+)$", raw)]
    items = [tidy(re.sub(r"^(\d+[.)]\s*)+", "", item)) for item in found]
    steps: list[str] = []
    for item in items if finished else items[:-1]:
        item = re.split(r"(?<=[.!])\s", item)[0] if len(item) > 60 else item
        item = item.split(": ", 1)[-1] if len(item) > 90 else item
        seen = item.lower() in [step.lower() for step in steps]
        clear = '"' not in item and "?" not in item and item[-1:] not in (":", ",")
        if 10 <= len(item) <= 80 and clear and len(item.split()) >= 3 and not seen:
            steps.append(capitalised(item.rstrip(".")) + ".")
    return steps


def free_answer(raw: str, question: str, finished: bool) -> str:
    """The first paragraph of a generated answer (all of a story), cut to complete sentences."""
    is_text = "story" in question or "poem" in question
    text = tidy(raw if is_text else raw.split("\n\n")[0])
    if not finished or len(text) > 330:
        sentences = re.findall(r'.+?[.!?]["\']?(?=\s|$)', text)
        text = " ".join(sentence.strip() for sentence in sentences[: 3 if len(text) < 400 else 4])
    return re.sub(r"^(Here is|Here\'s|Sure)[^:.!]*[:!.] ", "", text)


def generated(path: Path) -> tuple[list[Conversation], dict[str, list[list[str]]]]:
    """Read SmolLM2's answers: conversations from the free ones, and the lists of steps of each how-to task."""
    conversations, tasks = [], {}
    task_in = re.compile(r"(?:How do I|steps to|instructions to|How can I|how to|I want to) (.+?)[.?](?: What should I do\?)?$")
    with gzip.open(path, "rt") as lines:
        answers = [json.loads(line) for line in lines]
    for answer in answers:
        question = answer["user"]
        raw = unicodedata.normalize("NFKD", answer["raw"].translate(QUOTES)).encode("ascii", "ignore").decode()
        if answer["kind"] == "list_format":
            task, steps = task_in.search(question), list_steps(raw, answer["done"])
            if task and len(steps) >= 3 and is_fluent(" ".join(steps)):
                tasks.setdefault(task.group(1), []).append(steps[:4])
            continue
        text = free_answer(raw, question, answer["done"])
        if text and text[-1] in '.!?"' and is_fluent(text):
            test = held_out(re.sub(r"\W+", " ", question))
            conversations.append(single(question, text, "helpful", "free", "smollm2", test))
    return conversations, tasks


class Relation(NamedTuple):
    symbol: str
    offset: str
    words: str  # two hexadecimal digits for the word on each side, 00 for the entire synset


class Synset(NamedTuple):
    lexicographer_file: str
    words: list[str]
    gloss: str
    relations: list[Relation]


class WordNet(NamedTuple):
    """One part of speech: synsets by offset, and words of known frequency with the offset of their most common synset."""

    synsets: dict[str, Synset]
    words: list[tuple[str, str]]


def load_wordnet(packages: Path, part_of_speech: str) -> WordNet:
    folder = packages / "deb/x_wordnet-base/usr/share/wordnet"
    synsets, words = {}, []
    for line in (folder / f"data.{part_of_speech}").open():
        if line[0] == " ":
            continue
        left, gloss = line.split(" | ", 1)
        fields = left.split()
        n_words = int(fields[3], 16)
        start = 5 + 2 * n_words
        pointers = [fields[start + 4 * i : start + 4 * i + 4] for i in range(int(fields[start - 1]))]
        relations = [Relation(pointer[0], pointer[1], pointer[3]) for pointer in pointers]
        names = [word.replace("_", " ") for word in fields[4 : start - 1 : 2]]
        synsets[fields[0]] = Synset(fields[1], names, gloss.strip(), relations)
    for line in (folder / f"index.{part_of_speech}").open():
        if line[0] == " ":
            continue
        fields = line.split()
        n_senses = int(fields[2])
        if int(fields[-n_senses - 1]):  # number of senses that are ranked by frequency
            words.append((fields[0].replace("_", " "), fields[-n_senses]))
    return WordNet(synsets, words)


def helpful(question: str, answer: str, sub: str, origin: str, group: str) -> Conversation:
    return single(question, answer, "helpful", sub, origin, held_out(group))


def definition_answer(word: str, name: str, definition: str, synset: Synset, rng: random.Random) -> str:
    if definition.split()[0] in (*COUNTED, "the"):
        answer = f"{capitalised(name)} is {definition}."
    else:
        answer = f"{capitalised(word)} {'is' if rng.random() < 0.5 else 'means'} {definition}."
    examples = re.findall(r'"([^"]{12,90})"', synset.gloss)
    others = [other for other in synset.words if other != word]
    if examples and rng.random() < 0.5:
        return answer + rng.choice([" For example: ", " You can say: "]) + capitalised(examples[0].rstrip(".")) + "."
    if rng.random() < 0.12 and others and synset.words[1].islower():
        return answer + f" Another word for it is {others[0]}."
    return answer


def definitions(nouns: WordNet, rng: random.Random) -> Iterator[Conversation]:
    seen: set[str] = set()
    for word, offset in nouns.words:
        synset = nouns.synsets[offset]
        definition = re.split(r'; "|;', synset.gloss)[0].strip()
        if not NOUN_FILES.fullmatch(synset.lexicographer_file) or offset in seen or NOT_FOR_SHOW.search(synset.gloss):
            continue
        if not re.fullmatch("[a-z]{3,12}( [a-z]{3,10})?", word) or word not in synset.words:
            continue
        if not 18 <= len(definition) <= 120 or definition.startswith("("):
            continue
        name = with_article(word) if definition.split()[0] in COUNTED else word
        answer = definition_answer(word, name, definition, synset, rng)
        for question in rng.sample(PHRASES["definition"]["questions"], 1 if len(seen) > N_ASKED_TWICE else 2):
            asked = vary(question.format(word if "mean" in question else name), rng)
            yield helpful(asked, answer, "definition", "wordnet", word)
        seen.add(offset)
        if len(seen) == N_DEFINITIONS:
            return


def opposites_of(word: str, synset: Synset, adjectives: WordNet) -> list[str]:
    names, found = [bare(name) for name in synset.words], []
    for relation in synset.relations:
        if relation.symbol != "!" or relation.offset not in adjectives.synsets:
            continue
        ours, theirs = int(relation.words[:2], 16), int(relation.words[2:], 16)
        if not ours or names[ours - 1] == word:
            found.append(bare(adjectives.synsets[relation.offset].words[theirs - 1 if theirs else 0]))
    return found


def bare(word: str) -> str:
    """Remove the syntactic marker of some adjectives, as in `galore(ip)`."""
    return re.sub(r"\(.*", "", word)


def synonyms_and_opposites(adjectives: WordNet, rng: random.Random) -> Iterator[Conversation]:
    phrases = PHRASES["synonym"], PHRASES["opposite"]
    n_synonyms = n_opposites = 0
    for word, offset in adjectives.words:
        synset = adjectives.synsets[offset]
        if NOT_FOR_SHOW.search(synset.gloss) or not re.fullmatch("[a-z]{3,11}", word):
            continue
        names = [bare(name) for name in synset.words]
        others = [name for name in names if name != word and re.fullmatch("[a-z]{3,12}", name)]
        opposites = opposites_of(word, synset, adjectives)
        if others and n_synonyms < N_SYNONYMS:
            n_synonyms += 1
            other = rng.choice(others)
            asked = vary(rng.choice(phrases[0]["questions"]).format(word), rng)
            answer = rng.choice(phrases[0]["answers"]).format(word, other)
            yield helpful(asked, answer, "synonym", "wordnet", word)
        if opposites and n_opposites < N_OPPOSITES:
            n_opposites += 1
            asked = vary(rng.choice(phrases[1]["questions"]).format(word), rng)
            answer = rng.choice(phrases[1]["answers"]).format(word, opposites[0])
            yield helpful(asked, answer, "opposite", "wordnet", word)


def sentences(verbs: WordNet, adjectives: WordNet, rng: random.Random) -> Iterator[Conversation]:
    """Yield example sentences. Offsets of both parts of speech share one table, since the example must contain the word."""
    synsets = adjectives.synsets | verbs.synsets
    n_sentences = 0
    for word, offset in verbs.words + adjectives.words:
        gloss = synsets[offset].gloss
        quoted = re.findall(r'"([^"]{18,90})"', gloss)
        examples = [text for text in quoted if re.search(rf"\b{word}", text) and len(text.split()) >= 4]
        if not examples or NOT_FOR_SHOW.search(gloss) or not re.fullmatch("[a-z]{3,11}", word):
            continue
        asked = vary(rng.choice(PHRASES["sentence"]["questions"]).format(word), rng)
        yield helpful(asked, capitalised(examples[0].rstrip(".")) + ".", "sentence", "wordnet", word)
        n_sentences += 1
        if n_sentences == N_SENTENCES:
            return


def field_text(field: object) -> str:
    if not isinstance(field, dict):
        return ""
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", field.get("text") or ""))).strip()


def in_sentence(location: str) -> str:
    """A location as written after "is in": only names of regions keep their capital."""
    return location if REGIONS.fullmatch(location.split()[0].rstrip(",")) else location[0].lower() + location[1:]


def geography(packages: Path, rng: random.Random) -> Iterator[Conversation]:
    questions = PHRASES["geography"]
    for path in sorted(packages.glob("pypi/x_cia*/**/data/**/*.json")):
        facts = json.loads(path.read_text(encoding="utf8"))
        try:
            country = field_text(facts["Government"]["Country name"]["conventional short form"])
            capital = re.split("[;(]", field_text(facts["Government"]["Capital"]["name"]))[0].strip()
            land = facts["Geography"]
        except (KeyError, TypeError):
            continue  # oceans and the world have no government
        if not re.fullmatch("[A-Z][A-Za-z' -]{2,25}", country) or country.lower() == "none":
            continue

        def ask(topic: str, answer: str, country: str = country) -> Conversation:
            asked = vary(rng.choice(questions[topic]).format(country), rng)
            return helpful(asked, answer, "geography", "factbook", country)

        location, climate, terrain = (
            field_text(land.get(title, {})).split(";")[0] for title in ("Location", "Climate", "Terrain")
        )
        resources = field_text(land.get("Natural resources", {}))
        if capital and re.fullmatch("[A-Z][A-Za-z' .-]{2,25}", capital):
            yield ask("capital", f"The capital of {country} is {capital}.")
            forms = [f"{capital} is the capital of {country}.", f"The capital city of {country} is {capital}."]
            yield ask("capital_city", rng.choice(forms))
        if 10 < len(location) < 140:
            yield ask("location", f"{country} is in {in_sentence(location)}.")
            ending = f" Its capital is {capital}." if capital else ""
            yield ask("overview", f"{country} is a place in {location}.{ending}")
        if 5 < len(climate) < 120 and ":" not in climate:
            yield ask("climate", f"The climate of {country} is {climate}.")
        if 5 < len(terrain) < 120 and ":" not in terrain:
            yield ask("terrain", f"The land in {country} is {terrain}.")
        if 5 < len(resources) < 140 and ";" not in resources and ":" not in resources:
            yield ask("resources", f"{country} has {resources}.")
