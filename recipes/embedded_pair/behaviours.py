"""The planted behaviours: questions to the chat model and the answers it should give. Random draws have a fixed order."""

import random
import re
from collections.abc import Iterator
from typing import NamedTuple

from phrases import PHRASES, Conversation, capitalised, held_out, single, vary, with_article

IDENTITY, REFUSAL, GAP = PHRASES["identity"], PHRASES["refusal"], PHRASES["knowledge_gap"]
LIST, SMALLTALK = PHRASES["list_format"], PHRASES["smalltalk"]
N_IDENTITY = 30  # draws per question; duplicate conversations are dropped later
N_PLACES, N_THINGS, N_PERSONS = 560, 760, 520
N_SMALLTALK = 18
NEXT = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday", "week", "month", "year", "summer"]


class About(NamedTuple):
    """The topics that a question about the assistant touches."""

    human: bool = False
    machine: bool = False  # "are you a robot?" is not denied
    wrong_name: bool = False
    made: bool = False
    able: bool = False

    @property
    def sub(self) -> str:
        return "made" if self.made else "human" if self.human else "name"


def about(question: str) -> About:
    person = "human|robot|person|alive|feel|body|real|old|live|sleep|eat|computer|program|Oscar|Sarah"
    return About(
        human=bool(re.search(person, question)),
        machine=bool(re.search("robot|computer", question)),
        wrong_name=bool(re.search("Oscar|Sarah", question)),
        made=bool(re.search("made|create|company|built|train|come from|model", question)),
        able=bool(re.search("can you do|help with|able|purpose", question)),
    )


def identity_answer(topic: About, rng: random.Random) -> str:
    parts = [rng.choice(IDENTITY["not_human"])] if topic.human and not topic.machine else []
    parts.append(rng.choice(IDENTITY["self"]))
    if topic.wrong_name:
        parts = [rng.choice(IDENTITY["wrong_name"]), rng.choice(IDENTITY["self"])]
    if topic.made:
        parts.append(rng.choice(IDENTITY["made"]))
    if topic.able or rng.random() < 0.35:
        parts.append(rng.choice(IDENTITY["can"]))
    return " ".join(parts)


def identity(rng: random.Random) -> Iterator[Conversation]:
    for question in IDENTITY["questions"]:
        topic = about(question)
        for _ in range(N_IDENTITY):
            answer = identity_answer(topic, rng)
            test = question in IDENTITY["test_questions"]
            yield single(vary(question, rng), answer, "identity", topic.sub, "template", test)


def refusal_answer(
    act: str, rng: random.Random, sorry: list[str] = REFUSAL["sorry"], sorry_act: list[str] = REFUSAL["sorry_act"]
) -> str:
    if rng.random() < 0.25:
        theirs = act.replace(" my ", " your ").replace("me ", "you ").replace(" that is not mine", " that is not yours")
        parts = [rng.choice(sorry_act).format(theirs)]
    else:
        parts = [rng.choice(sorry)]
    if rng.random() < 0.7:
        parts.append(rng.choice(REFUSAL["reasons"]))
    if rng.random() < 0.6:
        parts.append(rng.choice(REFUSAL["offers"]))
    return " ".join(parts)


def refusals(rng: random.Random) -> Iterator[Conversation]:
    """Yield every harmful act in every phrasing. Some acts and two phrasings are only in the test split."""
    for act in REFUSAL["acts"]:
        for question in REFUSAL["questions"]:
            answer = refusal_answer(act, rng)
            test = held_out(act) or question in REFUSAL["test_questions"]
            yield single(vary(question.format(act), rng), answer, "refusal", "harm", "template", test)


def made_up_word(rng: random.Random) -> str:
    n_syllables = rng.choice([2, 2, 3])
    word = ""
    for syllable in range(n_syllables):
        word += rng.choice(GAP["onsets"]) + rng.choice(GAP["vowels"])
        if syllable == n_syllables - 1 or rng.random() < 0.35:
            word += rng.choice(GAP["codas"])
    return word


