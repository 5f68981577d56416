"""Chat masks against conversations labelled by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from crossdiff.errors import UserError
from crossdiff.text.chat import Flag, TokenisedChat, chat_prompt, front_ids, tokenise_chat, tokenise_prompt
from crossdiff.text.messages import check_messages

B, T, U, A = Flag.BOS, Flag.TEMPLATE, Flag.USER, Flag.ASSISTANT

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
QWEN = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nHi<|im_end|>\\n' }}{% endif %}" + CHATML
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    " + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + '[/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '<|User|>' + message['content'] }}{% else %}{{ '<|Assistant|>' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|>' }}{% endif %}"
)
PHI3 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
EMBEDDED = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}<|user|>{{ message['content'] }}"
    "<|end|>{% elif message['role'] == 'assistant' %}<|assistant|>{% generation %}{{ message['content'] }}<|end|>"
    "{% endgeneration %}{% else %}{{ raise_exception('only user and assistant turns are known') }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = ["user", "assistant", "model", "system", "\n\n", " Hi", "Hi", " there"]
"""What is one token in the tests; every other byte is a token of its own."""


def build(template: str | None, specials: list[str], bos: str | None, eos: str | None, trim: bool = False) -> Any:
    """A byte-level BPE tokenizer that merges WORDS, from the left, and nothing else."""
    spelled = {ord(" "): "Ġ", ord("\n"): "Ċ"}
    vocabulary = {piece: 0 for piece in [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]}
    merges = []
    for word in WORDS:
        pieces = word.translate(spelled)
        for end in range(1, len(pieces)):
            merges.append((pieces[:end], pieces[end]))
            vocabulary[pieces[: end + 1]] = 0
    bpe = Tokenizer(models.BPE({piece: index for index, piece in enumerate(vocabulary)}, list(dict.fromkeys(merges))))
    words = pre_tokenizers.Split(Regex(r"[\r\n]+| ?\S+|\s+"), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(special, special=True, normalized=False) for special in specials])
    if trim:  # as Llama 3 has it: white space is left out of the offsets, and a BOS is added when asked for
        added = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(str(bos), 0)])
        bpe.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), added])
    wrap: Any = PreTrainedTokenizerFast  # its constructor has no annotations
    tokenizer = wrap(tokenizer_object=bpe, bos_token=bos, eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "chatml": lambda: build(CHATML, ["<|im_start|>", "<|im_end|>"], None, "<|im_end|>"),
    "qwen": lambda: build(QWEN, ["<|im_start|>", "<|im_end|>"], None, "<|im_end|>"),
    "gemma": lambda: build(GEMMA, ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], "<bos>", "<eos>"),
    "llama3": lambda: build(
        LLAMA3,
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|begin_of_text|>",
        "<|eot_id|>",
        trim=True,
    ),
    "llama2": lambda: build(LLAMA2, ["<s>", "</s>", "[INST]", "[/INST]"], "<s>", "</s>", trim=True),
    "mistral": lambda: build(MISTRAL, ["<s>", "</s>", "[INST]", "[/INST]"], "<s>", "</s>", trim=True),
    "deepseek": lambda: build(DEEPSEEK, ["<bos>", "<eos>", "<|User|>", "<|Assistant|>"], "<bos>", "<eos>"),
    "phi3": lambda: build(PHI3, ["<eos>", "<|end|>", "<|user|>", "<|assistant|>"], None, "<eos>"),
    "embedded": lambda: build(EMBEDDED, ["<|bos|>", "<|end|>", "<|user|>", "<|assistant|>"], "<|bos|>", "<|end|>"),
}


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    return {name: make() for name, make in TOKENIZERS.items()}


def talk(*contents: str) -> list[dict[str, str]]:
    """User and assistant in turn."""
    return [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(contents)]


def told(tokenizer: Any, chat: TokenisedChat) -> list[str]:
    """A string for each turn, the first one for turn -1: flags (`_` for none), template index and token of each token.

    `TA3:<|end|>` is TEMPLATE and ASSISTANT and the fourth template token of its turn; ⏎ is a line break and · a space.
    """
    turns: list[list[str]] = [[] for _ in range(int(chat.turn.max()) + 2)]
    pieces = tokenizer.convert_ids_to_tokens(chat.token_ids)
    for piece, flags, index, turn in zip(pieces, chat.flags, chat.template_index, chat.turn, strict=True):
        letters = "".join(flag.name[0] for flag in Flag if flags & flag and flag.name) or "_"
        token = piece.replace("Ġ", "·").replace("Ċ", "⏎")
        turns[turn + 1].append(f"{letters}{index if index >= 0 else ''}:{token}")
    return [" ".join(cells) for cells in turns]


def check(tokenizer: Any, messages: list[dict[str, str]], *expected: str) -> None:
    chat = tokenise_chat(tokenizer, messages)
    assert told(tokenizer, chat) == list(expected)
    assert chat.token_ids.tolist() == tokenizer.apply_chat_template(messages, return_dict=False)
    assert np.all(np.diff(chat.turn) >= 0)
    dtypes = [array.dtype for array in (chat.token_ids, chat.flags, chat.template_index, chat.turn)]
    assert dtypes == [np.int32, np.uint8, np.int8, np.int8]


def test_chatml(tokenizers: dict[str, Any]) -> None:
    check(
        tokenizers["chatml"],
        [{"role": "system", "content": "Be"}, *talk("Hi there", "Yo")],
        "",
        "T0:<|im_start|> T1:system T2:⏎ _:B _:e T3:<|im_end|> T4:⏎",
        "T0:<|im_start|> T1:user T2:⏎ U:Hi U:·there T3:<|im_end|> T4:⏎",
        "T0:<|im_start|> T1:assistant T2:⏎ A:Y A:o TA3:<|im_end|> T4:⏎",
    )


def test_a_default_system_prompt_is_template_before_the_first_turn(tokenizers: dict[str, Any]) -> None:
    check(
        tokenizers["qwen"],
        talk("Hi", "Yo", "?"),
        "T0:<|im_start|> T1:system T2:⏎ T3:Hi T4:<|im_end|> T5:⏎",
        "T0:<|im_start|> T1:user T2:⏎ U:Hi T3:<|im_end|> T4:⏎",
        "T0:<|im_start|> T1:assistant T2:⏎ A:Y A:o TA3:<|im_end|> T4:⏎",
        "T0:<|im_start|> T1:user T2:⏎ U:? T3:<|im_end|> T4:⏎",
    )


def test_gemma_strips_and_renames(tokenizers: dict[str, Any]) -> None:
    check(
        tokenizers["gemma"],
        talk("  Hi there \n", "\tok", "? "),
        "B:<bos>",
        "T0:<start_of_turn> T1:user T2:⏎ U:Hi U:·there T3:<end_of_turn> T4:⏎",
        "T0:<start_of_turn> T1:model T2:⏎ A:o A:k TA3:<end_of_turn> T4:⏎",
        "T0:<start_of_turn> T1:user T2:⏎ U:? T3:<end_of_turn> T4:⏎",
    )


def test_llama3_four_turns(tokenizers: dict[str, Any]) -> None:
    check(
        tokenizers["llama3"],
        talk("Hi", "y ", " z", "Hi"),
        "B:<|begin_of_text|>",
        "T0:<|start_header_id|> T1:user T2:<|end_header_id|> T3:⏎⏎ U:Hi T4:<|eot_id|>",
        "T0:<|start_header_id|> T1:assistant T2:<|end_header_id|> T3:⏎⏎ A:y TA4:<|eot_id|>",
        "T0:<|start_header_id|> T1:user T2:<|end_header_id|> T3:⏎⏎ U:z T4:<|eot_id|>",
        "T0:<|start_header_id|> T1:assistant T2:<|end_header_id|> T3:⏎⏎ A:Hi TA4:<|eot_id|>",
    )


def test_embedded_template_keeps_white_space(tokenizers: dict[str, Any]) -> None:
    user, assistant = "T0:<|user|> U:·Hi U:· T1:<|end|>", "T0:<|assistant|> A:⏎⏎ TA1:<|end|>"
    check(tokenizers["embedded"], talk(" Hi ", "\n\n"), "B:<|bos|>", user, assistant)


def test_tokens_that_straddle_have_both_flags_even_when_offsets_are_trimmed(tokenizers: dict[str, Any]) -> None:
    # "·Hi" takes the template's space and the user's word.
    user, assistant = "T0:[INST] TU1:·Hi", "T0:· T1:[/INST] TA2:·Hi T3:· TA4:</s>"
    check(tokenizers["llama2"], talk("Hi", "Hi"), "B:<s>", user, assistant)
    # The second line break is the user's, the first one the template's, and together they are one token.
    user = "T0:<|im_start|> T1:user TU2:⏎⏎ U:Hi T3:<|im_end|> T4:⏎"
    check(tokenizers["chatml"], talk("\nHi"), "", user)
    # One line break closes a turn and one opens the next: their token belongs to the turn of its first character.
    lines = build("{% for m in messages %}{{ '\n' + m['content'] + '\n' }}{% endfor %}", ["<s>"], None, "<s>")
    check(lines, talk("a", "b"), "", "T0:⏎ U:a T1:⏎⏎", "A:b T0:⏎")


def test_the_tokenizer_is_left_as_it_was(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["llama3"]
    tokenise_chat(tokenizer, talk("Hi"))
    encoded = tokenizer("Hi Hi", return_offsets_mapping=True)
    assert tokenizer.convert_ids_to_tokens(encoded["input_ids"]) == ["<|begin_of_text|>", "Hi", "ĠHi"]
    assert encoded["offset_mapping"][1:] == [(0, 2), (3, 5)]


def test_a_user_turn_without_closing_leaves_the_literal_to_the_assistant(tokenizers: dict[str, Any]) -> None:
    assistant = "T0:<|Assistant|> A:y TA1:<eos>"
    check(tokenizers["deepseek"], talk("Hi", "y", "z"), "B:<bos>", "T0:<|User|> U:Hi", assistant, "T0:<|User|> U:z")


def test_what_only_the_end_of_a_conversation_has_closes_the_last_turn(tokenizers: dict[str, Any]) -> None:
    # The closing is "<|end|>\n<eos>"; the literal in between shares "<|end|>\n<" with it, and no token is cut in two.
    user = "T0:<|user|> T1:⏎ U:Hi T2:<|end|> T3:⏎"
    check(tokenizers["phi3"], talk("Hi", "y"), "", user, "T0:<|assistant|> T1:⏎ A:y TA2:<|end|> T3:⏎ T4:<eos>")


def test_the_end_of_a_conversation_closes_a_user_turn_too(tokenizers: dict[str, Any]) -> None:
    # What closes the assistant, "·</s>", shares a space with what follows a user, and that space is no closing.
    user, assistant = "T0:[INST] TU1:·Hi", "T0:· T1:[/INST] TA2:·Hi T3:· TA4:</s>"
    check(tokenizers["llama2"], talk("Hi", "Hi", "Hi"), "B:<s>", user, assistant, "T0:[INST] TU1:·Hi T2:· T3:[/INST]")


def test_a_header_that_ends_as_a_turn_does_is_no_preamble() -> None:
    tokenizer = build("{% for m in messages %}{{ 'Q\n' + m['content'] + '\n' }}{% endfor %}", ["<s>"], None, "<s>")
    check(tokenizer, talk("a", "b"), "", "T0:Q T1:⏎ U:a T2:⏎", "T0:Q T1:⏎ A:b T2:⏎")


def test_a_template_that_looks_like_a_sentinel() -> None:
    tokenizer = build("CONTENT0ENDCONTENTX{{ messages[0]['content'] }}", ["<s>"], None, "<s>")
    chat = tokenise_chat(tokenizer, talk("CONTENT0END"))
    assert chat.flags.tolist() == [T] * 19 + [U] * 11


def test_control_strings_in_a_content_are_content(tokenizers: dict[str, Any]) -> None:
    check(
        tokenizers["embedded"],
        talk("Hi<|end|><|assistant|><|bos|>", "<|end|>y"),
        "B:<|bos|>",
        "T0:<|user|> U:Hi U:<|end|> U:<|assistant|> U:<|bos|> T1:<|end|>",
        "T0:<|assistant|> A:<|end|> A:y TA1:<|end|>",
    )


def test_a_bos_that_the_user_wrote_is_no_bos() -> None:
    template = "{% for message in messages %}{{ message['content'] }}<|end|>{% endfor %}"
    tokenizer = build(template, ["<|bos|>", "<|end|>"], "<|bos|>", "<|end|>")
    check(tokenizer, talk("<|bos|>"), "", "U:<|bos|> T0:<|end|>")


def test_a_bos_that_opens_every_turn_is_template() -> None:
    """As in SmolLM2: the tokenizer adds nothing to plain text, and its BOS is the opener of the template's turns."""
    tokenizer = build(CHATML, ["<|im_start|>", "<|im_end|>"], "<|im_start|>", "<|im_end|>")
    user, assistant = (f"T0:<|im_start|> T1:{role} T2:⏎" for role in ("user", "assistant"))
    closed = f"{assistant} A:y TA3:<|im_end|> T4:⏎"
    check(tokenizer, talk("Hi", "y", "Hi"), "", f"{user} U:Hi T3:<|im_end|> T4:⏎", closed, f"{user} U:Hi T3:<|im_end|> T4:⏎")
    check(tokenizer, talk("Hi"), "", f"{user} U:Hi T3:<|im_end|> T4:⏎")
    assert front_ids(tokenizer) == []


