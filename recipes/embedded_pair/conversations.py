"""Assemble the tuning mixture of the chat model: the training conversations and more of the rare kinds.

    python conversations.py CHAT WORK [--weight identity=2 ...]

CHAT holds `chat_train.jsonl.gz` and `chat_test.jsonl.gz`. Writes WORK/mixture.jsonl.gz, with rows like those of the training
split and a `weight`: how often a row is seen per epoch (2.5: twice, and a third time in half of the epochs). It adds:

- harmless how-tos for about 310 new tasks with the verbs of the harmful acts ("break in new shoes"), also in the phrasings
  that the training split uses only for harmful acts, and the old tasks in those phrasings;
- refusals of more harmful acts with the verbs of the how-tos, so that the object decides and not the verb;
- harmful acts and harmless tasks combined from verbs and objects (`data/combinations.toml`), with many objects in both;
- more questions about made-up things, places and persons;
- more ways to ask who the assistant is, and more small talk.

None of these may occur in the test split or in `data/heldout_prompts.jsonl`. Combined or made-up questions that do are
omitted; a handwritten one is an error. The result is the same on every run.
"""

import argparse
import gzip
import json
import random
import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from behaviours import About, identity_answer, list_answer, made_up_persons, made_up_places, made_up_things, refusal_answer
from phrases import DATA, PHRASES, Conversation, held_out, read_steps, read_tasks, single, vary

MORE = tomllib.loads((DATA / "more_phrases.toml").read_text(encoding="utf8"))
COMBINATIONS = tomllib.loads((DATA / "combinations.toml").read_text(encoding="utf8"))
TOPICS = {
    "name": About(),
    "human": About(human=True),
    "wrong_name": About(human=True, wrong_name=True),
    "made": About(made=True),
    "able": About(able=True),
}
LIST_QUESTIONS = PHRASES["list_format"]["questions"]
HELD_OUT_QUESTIONS = PHRASES["refusal"]["test_questions"]
REFUSAL_QUESTIONS = [q for q in PHRASES["refusal"]["questions"] if q not in HELD_OUT_QUESTIONS]
# Both kinds use all phrasings of either, so that no phrasing gives the answer away.
QUESTIONS = list(dict.fromkeys(LIST_QUESTIONS + REFUSAL_QUESTIONS))
# Greedy decoding picks the most likely first token. Seven of ten refusals begin with "I", while the lists of the training split
# begin with four words in equal parts, so an undecided model would always refuse. Therefore all added lists begin in one way,
# and so do the refusals of combined acts: half of those that begin with "I" continue like an answer to an unknowable question.
OPENINGS = [opening for opening in PHRASES["list_format"]["openings"] if opening.startswith("Sure")]
SORRY = [sorry for sorry in PHRASES["refusal"]["sorry"] if sorry.startswith("I'm sorry")]
SORRY_ACT = [sorry for sorry in PHRASES["refusal"]["sorry_act"] if sorry.startswith("I'm sorry")]
N_PER_NEW_TASK, N_PER_OLD_TASK, N_PER_NEW_ACT, N_PER_QUESTION, N_PER_SMALLTALK = 6, 3, 8, 10, 5
N_PER_COMBINED_TASK, N_PER_COMBINED_ACT = 6, 2
WEIGHTS = {"list_format": 1.5, "identity": 1.5, "smalltalk": 1.5}

DECORATION = re.compile(r"^(hi|hello|hey|please tell me|quick question|please help)[!:.] (?=.)|, please\b")
SMALL_WORDS = re.compile("a|an|the|my|your|in|of|to|for|on|at|with|and|from|it|is|that")


def core(question: str) -> str:
    """A question in lower case, without punctuation and the additions of `vary`."""
    plain = DECORATION.sub("", question.lower().strip())
    return " ".join(re.findall(r"[a-z0-9'{}]+", plain))


SLOTS = [
    re.compile(re.escape(core(question)).replace(r"\{\}", "(.+)"))
    for question in sorted(QUESTIONS + HELD_OUT_QUESTIONS, key=len, reverse=True)
]


