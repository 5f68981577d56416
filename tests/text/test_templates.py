"""Chat templates within limits: real ones render exactly as transformers renders them, and bombs are refused quickly."""

from __future__ import annotations

import time
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from crossdiff.errors import UserError
from crossdiff.text.chat import chat_prompt, front_ids
from crossdiff.text.templates import TemplateLimit, limited

TURNS = [
    {"role": "system", "content": "Be <brief> & 'kind'."},
    {"role": "user", "content": "  Grüße,\n\tein Test 100%  "},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nJa — 你好"},
    {"role": "user", "content": "{{ no }} {% template %}"},
]
PLAIN = [
    "{{ messages | tojson }}|{{ messages | tojson(indent=2) }}|{{ messages[0] }}",
    "{%- for m in messages -%}{{ '<|' ~ m.role ~ '|>' + m['content'] | trim + eos_token }}{%- endfor -%}",
    "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ loop.index0 }}{{ m.role|upper }}\n{% endfor %}",
    "{%- set ns = namespace(text='', n=0) -%}{%- for m in messages[::-1] -%}{%- set ns.text = ns.text + m.content -%}"
    "{%- set ns.n = ns.n + 1 -%}{%- endfor -%}{{ ns.text }}{{ ns.n }}",
    "{% for m in messages if m.role != 'system' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}none{% endfor %}",
    "{% macro show(m, end='!') %}{{ m.content.split('</think>')[-1].lstrip('\\n') }}{{ end }}{% endmacro %}"
    "{% for m in messages %}{{ show(m) }}{{ show(m, end='?') }}{% endfor %}",
    "{% set roles = messages | map(attribute='role') | list %}{{ roles }}{{ roles | join(', ') }}{{ ['a', roles[0]] }}"
    "{{ {'x': roles, 'y': [1, 2.5, none, true]} }}"
    "{{ (roles[0], 1) }}{% for a, b in [(roles[0], 2)] %}{{ a }}{{ b }}{% endfor %}",
    "{{ '%s has %05d and %.2f' % ('x', 7, 1.5) }}{{ '{:>6}|{x!r}'.format('a', x='b') }}{{ '-' * 20 }}{{ 2 ** 10 }}{{ 7 % 4 }}",
    "{{ messages[1].content | replace('T', 'tt') | indent(4, true) | wordwrap(9) }}{{ 'x' | center(9) }}{{ messages|length }}",
    "{% macro wrapped() %}[{{ caller('in') }}]{% endmacro %}{% call(x) wrapped() %}{{ x }}{% endcall %}",
    "{{ messages|selectattr('role', 'equalto', 'user')|map(attribute='content')|join('|') }}{{ range(5)|list }}"
    "{{ dict(a=1)|items|list }}{{ messages|groupby('role')|map('first')|list }}{{ 'a,b'.split(',')|batch(1)|list }}",
    "{{ strftime_now('%%') }}{{ messages[0].content is string }}{{ undefined_name is defined }}{{ missing }}{{ none or 'x' }}",
    "{% filter upper %}{{ messages[0].content }}{% endfilter %}{% set x %}block{{ 1 }}{% endset %}{{ x }}{{ x|length }}",
    "{% if tools is defined and tools %}{{ tools }}{% endif %}{{ bos_token }}{% if add_generation_prompt %}A:{% endif %}",
    "{{ [1, 2] + [3] }}{{ 'a' ~ 1 ~ none ~ [2] }}{{ messages[0].keys()|list }}{{ 'ab'|list|reverse|join }}{{ 'A'|safe ~ '<' }}",
]


def tokenizer(template: str) -> Any:
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "<s>": 1, "</s>": 2}, unk_token="a")),
        bos_token="<s>",
        eos_token="</s>",
    )
    made.chat_template = template
    made.name_or_path = "lab/model"
    return made


@pytest.mark.parametrize("template", PLAIN)
@pytest.mark.parametrize("prompt", [False, True])
def test_a_template_renders_as_in_transformers(template: str, prompt: bool) -> None:
    made, options = tokenizer(template), {"tokenize": False, "add_generation_prompt": prompt}
    expected = made.apply_chat_template(TURNS, **options)
    before = chat_template_utils._compile_jinja_template
    with limited("lab/model", 100):
        assert chat_template_utils._compile_jinja_template is not before
        assert made.apply_chat_template(TURNS, **options) == expected
    assert chat_template_utils._compile_jinja_template is before


def test_the_exception_of_a_template_is_its_own() -> None:
    with pytest.raises(UserError, match="cannot render a conversation with the roles user: only two") as caught:
        chat_prompt(tokenizer("{{ raise_exception('only two') }}"), [{"role": "user", "content": "a"}])
    assert not isinstance(caught.value, TemplateLimit)