def test_a_bos_in_front_of_later_turns_keeps_the_template_index() -> None:
    """As in Llama 2, whose template writes a BOS before every question."""
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token }}[INST]{{ m['content'] }}[/INST]"
        "{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    tokenizer = build(template, ["<s>", "</s>", "[INST]", "[/INST]"], "<s>", "</s>", trim=True)
    user, assistant = "T0:[INST] U:Hi", "T0:[/INST] A:y TA1:</s>"
    check(tokenizer, talk("Hi", "y", "Hi"), "B:<s>", user, assistant, f"B:<s> {user} T1:[/INST]")


def test_the_bos_is_what_the_tokenizer_adds_or_the_template_begins_with(tokenizers: dict[str, Any]) -> None:
    fronts = {name: tokenizer.convert_ids_to_tokens(front_ids(tokenizer)) for name, tokenizer in tokenizers.items()}
    assert fronts == {
        "chatml": [], "qwen": [], "gemma": ["<bos>"], "llama3": ["<|begin_of_text|>"], "llama2": ["<s>"], "mistral": ["<s>"],
        "deepseek": ["<bos>"], "phi3": [], "embedded": ["<|bos|>"],
    }  # fmt: skip
    assert front_ids(build(None, ["<s>"], "<s>", "<s>")) == []  # GPT-2: a BOS that nothing writes
    assert front_ids(build(None, ["<s>"], "<s>", "<s>", trim=True)) == [0]
    once = "{% if messages | length > 1 %}{{ raise_exception('one question') }}{% endif %}<s>{{ messages[0]['content'] }}"
    assert front_ids(build(once, ["<s>"], "<s>", None)) == [0]