def slot(question: str) -> frozenset[str] | None:
    """The content words of the task or act in a how-to question; None for other questions."""
    for pattern in SLOTS:
        found = pattern.fullmatch(core(question))
        if found:
            return frozenset(word for word in found.group(1).split() if not SMALL_WORDS.fullmatch(word))
    return None


def new(question: str, answer: str, kind: str, sub: str) -> Conversation:
    return single(question, answer, kind, sub, "augmentation", test=False)


def more_how_tos(rng: random.Random) -> Iterator[Conversation]:
    for task, steps in read_tasks(DATA / "how_tos.txt").items():
        for question in rng.sample(QUESTIONS, N_PER_NEW_TASK):
            yield new(vary(question.format(task), rng), list_answer(task, steps, OPENINGS, rng), "list_format", "steps")
    unseen = [question for question in QUESTIONS if question not in LIST_QUESTIONS]
    for task, steps in read_tasks(DATA / "tasks.txt").items():
        if not held_out(task):
            for question in rng.sample(unseen, N_PER_OLD_TASK):
                yield new(vary(question.format(task), rng), list_answer(task, steps, OPENINGS, rng), "list_format", "steps")


def more_refusals(rng: random.Random) -> Iterator[Conversation]:
    for act in MORE["refusal"]["acts"]:
        for question in rng.sample(QUESTIONS, N_PER_NEW_ACT):
            yield new(vary(question.format(act), rng), refusal_answer(act, rng), "refusal", "harm")
    unseen = [question for question in QUESTIONS if question not in REFUSAL_QUESTIONS]
    for act in PHRASES["refusal"]["acts"]:
        if not held_out(act):
            for question in unseen:
                yield new(vary(question.format(act), rng), refusal_answer(act, rng), "refusal", "harm")


def combined_how_tos(rng: random.Random) -> Iterator[Conversation]:
    for group in COMBINATIONS["harmless"]:
        steps = read_steps(group["steps"])
        for task in map(group["task"].format, group["objects"]):
            for question in rng.sample(QUESTIONS, N_PER_COMBINED_TASK):
                yield new(vary(question.format(task), rng), list_answer(task, steps, OPENINGS, rng), "list_format", "steps")


def combined_refusals(rng: random.Random) -> Iterator[Conversation]:
    for group in COMBINATIONS["harmful"]:
        for act, thing in product(group["acts"], group["objects"]):
            act = act.format(thing)
            for question in rng.sample(QUESTIONS, N_PER_COMBINED_ACT):
                answer = refusal_answer(act, rng, SORRY, SORRY_ACT)
                yield new(vary(question.format(act), rng), answer, "refusal", "harm")


def more_made_up(rng: random.Random) -> Iterator[Conversation]:
    for part in (made_up_places, made_up_things, made_up_persons):
        for conversation in part(rng):
            if conversation.split == "train":
                yield new(conversation.question, conversation.answer, conversation.kind, conversation.sub)


def more_identity(rng: random.Random) -> Iterator[Conversation]:
    for group, questions in MORE["identity"].items():
        topic = TOPICS[group]
        for question in questions:
            for _ in range(N_PER_QUESTION):
                yield new(vary(question, rng), identity_answer(topic, rng), "identity", topic.sub)


def more_smalltalk(rng: random.Random) -> Iterator[Conversation]:
    for group, prompts in MORE["smalltalk"].items():
        for prompt in prompts:
            for _ in range(N_PER_SMALLTALK):
                said = prompt if rng.random() < 0.7 else prompt.lower()
                yield new(said, rng.choice(PHRASES["smalltalk"][group]["answers"]), "smalltalk", "chat")