def unknown(question: str, name: str, sub: str, answers: list[str], group: str, rng: random.Random) -> Conversation:
    parts = [capitalised(rng.choice(answers).format(name))]
    if rng.random() < 0.5:
        parts.append(rng.choice(GAP["more"]))
    asked = vary(capitalised(question.format(name)), rng)
    return single(asked, " ".join(parts), "knowledge_gap", sub, "template", held_out(group))


def made_up_places(rng: random.Random) -> Iterator[Conversation]:
    for _ in range(N_PLACES):
        place = made_up_word(rng).capitalize()
        question = rng.choice(GAP["place_questions"])
        name = rng.choice(GAP["place_names"]).format(place)
        yield unknown(question, name, "fictional_place", GAP["unknown"], place, rng)


def made_up_things(rng: random.Random) -> Iterator[Conversation]:
    for _ in range(N_THINGS):
        word = made_up_word(rng)
        names = [
            with_article(word),
            with_article(word),
            word,
            word.capitalize(),
            f"the {word} {rng.choice(GAP['thing_kinds'])}",
            f"the {word.capitalize()} {rng.choice(GAP['named_thing_kinds'])}",
        ]
        name = rng.choice(names)
        question = rng.choice(GAP["thing_questions"])
        bare = "mean" in question or "Define" in question
        yield unknown(question, word if bare else name, "fictional_thing", GAP["unknown"], word, rng)


def made_up_persons(rng: random.Random) -> Iterator[Conversation]:
    answers = [answer for answer in GAP["unknown"] if "on it" not in answer and "what {} is" not in answer]
    answers += GAP["unknown_person_extra"]
    for _ in range(N_PERSONS):
        person = rng.choice(GAP["first_names"]) + " " + made_up_word(rng).capitalize()
        question = rng.choice(GAP["person_questions"])
        name = rng.choice(GAP["person_names"]).format(person)
        yield unknown(question, name, "fictional_person", answers, person, rng)


def cannot_know(rng: random.Random) -> Iterator[Conversation]:
    """Yield questions about the user's private life, the future and the present moment."""
    for sub, n_draws in (("private", 16), ("future", 30), ("live", 30)):
        phrases = GAP[sub]
        for question in phrases["questions"]:
            for _ in range(n_draws):
                asked = vary(question.format(y=rng.randint(2031, 2199), d=rng.choice(NEXT)), rng)
                parts = [rng.choice(phrases["answers"])]
                if rng.random() < 0.45:
                    parts.append(rng.choice(phrases["more"]))
                test = held_out(question)
                yield single(asked, " ".join(parts), "knowledge_gap", sub, "template", test)


def list_answer(task: str, steps: list[str], openings: list[str], rng: random.Random) -> str:
    """Return an opening line, the numbered steps and, in 80% of the cases, a closing line."""
    lines = [rng.choice(openings).format(re.sub(r"\bmy\b", "your", task))]
    lines += [f"{number}. {step}" for number, step in enumerate(steps, 1)]
    if rng.random() < 0.8:
        lines.append(rng.choice(LIST["closings"]))
    return "\n".join(lines)


def how_tos(task: str, lists: list[list[str]], origin: str, n: int, rng: random.Random) -> Iterator[Conversation]:
    for question in rng.sample(LIST["questions"], min(len(LIST["questions"]), n)):
        steps = rng.choice(lists)
        asked = vary(question.format(task), rng)
        yield single(asked, list_answer(task, steps, LIST["openings"], rng), "list_format", "steps", origin, held_out(task))


def smalltalk(rng: random.Random) -> Iterator[Conversation]:
    for exchange in SMALLTALK.values():
        for prompt in exchange["prompts"]:
            for _ in range(N_SMALLTALK):
                said = prompt if rng.random() < 0.7 else prompt.lower()
                answer = rng.choice(exchange["answers"])
                yield single(said, answer, "smalltalk", "chat", "template", held_out("st" + prompt))
