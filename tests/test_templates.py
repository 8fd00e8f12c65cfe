"""Do chat templates give what transformers makes of them, and within bounds?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import save_tokenizer, tricky_bpe

from graphengine.errors import RequestError
from graphengine.templates import MAX_CHARS, ChatTemplate
from graphengine.tokenizer import Tokenizer

CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": " be  <kind> "},
    {"role": "user", "content": "a & b", "tags": ["é", {"k": 1}]},
    {"role": "assistant", "content": "yes\nno"},
    {"role": "user", "content": "7"},
]
# What chat templates in use are made of.
SOUND = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "special tokens": "{{ bos_token }}{{ messages[1].content | trim }}{{ eos_token ~ 1 ~ none }}",
    "blocks on lines": "{% for m in messages %}\n    {% if loop.last %}\n  x{{ loop.index0 % 2 }}\n"
    "    {%- endif %}\n{% endfor %}\n",
    "loop controls": "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}"
    "{{ m.role }}{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{% set x = m.role %}{{ x }}"
    "{{ loop.index }}{% endgeneration %}{{ x }}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0, s='') %}{% for m in messages[::-1] %}"
    "{% set ns.n = ns.n + m.content | length %}{% set ns.s = ns.s ~ m.role[:2] %}{% endfor %}"
    "{{ ns.n }}{{ ns.s }}",
    "macro": "{% macro say(m, n=2) %}[{{ m.role * n }}{{ caller() if caller }}]{% endmacro %}"
    "{% for m in messages %}{{ say(m) }}{% endfor %}"
    "{% call say(messages[0], n=1) %}{{ messages | length }}{% endcall %}",
    "json": "{{ messages | tojson }}{{ messages[1] | tojson(indent=2, ensure_ascii=true) }}"
    "{{ messages[1].tags | tojson(separators=(',', ':'), sort_keys=true) }}",
    "filters": "{{ messages | map(attribute='role') | unique | join(', ') }}"
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
    "{{ 'a' | center(5) }}{{ '%s-%03d' | format('x', 7) }}{{ messages[2].content | indent(3) }}"
    "{{ messages[0].content | replace('kind', 'good') | e }}{{ [3, 1] | sort }}{{ 'x' | upper }}",
    "methods": "{{ messages[0].content.strip().split() }}{{ ', '.join(['a', 'b']) }}"
    "{{ '{:>5}|{}'.format(2, 1700000000000) }}{{ 'ab'.replace('a', 'c').ljust(4) }}|"
    "{{ '100%% %5d' % 3 }}{{ messages[1].items() | list | length }}{{ 'a'.startswith('a') }}",
    "numbers": "{{ 2 ** 10 }} {{ 7 // 2 }} {{ 2 ** 0.5 }} {{ [1] * 3 + [2] }} {{ -3 % 2 }}",
    "undefined": "{{ nothing }}{{ tools is none }}{{ documents is none }}{{ x is defined }}"
    "{{ strftime_now('%Y') }}{% if tools %}never{% endif %}{{ range(3) | list }}{{ dict(a=1) }}",
    "recursive loop": "{% for x in [1, [2, [3]]] recursive %}"
    "{{ loop(x) if x is iterable else x }}{% else %}none{% endfor %}",
}


def tokenizer(path: Path, template: str) -> Tokenizer:
    return Tokenizer(save_tokenizer(tricky_bpe(), path, chat_template=template))


@pytest.mark.parametrize("template", SOUND.values(), ids=SOUND)
def test_sound_template_gives_what_transformers_makes_of_it(tmp_path: Path, template: str) -> None:
    ours = tokenizer(tmp_path, template)
    theirs = ours.hf.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert ours._render_chat(CHAT) == theirs
    assert ours._render_chat(CHAT) == theirs, "once more, without compiling"


def test_template_of_several_is_the_default_one(tmp_path: Path) -> None:
    ours = tokenizer(tmp_path, "{{ 1 }}")
    ours.hf.chat_template = {"tool_use": "t", "default": "d{{ messages[0].role }}"}
    assert ours._render_chat(CHAT) == "dsystem"


HOSTILE = {
    "product": "{{ 'a' * 10**10 }}",
    "format": "{{ '%1000000000s' % 'a' }}",
    "format with two": "{{ '%*.*f' % (1000000000, 1000000000, 2.5) }}",
    "format filter": "{{ '%1000000000s' | format('a') }}",
    "format method": "{{ '{:1000000000}'.format(1) }}",
    "format method with a width": "{{ '{:{}}'.format(1, 1000000000) }}",
    "many widths": "{{ ('%1000000s' * 1000) % (('a',) * 1000) }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "center": "{{ 'a' | center(10000000000) }}",
    "zfill": "{{ 'a'.zfill(10000000000) }}",
    "tabs": "{{ ('\t' * 1000000).expandtabs(1000000) }}",
    "indent": "{{ ('\n' * 1000000) | indent(1000000, blank=true) }}",
    "json": "{{ [1] | tojson(indent=10000000000) }}",
    "replace": "{{ ('a' * 1000000) | replace('a', 'b' * 1000000) }}",
    "join": "{{ ('a' * 1000000).join(['b'] * 1000000) }}",
    "batch": "{{ [1] | batch(10000000000, 2) | list }}",
    "lipsum": "{{ lipsum(n=10000000) }}",
    "concatenation": "{% set ns = namespace(x='a') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "sum": "{% set ns = namespace(x='a') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "list": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "silent loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
    "{% endfor %}",
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "captured loops": "{% set x %}{% for i in range(99999) %}{% for j in range(99999) %}x"
    "{% endfor %}{% endfor %}{% endset %}",
    "macros": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}"
    "{{ m(100) }}",
    "no template": "{% for i in x %}" * 25 + "{% endfor %}" * 25,
    "brackets": "{{ " + "(" * 3000 + ")" * 3000 + " }}",
}


@pytest.mark.parametrize("template", HOSTILE.values(), ids=HOSTILE)
def test_hostile_template_refuses_the_request_soon(tmp_path: Path, template: str) -> None:
    """Some would take all memory, or go on for hours."""
    with pytest.raises(RequestError, match=r"the chat template refuses the messages: .") as caught:
        tokenizer(tmp_path, template).encode_chat(CHAT)
    assert "\n" not in str(caught.value)


def test_long_text_is_within_the_bounds() -> None:
    text = "x" * MAX_CHARS
    template = ChatTemplate("{{ messages[0].content | trim }}")
    assert template.render({"messages": [{"content": text}]}) == text