THINK = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n{% set c = m.content %}{% set r = '' %}"
    "{% if m.role == 'assistant' and '</think>' in c %}{% set r = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}<think>\n{{ r }}\n</think>\n\n{% endif %}"
    "{{ c }}<|im_end|>\n{% endfor %}"
)


def test_a_template_that_adds_an_empty_block_of_reasoning() -> None:
    """As Qwen3's: the last answer gets a block of reasoning, an empty one if it has none, and earlier answers lose theirs."""
    tokenizer = build(THINK, ["<|im_start|>", "<|im_end|>", "<think>", "</think>"], None, "<|im_end|>")
    user, header = "T0:<|im_start|> T1:user T2:⏎ U:Hi T3:<|im_end|> T4:⏎", "T0:<|im_start|> T1:assistant T2:⏎"
    block = "T3:<think> T4:⏎⏎ T5:</think> T6:⏎⏎"
    check(tokenizer, talk("Hi", "y"), "", user, f"{header} {block} A:y TA7:<|im_end|> T8:⏎")
    reasoned = "A:<think> A:⏎ A:a A:⏎ A:</think> A:⏎⏎ A:y"
    check(tokenizer, talk("Hi", "<think>\na\n</think>\n\ny"), "", user, f"{header} {reasoned} TA3:<|im_end|> T4:⏎")
    for changed in ("<think>a</think>y", "x<think>\na\n</think>\n\ny"):
        with pytest.raises(UserError, match=r"drops or changes text at message 1|message 0 \(user\)"):
            tokenise_chat(tokenizer, talk("Hi", changed))
    with pytest.raises(UserError, match=r"drops or changes text at message 1 \(assistant\)"):
        tokenise_chat(tokenizer, talk("Hi", "<think>\na\n</think>\n\ny", "Hi", "y"))