DOUBLED = "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = BODY %}{% endfor %}{{ ns.x|length }}"
BOMBS = {
    "constant": "{{ 'a' * 3000000000 }}",
    "variable": "{{ messages[0].content * 10**9 }}",
    "power": "{{ 10 ** (10 ** 9) }}",
    "range": "{{ range(10**9)|list }}",
    "loops": "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
    "text in loops": "{% for a in range(99999) %}" + "x" * 10_000 + "{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "branching": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "branching calls": "{% macro f(n) %}{% if n %}{% set a = f(n - 1) ~ f(n - 1) %}{% endif %}{% endmacro %}{{ f(60) }}",
    "printf": "{{ '%1000000000s' % 'x' }}",
    "printf star": "{{ '%*s' % (1000000000, 'x') }}",
    "printf filter": "{{ '%1000000000s' | format('x') }}",
    "format": "{{ '{:>1000000000}'.format('x') }}",
    "nested format": "{{ '{:>{w}}'.format('x', w=1000000000) }}",
    "format map": "{{ '{x:>1000000000}'.format_map({'x': 1}) }}",
    "center": "{{ 'x'|center(10**9) }}",
    "method": "{{ 'x'.ljust(10**9) }}",
    "zfill": "{{ 'x'.zfill(1000000000) }}",
    "tabs": "{{ ('\t' * 1000).expandtabs(1000000) }}",
    "indent": "{{ ('\n' * 1000000)|indent(1000000, true, true) }}",
    "tojson": "{{ range(1000)|list|tojson(indent=1000000) }}",
    "separators": "{{ range(10000)|list|tojson(separators=('x' * 100000, ':')) }}",
    "replace": "{{ ('a' * 100000)|replace('a', 'b' * 100000) }}",
    "replace method": "{{ ('a' * 100000).replace('', 'b' * 100000) }}",
    "join": "{{ range(100000)|join('b' * 100000) }}",
    "join method": "{{ ('b' * 100000).join(['a'] * 100000) }}",
    "join a generator": "{{ ('b' * 100000).join(range(100000)|map('string')) }}",
    "map": "{{ range(100000)|map('center', 100000)|join }}",
    "translate": "{{ ('a' * 100000).translate({97: 'b' * 100000}) }}",
    "batch": "{{ [1]|batch(10**9, 0)|list }}",
    "slice": "{{ [1]|slice(10**9)|list }}",
    "round": "{{ 1|round(10**9, 'ceil') }}",
    "wordwrap": "{{ ('a' * 100000)|wordwrap(1, true, 'b' * 100000) }}",
    "bytes": "{{ 'x'.encode().ljust(10**9) }}",
    "to_bytes": "{{ (1).to_bytes(10**9, 'big') }}",
    "lists": "{{ ([1] * 10**9)|length }}",
    "add": DOUBLED.replace("BODY", "ns.x + ns.x"),
    "concat": DOUBLED.replace("BODY", "ns.x ~ ns.x"),
    "list of lists": DOUBLED.replace("BODY", "[ns.x, ns.x]").replace("|length", ""),
    "dict of dicts": DOUBLED.replace("BODY", "{'a': ns.x, 'b': ns.x}").replace("|length", "|tojson"),
    "calls of dict": DOUBLED.replace("BODY", "dict(a=ns.x, b=ns.x)").replace("|length", "|string"),
    "namespaces": DOUBLED.replace("BODY", "namespace(a=ns.x, b=ns.x)").replace("|length", ""),
    "views": DOUBLED.replace("BODY", "{'a': ns.x, 'b': ns.x}.items()").replace("|length", ""),
    "numbers": "{% set ns = namespace(x=3) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "set block": DOUBLED.replace("{% set ns.x = BODY %}", "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}"),
    "nonsense": "{{ lipsum(100000) }}",
    "nested": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_that_exceeds_its_limits_is_refused_quickly(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crossdiff.text.chat.limited", lambda name, length: limited(name, length, seconds=0.5))
    started = time.monotonic()
    with pytest.raises(UserError, match=r"the chat template (of lab/model|cannot render)"):
        chat_prompt(tokenizer(BOMBS[name]), [{"role": "user", "content": "a"}])
    assert time.monotonic() - started < 5


def test_the_refusal_says_what_happened_and_is_not_taken_for_a_damaged_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crossdiff.text.chat.limited", lambda name, length: limited(name, length, seconds=0.1))
    with pytest.raises(
        TemplateLimit, match=r"^the chat template of lab/model did not finish within 0\.1 s, for a conversation"
    ):
        front_ids(tokenizer(BOMBS["loops"]))
    monkeypatch.setattr("crossdiff.text.chat.limited", limited)
    with pytest.raises(TemplateLimit, match=r"makes more than 20,000,500 characters"):
        chat_prompt(tokenizer(BOMBS["variable"]), [{"role": "user", "content": "a"}])