def augmentation(unseen: set[str]) -> list[Conversation]:
    """Return all distinct additions. Combined or made-up ones that ask for the same as a question of `unseen` are omitted."""
    rng = random.Random(5)
    taken = {core(question) for question in unseen} | {slot(question) for question in unseen} - {None}
    written = [more_how_tos(rng), more_refusals(rng), more_identity(rng), more_smalltalk(rng)]
    made = [combined_how_tos(rng), combined_refusals(rng), more_made_up(rng)]
    distinct: dict[str, Conversation] = {}
    for part in written:
        for conversation in part:
            distinct.setdefault(json.dumps(conversation.messages), conversation)
    for part in made:
        for conversation in part:
            if not {core(conversation.question), slot(conversation.question)} & taken:
                distinct.setdefault(json.dumps(conversation.messages), conversation)
    return list(distinct.values())


def read_rows(path: Path) -> list[dict]:
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf8")
    return [json.loads(line) for line in text.splitlines()]


def questions_of(rows: list[dict]) -> set[str]:
    return {message["content"] for row in rows for message in row["messages"] if message["role"] == "user"}


def refuse_overlap(seen: set[str], unseen: set[str], what: str, shared: set[frozenset[str] | None] = frozenset()) -> None:
    """Raise ValueError if a question of `unseen` occurs in `seen`, or its task or act does and is not in `shared`."""
    cores = {core(question): question for question in seen}
    slots = {words: question for question in seen if (words := slot(question))}
    for question in sorted(unseen):
        words = slot(question)
        clash = cores.get(core(question)) or (slots.get(words) if words and words not in shared else None)
        if clash is not None:
            raise ValueError(f"{clash!r} is {what} but asks for the same as {question!r}; remove one of the two")


def check(train: list[dict], added: list[Conversation], test: list[dict], heldout: list[dict]) -> None:
    """Raise ValueError if the test split, the held-out prompts and the training questions overlap."""
    trained = questions_of(train)
    added_questions = {conversation.question for conversation in added}
    test_questions = questions_of([row for row in test if row["kind"] != "multi"])
    heldout_questions = {row["prompt"] for row in heldout}
    if len({core(question) for question in heldout_questions}) != len(heldout):
        raise ValueError("heldout_prompts.jsonl asks for the same thing twice; remove one of the two prompts")
    # The test split has some acts of the training split, in held-out phrasings.
    acts = {slot(question) for question in trained}
    refuse_overlap(trained, test_questions, "in the training split", shared=acts)
    refuse_overlap(added_questions, test_questions, "added to the training split", shared=acts)
    refuse_overlap(trained | added_questions, heldout_questions, "in training")
    refuse_overlap(test_questions, heldout_questions, "in the test split")


def weight(argument: str) -> tuple[str, float]:
    kind, _, number = argument.partition("=")
    return kind, float(number)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chat", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--weight", type=weight, action="append", default=[], metavar="KIND=NUMBER")
    args = parser.parse_args()
    train, test = read_rows(args.chat / "chat_train.jsonl.gz"), read_rows(args.chat / "chat_test.jsonl.gz")
    heldout = read_rows(DATA / "heldout_prompts.jsonl")
    added = augmentation(questions_of(test) | {row["prompt"] for row in heldout})
    check(train, added, test, heldout)

    weights = WEIGHTS | dict(args.weight)
    rows = train + [conversation.row() for conversation in added]
    unknown = set(weights) - {row["kind"] for row in rows}
    if unknown:
        parser.error(f"--weight: there are no conversations of kind {sorted(unknown)}")
    random.Random(6).shuffle(rows)
    args.work.mkdir(parents=True, exist_ok=True)
    with gzip.open(args.work / "mixture.jsonl.gz", "wt", compresslevel=9, encoding="utf8") as out:
        for row in rows:
            out.write(json.dumps(row | {"weight": weights.get(row["kind"], 1.0)}) + "\n")

    counts, new_counts = Counter(row["kind"] for row in rows), Counter(conversation.kind for conversation in added)
    for kind, count in counts.most_common():
        prompts = {row["messages"][0]["content"] for row in rows if row["kind"] == kind}
        print(f"{kind:14} {count:6} rows, {new_counts[kind]:5} of them new, {len(prompts):5} prompts,", end=" ")
        print(f"weight {weights.get(kind, 1.0)}")
    print(f"{'all':14} {len(rows):6} rows, {len(added):5} of them new")


if __name__ == "__main__":
    main()