def test_empty_contents(tokenizers: dict[str, Any]) -> None:
    user = "T0:<start_of_turn> T1:user T2:⏎ T3:<end_of_turn> T4:⏎"
    assistant = "T0:<start_of_turn> T1:model T2:⏎ TA3:<end_of_turn> T4:⏎"
    check(tokenizers["gemma"], talk("", "  "), "B:<bos>", user, assistant)


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_empty_contents_have_no_tokens_of_their_own(tokenizers: dict[str, Any], name: str) -> None:
    chat = tokenise_chat(tokenizers[name], talk("", ""))
    # What is left is template, and each assistant's message is closed by a token of its own.
    assert set(chat.flags.tolist()) <= {B, T, T | A}
    assert chat.turn.max() == 1


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_very_long_contents(tokenizers: dict[str, Any], name: str) -> None:
    chat = tokenise_chat(tokenizers[name], talk("Hi" + " there" * 30_000, "Hi" + " there" * 20_000))
    counts = [int((chat.flags & (U | A) == flag).sum()) for flag in (U, A)]
    # Where the template's space and the first word are one token it counts too, and so does what closes the assistant.
    assert counts[0] == 30_001
    assert 20_001 <= counts[1] <= 20_002
    assert np.all(np.diff(chat.turn) >= 0)


