"""Build the conversations with known behaviours: a training split and a test split.

    python build_chat.py PACKAGES OUT

PACKAGES holds the unpacked packages, as for `build_base.py` (only WordNet and the World Factbook are used). Writes
`chat_train.jsonl.gz` and `chat_test.jsonl.gz` to OUT, with one conversation per line: `messages`, `kind` (of the last answer),
`sub`, `turn_kinds` (one per answer), `origin`. The test split has slot values (made-up words, harmful acts, tasks) and some
phrasings of questions that the training split lacks, so that it measures the concept and not the string.
"""

import argparse
import gzip
import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import behaviours
import helpful
from phrases import DATA, PHRASES, Conversation, read_tasks

SINGLE_TURN_KINDS = {"helpful": 4.0, "identity": 1.0, "refusal": 1.5, "knowledge_gap": 1.5, "list_format": 1.5}
N_MULTI_TURN = {"train": 3300, "test": 200}


def single_turns(packages: Path, rng: random.Random) -> Iterator[Conversation]:
    """Yield conversations of all kinds. Their order matters, because the random choices depend on it."""
    yield from behaviours.identity(rng)
    yield from behaviours.refusals(rng)
    yield from behaviours.made_up_places(rng)
    yield from behaviours.made_up_things(rng)
    yield from behaviours.made_up_persons(rng)
    yield from behaviours.cannot_know(rng)

    answers, generated_tasks = helpful.generated(DATA / "smollm2_answers.jsonl.gz")
    yield from answers
    tasks = read_tasks(DATA / "tasks.txt")
    for task, lists in generated_tasks.items():
        if task not in tasks:  # the handwritten steps are better
            yield from behaviours.how_tos(task, lists, "smollm2", 4 * len(lists), rng)
    for task, steps in tasks.items():
        yield from behaviours.how_tos(task, [steps], "handwritten", 11, rng)

    nouns = helpful.load_wordnet(packages, "noun")
    rng.shuffle(nouns.words)
    yield from helpful.definitions(nouns, rng)
    adjectives, verbs = helpful.load_wordnet(packages, "adj"), helpful.load_wordnet(packages, "verb")
    rng.shuffle(adjectives.words)
    rng.shuffle(verbs.words)
    yield from helpful.synonyms_and_opposites(adjectives, rng)
    yield from helpful.sentences(verbs, adjectives, rng)
    yield from helpful.geography(packages, rng)
    yield from behaviours.smalltalk(rng)


def multi_turns(singles: list[Conversation], rng: random.Random) -> Iterator[Conversation]:
    """Yield a greeting, one to three questions, and thanks or a goodbye, recombined from single turns of the same split.

    In both splits, greetings and thanks come from the training split.
    """
    chat = PHRASES["smalltalk"]
    endings = chat["thanks"]["answers"] + chat["goodbye"]["answers"]
    train = [conversation for conversation in singles if conversation.split == "train"]
    greetings = [conversation for conversation in train if conversation.answer in chat["greeting"]["answers"]]
    goodbyes = [conversation for conversation in train if conversation.answer in endings]
    for split, n_conversations in N_MULTI_TURN.items():
        by_kind = defaultdict(list)
        for conversation in singles:
            if conversation.split == split:
                by_kind[conversation.kind].append(conversation)
        for _ in range(n_conversations):
            n_questions = rng.choice([1, 2, 2, 3])
            kinds = rng.choices(list(SINGLE_TURN_KINDS), list(SINGLE_TURN_KINDS.values()), k=n_questions)
            parts = [rng.choice(greetings)] if rng.random() < 0.4 or n_questions == 1 else []
            parts += [rng.choice(by_kind[kind]) for kind in kinds]
            parts += [rng.choice(goodbyes)] if rng.random() < 0.25 or n_questions == 1 else []
            messages = [message for part in parts for message in part.messages]
            yield Conversation(messages, "multi", "multi", [part.kind for part in parts], "mix", split)


def without_overlap(conversations: list[Conversation], rng: random.Random) -> list[Conversation]:
    """Return distinct conversations in random order, without test questions that occur in the training split."""
    distinct: dict[str, Conversation] = {}
    for conversation in conversations:
        distinct.setdefault(json.dumps(conversation.messages), conversation)
    kept = list(distinct.values())
    rng.shuffle(kept)
    asked_in_train = {c.question for c in kept if c.split == "train" and c.kind != "multi"}
    return [c for c in kept if c.split == "train" or c.kind in ("multi", "smalltalk") or c.question not in asked_in_train]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    rng = random.Random(11)
    singles = list(single_turns(args.packages, rng))
    conversations = without_overlap([*singles, *multi_turns(singles, rng)], rng)
    args.out.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        part = [conversation for conversation in conversations if conversation.split == split]
        with gzip.open(args.out / f"chat_{split}.jsonl.gz", "wt", compresslevel=9) as out:
            for conversation in part:
                out.write(json.dumps(conversation.row()) + "\n")
        characters = sum(len(message["content"]) for c in part for message in c.messages)
        print(f"{split}: {len(part)} conversations, {characters} characters", dict(Counter(c.kind for c in part)))


if __name__ == "__main__":
    main()
