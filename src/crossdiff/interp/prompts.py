"""The prompts for the language model, and the parsing of its answers.

A change of a prompt changes the answers, and invalidates the cached ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from crossdiff.interp.windows import Integers, Window

OPEN, CLOSE = "\N{MATHEMATICAL LEFT WHITE SQUARE BRACKET}", "\N{MATHEMATICAL RIGHT WHITE SQUARE BRACKET}"
Message = dict[str, str]

EXPLAIN = f"""You study a latent: one direction in the activations of a base language model and of the chat model that was \
fine-tuned from it. You get excerpts of text on which it is active, from strong to weak. The tokens on which it is active \
stand between {OPEN} and {CLOSE}; under each excerpt they are listed with their activation from 1 to 10. Tokens such as \
<|im_start|> belong to the chat template. "\\n" is a line break.

Say in one sentence what the latent responds to: the words, the topic, the form of the text or the place in the conversation \
that the excerpts have in common and other text lacks. Be as specific as the excerpts allow. Do not mention activations, \
tokens' brackets or the models. Answer with JSON only: {{"explanation": "..."}}"""

DETECT = """An explanation says on what text a latent of a language model is active. You get the explanation and numbered \
excerpts. Decide for each excerpt whether the latent is active somewhere in it. Tokens such as <|im_start|> belong to the chat \
template. "\\n" is a line break. Answer with JSON only, one true or false per excerpt, in their order: \
{"active": [true, false]}"""

FUZZ = f"""An explanation says on what text a latent of a language model is active. You get the explanation and numbered \
excerpts in which some tokens stand between {OPEN} and {CLOSE}. Decide for each excerpt whether the marked tokens are those on \
which the latent is active. Tokens such as <|im_start|> belong to the chat template. "\\n" is a line break. Answer with JSON \
only, one true or false per excerpt, in their order: {{"active": [true, false]}}"""


class AnswerSchema(BaseModel):
    """The JSON that a model has to answer; other keys are ignored.

    The subclasses have no docstrings, because these would become part of the JSON schema that is sent to the server.
    """

    model_config = ConfigDict(frozen=True)


class Explanation(AnswerSchema):
    explanation: str = Field(min_length=3, max_length=2000)


class Judgement(AnswerSchema):
    active: list[bool]


A = TypeVar("A", bound=AnswerSchema)


@dataclass(frozen=True)
class Request(Generic[A]):
    """One request to a language model.

    Attributes:
        answer: schema of the answer.
        check: raises ValueError if a valid answer does not fit the request.
        typical: an answer of typical length, for the estimate of a dry run.
    """

    messages: tuple[Message, ...]
    answer: type[A]
    check: Callable[[A], None]
    typical: A

    def parse(self, text: str) -> A:
        """The JSON object in a model's text, validated; raises ValueError if there is none or it is not valid."""
        start, stop = text.find("{"), text.rfind("}")
        if start < 0 or stop < start:
            raise ValueError("there is no JSON object in it")
        try:
            answer = self.answer.model_validate_json(text[start : stop + 1])
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"{where}: {first['msg']}" if where else first["msg"]) from None
        self.check(answer)
        return answer

    def schema(self) -> dict[str, Any]:
        """The schema, for servers that can enforce one."""
        schema = self.answer.model_json_schema() | {"additionalProperties": False}
        return {"name": self.answer.__name__.lower(), "schema": schema, "strict": True}


def _messages(task: str, content: str) -> tuple[Message, ...]:
    """A single user message, since many chat templates have no system message."""
    return ({"role": "user", "content": f"{task}\n\n{content}"},)


def explain_request(excerpts: Sequence[tuple[str, str]], facts: str) -> Request[Explanation]:
    """A request to explain a latent.

    Args:
        excerpts: marked text with its list of activations, the strongest first.
        facts: what the analysis found out about the latent.
    """
    shown = "\n\n".join(f"Excerpt {n}: {text}\n  {listed}" for n, (text, listed) in enumerate(excerpts, 1))
    typical = Explanation(explanation="x" * 160)
    return Request(_messages(EXPLAIN, f"{facts}\n\n{shown}"), Explanation, lambda answer: None, typical)


def judge_request(task: str, explanation: str, excerpts: Sequence[str]) -> Request[Judgement]:
    """A request to judge which excerpts fit an explanation; `task` is DETECT or FUZZ."""

    def check(answer: Judgement) -> None:
        if len(answer.active) != len(excerpts):
            raise ValueError(f"it has {len(answer.active)} values for {len(excerpts)} excerpts")

    shown = "\n".join(f"{n}. {text}" for n, text in enumerate(excerpts, 1))
    messages = _messages(task, f"Explanation: {explanation}\n\n{shown}")
    return Request(messages, Judgement, check, Judgement(active=[False] * len(excerpts)))


@dataclass(frozen=True)
class Renderer:
    """Renders windows as text."""

    tokenizer: Any

    def plain(self, window: Window) -> str:
        """The text of a window."""
        return str(self.tokenizer.decode(window.token_ids.tolist()))

    def line(self, window: Window, marked: Integers) -> str:
        """A window on one line, with brackets around runs of the marked tokens."""
        ids = window.token_ids.tolist()
        places = set(marked.tolist())
        text = prefix = ""
        start = 0
        # How a token is written may depend on those before it, so each piece is the difference of two decoded prefixes.
        for stop in range(1, len(ids) + 1):
            if stop < len(ids) and (stop in places) == (start in places):
                continue
            longer = str(self.tokenizer.decode(ids[:stop]))
            piece = longer[len(prefix) :]
            prefix = longer
            text += f"{OPEN}{piece}{CLOSE}" if start in places else piece
            start = stop
        return text.replace("\n", "\\n")

    def listed(self, window: Window, largest: float) -> str:
        """The ten strongest active tokens of a window, in order, with their activations from 1 to 10."""
        strongest = sorted(sorted(range(len(window.marked)), key=lambda i: -float(window.values[i]))[:10])
        parts = []
        for index in strongest:
            token = str(self.tokenizer.decode([int(window.token_ids[window.marked[index]])])).replace("\n", "\\n")
            parts.append(f'"{token}" {max(1, round(10 * float(window.values[index]) / largest))}')
        return ", ".join(parts)