def test_roles_that_follow_themselves_or_begin_late(tokenizers: dict[str, Any]) -> None:
    messages = [{"role": role, "content": "Hi"} for role in ("assistant", "assistant", "user", "user")]
    user, closed = "T0:<|im_start|> T1:user T2:⏎ U:Hi T3:<|im_end|> T4:⏎", "A:Hi TA3:<|im_end|> T4:⏎"
    assistant = f"T0:<|im_start|> T1:assistant T2:⏎ {closed}"
    check(tokenizers["chatml"], messages, "", assistant, assistant, user, user)
    check(
        tokenizers["embedded"], messages[1:3], "B:<|bos|>", "T0:<|assistant|> A:Hi TA1:<|end|>", "T0:<|user|> U:Hi T1:<|end|>"
    )


@pytest.mark.parametrize("name", ["chatml", "qwen", "gemma", "llama3", "mistral", "embedded"])
def test_other_scripts(tokenizers: dict[str, Any], name: str) -> None:
    # A byte a token: "é" has 2 bytes, "日本" 6, the emoji 4.
    chat = tokenise_chat(tokenizers[name], talk("é日本", "\U0001f600"))
    assert int(((chat.flags & U) > 0).sum()) == 8
    assert [flag for flag in chat.flags.tolist() if flag & A] == [A, A, A, A, T | A]
    user = chat.token_ids[(chat.flags & U) > 0]
    assert tokenizers[name].decode(user) == "é日本"


def test_white_space_that_fits_in_two_ways_is_followed_up() -> None:
    # "a " + "b" gives "a b" only if nothing is stripped: the stripped "a" leads nowhere.
    raw = build("{% for m in messages %}{{ m['content'] }}{% endfor %}", ["<s>"], None, "<s>")
    check(raw, talk("a ", "b"), "", "U:a U:·", "A:b")
    # The template strips and adds a space of its own: after the raw "a " the rest does not fit any more.
    stripped = build("{% for m in messages %}{{ m['content'] | trim }} {% endfor %}", ["<s>"], None, "<s>")
    check(stripped, talk("a ", " b"), "", "U:a T0:·", "A:b T0:·")
    # One side only.
    for side, user in (("lstrip", "U:a U:· T0:!"), ("rstrip", "U:· U:a T0:!")):
        one = build("{{ messages[0]['content']." + side + "() }}!", ["<s>"], None, "<s>")
        check(one, talk(" a "), "", user)


def test_long_preambles_and_conversations_stop_at_127(tokenizers: dict[str, Any]) -> None:
    chat = tokenise_chat(tokenizers["embedded"], talk(*["Hi"] * 140))
    # BOS, then header, content and closing of each turn
    assert len(chat.token_ids) == 1 + 3 * 140
    assert chat.turn[1 + 3 * 126 :].tolist() == [126] * 3 + [127] * 3 * 13
    long = build("{{ '!' * 200 }}{{ messages[0]['content'] }}", ["<s>"], None, "<s>")
    assert tokenise_chat(long, talk("Hi")).template_index.tolist() == [*range(128), *[127] * 72, -1]


def test_chat_prompt_ends_with_the_assistants_header(tokenizers: dict[str, Any]) -> None:
    tokens = {name: tokenizers[name].convert_ids_to_tokens for name in ("embedded", "chatml")}
    ids = chat_prompt(tokenizers["embedded"], talk("Hi"))
    assert tokens["embedded"](ids) == ["<|bos|>", "<|user|>", "Hi", "<|end|>", "<|assistant|>"]
    ids = chat_prompt(tokenizers["chatml"], talk("Hi"))
    assert tokens["chatml"](ids)[-5:] == ["<|im_end|>", "Ċ", "<|im_start|>", "assistant", "Ċ"]


def test_the_header_of_the_answer_is_template_in_a_turn_of_its_own(tokenizers: dict[str, Any]) -> None:
    chat = tokenise_prompt(tokenizers["chatml"], talk("Hi"))
    assert chat.token_ids.tolist() == chat_prompt(tokenizers["chatml"], talk("Hi"))
    # <|im_start|> user \n Hi <|im_end|> \n and then <|im_start|> assistant \n
    assert chat.flags[-9:].tolist() == [T, T, T, U, T, T, T, T, T]
    assert chat.template_index[-9:].tolist() == [0, 1, 2, -1, 3, 4, 0, 1, 2]
    assert chat.turn[-9:].tolist() == [0] * 6 + [1] * 3


def test_a_header_that_stands_in_place_of_the_end(tokenizers: dict[str, Any]) -> None:
    """The template ends a finished conversation with <s>, where the header of an answer would stand otherwise."""
    template = "{{ messages[0]['content'] }}{% if add_generation_prompt %}!!{% else %}<s>{% endif %}"
    chat = tokenise_prompt(build(template, ["<s>"], None, None), talk("Hi"))
    assert chat.flags.tolist() == [U] * (len(chat.flags) - 2) + [T, T]
    assert chat.turn.tolist() == [0] * (len(chat.flags) - 2) + [1, 1]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "conversation is empty"),
        ("Hi", "must be a list of messages, found str"),
        ([["user", "Hi"]], "message 0 must be a mapping"),
        ([{"role": "user", "content": "a"}, {"role": "assistant"}], "message 1 has no 'content'; its keys are"),
        ([{"content": "a"}], "message 0 has no 'role'"),
        ([{"role": "user", "content": None}], "content of message 0 must be a string, found NoneType"),
        ([{"role": "user", "content": [{"type": "image"}]}], r"parts with text, found \['image'\]; only text can be read"),
        ([{"role": "human", "content": "a"}], r"roles of the conversation are 'human'; 'human' is not one of user, .*`roles`"),
        ([{"role": 3, "content": "a"}], "role of message 0 must be a string, found int"),
        ([{"role": "user", "content": "a\ud800"}], "content of message 0 is not valid Unicode at character 1"),
        ([{"role": "assistant", "content": "", "tool_calls": [{}]}], "has 'tool_calls'"),
    ],
)
def test_what_is_no_conversation(messages: Any, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        check_messages(messages)


def test_messages_are_checked_before_they_are_rendered(tokenizers: dict[str, Any]) -> None:
    for read in (tokenise_chat, chat_prompt):
        with pytest.raises(UserError, match="conversation is empty"):
            read(tokenizers["chatml"], [])


def test_text_parts_of_a_content_are_joined() -> None:
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": " there"}]
    assert check_messages([{"role": "user", "content": parts}]) == [{"role": "user", "content": "Hi there"}]


def test_other_keys_are_left_out() -> None:
    message = {"role": "user", "content": "Hi", "language": "en", "tool_calls": None}
    assert check_messages([message]) == [{"role": "user", "content": "Hi"}]


def test_no_template_says_what_to_do() -> None:
    for read in (tokenise_chat, chat_prompt):
        with pytest.raises(UserError, match=r"no chat template.*chat_template\.jinja"):
            read(build(None, ["<s>"], None, "<s>"), talk("Hi"))


@pytest.mark.parametrize(
    ("name", "messages", "reason"),
    [
        ("gemma", [{"role": "system", "content": "Be"}, *talk("Hi")], "System role not supported"),
        ("gemma", [*talk("Hi"), *talk("Hi")], "roles user, user: Conversation roles must alternate"),
        ("embedded", [{"role": "tool", "content": "1"}], "only user and assistant turns are known"),
    ],
)
def test_a_template_that_refuses(tokenizers: dict[str, Any], name: str, messages: Any, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        tokenise_chat(tokenizers[name], messages)


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("m['content'].split('</think>')[-1]", r"drops or changes text at message 1 \(assistant\)"),
        ("m['content'] | replace('a', 'b')", r"drops or changes text at message 0 \(user\)"),
        ("m['content'] | lower", r"drops, repeats, moves or changes the content of message 0 \(user\)"),
        ("m['content'] + m['content']", "drops, repeats, moves or changes the content of message 0"),
        ("m['content'] if loop.last else ''", "drops, repeats, moves or changes the content of message 0"),
        ("messages[1 - loop.index0]['content']", "drops, repeats, moves or changes"),
        ("(m['content'] | length) ~ m['content']", "drops or changes text at message 0"),
    ],
)
def test_a_template_that_drops_or_changes_text(expression: str, reason: str) -> None:
    template = "<s>{% for m in messages %}{{ " + expression + " }}</s>{% endfor %}"
    tokenizer = build(template, ["<s>", "</s>"], "<s>", "</s>")
    with pytest.raises(UserError, match=reason):
        tokenise_chat(tokenizer, talk("Ha", "so</think>yes"))


def test_a_template_that_adds_to_the_last_content() -> None:
    tokenizer = build("{{ messages[0]['content'] ~ ('!' if 'H' in messages[0]['content']) }}", ["<s>"], None, "<s>")
    with pytest.raises(UserError, match=r"drops or changes text at message 0 \(user\)"):
        tokenise_chat(tokenizer, talk("Hi"))


def test_a_tokenizer_without_offsets_is_refused(tokenizers: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    with pytest.raises(UserError, match="gives no character offsets"):
        tokenise_chat(tokenizers["chatml"], talk("Hi"))


def test_ids_that_differ_from_those_of_the_template_are_refused(
    tokenizers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tokenizers["chatml"]
    apply = tokenizer.apply_chat_template

    def one_more(messages: Any, **options: Any) -> Any:
        result = apply(messages, **options)
        return [*result, 1] if options.get("tokenize") else result

    monkeypatch.setattr(tokenizer, "apply_chat_template", one_more)
    with pytest.raises(UserError, match=r"gives 6 ids .* gives 7 ids"):  # <|im_start|> user \n Hi <|im_end|> \n = 6
        tokenise_chat(tokenizer, talk("Hi"))


Part = tuple[str, int, int]


def by_hand(name: str, messages: list[dict[str, str]]) -> list[Part]:
    """(text, flags, turn) of the parts of the rendering, written down without the template."""
    bos = {"gemma": "<bos>", "llama3": "<|begin_of_text|>", "mistral": "<s>", "embedded": "<|bos|>"}.get(name, "")
    parts: list[Part] = [(bos, B, -1)]
    if name == "qwen":
        parts.append(("<|im_start|>system\nHi<|im_end|>\n", T, -1))
    for turn, message in enumerate(messages):
        role, content, flag = message["role"], message["content"], A if message["role"] == "assistant" else U
        if name == "mistral":
            # What follows a user, "[/INST]", opens the answer if there is one.
            answered = turn + (turn < len(messages) - 1)
            if flag == U:
                parts += [("[INST] ", T, turn), (content, U, turn), ("[/INST]", T, answered)]
            else:
                parts += [(" ", T, turn), (content, A, turn), ("</s>", T | A, turn)]
            continue
        if name in ("chatml", "qwen"):
            opening, end, rest = f"<|im_start|>{role}\n", "<|im_end|>", "\n"
        elif name == "gemma":
            gemma_role = "model" if role == "assistant" else role
            opening, content, end, rest = f"<start_of_turn>{gemma_role}\n", content.strip(), "<end_of_turn>", "\n"
        elif name == "llama3":
            opening, content = f"<|start_header_id|>{role}<|end_header_id|>\n\n", content.strip()
            end, rest = "<|eot_id|>", ""
        else:
            opening, end, rest = f"<|{role}|>", "<|end|>", ""
        closing = T | A if flag == A else T
        parts += [(opening, T, turn), (content, flag, turn), (end, closing, turn), (rest, T, turn)]
    return parts


SHARED = {name: TOKENIZERS[name]() for name in ("chatml", "qwen", "gemma", "llama3", "mistral", "embedded")}
CONTENTS = st.lists(
    st.sampled_from([" ", "\n", "\n\n", "Hi", " Hi", "a", "é", "日", "<|end|>", "<|im_end|>", "<end_of_turn>"])
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=3),
    max_size=5,
).map("".join)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(SHARED)), st.lists(CONTENTS, min_size=1, max_size=5))
def test_any_text_is_rebuilt_and_every_token_is_told(name: str, contents: list[str]) -> None:
    tokenizer, messages = SHARED[name], talk(*contents)
    chat, parts = tokenise_chat(tokenizer, messages), by_hand(name, messages)
    text = "".join(part for part, _, _ in parts)
    assert text == tokenizer.apply_chat_template(messages, tokenize=False)
    characters = [(flag, turn) for part, flag, turn in parts for _ in part]
    # The oracle finds each token's characters from its bytes: they follow one another without gap.
    lengths = [len(character.encode()) for character in text]
    owner = [index for index, length in enumerate(lengths) for _ in range(length)]
    specials, counts, at = set(tokenizer.all_special_ids), dict.fromkeys(range(-1, len(contents)), 0), 0
    alphabet = {tokenizer.convert_tokens_to_ids(piece) for piece in pre_tokenizers.ByteLevel.alphabet()}
    for token, flags, template_index, turn in zip(
        chat.token_ids.tolist(), chat.flags, chat.template_index, chat.turn, strict=True
    ):
        piece = tokenizer.convert_ids_to_tokens(token)
        assert token in specials or token in alphabet or piece.replace("Ġ", " ").replace("Ċ", "\n").isascii()
        covered = [characters[index] for index in sorted(set(owner[at : at + len(piece)]))]
        at += len(piece)
        expected = 0
        for flag, _ in covered:
            expected |= flag
        assert flags == expected != 0
        assert turn == covered[0][1]
        assert template_index == (counts[turn] if flags & T else -1)
        counts[turn] += bool(flags & T)
    assert at == len(owner)
