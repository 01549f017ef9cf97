"""Chat templates: what they may do, what they may not, and what they can be told."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from refimpl.errors import CheckpointError
from refimpl.text import template_child
from refimpl.text.template import MAX_TEMPLATE_CHARS, ChatTemplate, Limits

SMALL = Limits(cpu_s=0.3, wall_s=20.0, memory_bytes=64 << 20, output_chars=100_000)


def render(source: str, limits: Limits = SMALL, **variables: object) -> str:
    with ChatTemplate(source, "model.gguf", {"bos_token": "<s>"}, limits) as template:
        return template.render(messages=[{"role": "user", "content": "hi"}], **variables)


WORKS = {
    "{{ bos_token }}{{ messages[0].content }}": "<s>hi",
    "{{ {'a': 'é<', 'b': [1]} | tojson }}": '{"a": "é<", "b": [1]}',
    "{{ {'é': 1} | tojson(ensure_ascii=True) }}": '{"\\u00e9": 1}',
    "{{ ('{\"a\": 2}' | fromjson).a }}": "2",
    "{% set ns = namespace(n=0) %}{% for x in [1, 2] %}{% set ns.n = ns.n + x %}{% endfor %}"
    "{{ ns.n }}": "3",
    "{% for x in [1, 2, 3] %}{% if x == 2 %}{% break %}{% endif %}{{ x }}{% endfor %}": "1",
    "{% generation %}{{ 1 }}{% endgeneration %}": "1",
    "{{ strftime_now('%Y') | length }}": "4",
    "a\n  {% if true %}\nb\n  {% endif %}\n": "a\nb\n",
}


@pytest.mark.parametrize("source", WORKS)
def test_what_templates_of_transformers_may_use(source: str) -> None:
    assert render(source) == WORKS[source]


ESCAPES = [
    # The payloads of CVE-2024-34359 and CVE-2026-5760: from any object to the os module.
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}",
    "{{ self.__init__.__globals__.__builtins__.__import__('os').system('id') }}",
    "{{ raise_exception.__globals__.os }}",
    "{{ strftime_now.__closure__[0] }}",
    "{{ ''['__class__'].__mro__ }}",
    "{{ (messages | attr('__class__')).__mro__ }}",
    "{{ '{0.__class__.__init__}'.format(messages) | length + 1 / 0 }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(a=1) }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{{ namespace(a=1)._Namespace__attrs.a }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{{ lipsum(100000) }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_the_way_out_is_closed(source: str) -> None:
    with pytest.raises(CheckpointError, match=r"^model.gguf: the chat template [^\n]+$"):
        render(source)


GREEDY = {
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": "stopped",
    "{{ 9 ** 99999999 }}": "stopped",
    "{{ 'x' * 10 ** 9 }}": "needs more than 64 MiB",
    "{{ 'x' | center(10 ** 9) }}": "needs more than 64 MiB",
    "{{ '%1000000000d' % 1 }}": "needs more than 64 MiB",
    "{{ '{:1000000000}'.format(1) }}": "needs more than 64 MiB",
    "{{ [1] | tojson(indent=10 ** 9) }}": "needs more than 64 MiB",
    "{% set ns = namespace(l=[0]) %}{% for i in range(99) %}{% set ns.l = ns.l + ns.l %}"
    "{% endfor %}": "needs more than 64 MiB",
    "{{ range(10 ** 9) }}": "Range too big",
    "{% for a in range(99999) %}{{ 'aaaaaaaaaa' }}{% endfor %}": "exceeds 100000 characters",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "calls itself without end",
    "{{ " + "(" * 5000: "calls itself without end|not valid Jinja",
}


@pytest.mark.parametrize("source", GREEDY, ids=lambda s: s[:40])
def test_time_memory_and_text_are_limited(source: str) -> None:
    began = time.process_time()
    with pytest.raises(CheckpointError, match=GREEDY[source]) as caught:
        render(source)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert time.process_time() - began < 5


def test_mistakes_and_refusals_are_sentences_without_control_characters() -> None:
    with pytest.raises(CheckpointError, match=r"not valid Jinja \(line 2: "):
        render("\n{% if %}")
    with pytest.raises(CheckpointError, match=r"refuses this conversation .*roles must alternate"):
        render("{{ raise_exception('roles must\nalternate') }}")
    with pytest.raises(CheckpointError) as caught:
        render("{{ raise_exception('\x1b[2J' + 'x' * 9999) }}")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400
    with pytest.raises(CheckpointError, match="has no attribute 'y'"):
        render("{{ messages.y.z }}")
    with pytest.raises(CheckpointError, match="at most"):
        ChatTemplate("x" * (MAX_TEMPLATE_CHARS + 1), "model.gguf")


def test_after_an_accident_the_next_rendering_works() -> None:
    with ChatTemplate("{{ 'x' * n }}", "model.gguf", limits=SMALL) as template:
        assert template.render(n=3) == "xxx"
        with pytest.raises(CheckpointError):
            template.render(n=10**9)
        assert template.render(n=2) == "xx"


def test_a_deadline_holds_where_processor_time_is_not_limited() -> None:
    """As on systems without such limits."""
    limits = Limits(cpu_s=0, wall_s=1.0)
    with pytest.raises(CheckpointError, match="seems not to end"):
        render("{{ 9 ** 99999999 }}", limits)


@pytest.mark.skipif(sys.platform == "win32", reason="no such limits there")
def test_behind_the_sandbox_there_is_nothing_to_open_or_start(tmp_path: Path) -> None:
    """What code could do that got out: Python itself, in the confined process."""
    attempts = {
        "read": "open('/etc/hostname')",
        "write": f"open({str(tmp_path / 'x')!r}, 'w')",
        "connect": "__import__('socket').socket()",
        "program": "__import__('subprocess').check_output(['/bin/sh', '-c', 'echo out'])",
        "memory": "len(bytearray(1 << 30))",
    }
    code = (
        "import json, socket, subprocess, sys, runpy\n"
        f"child = runpy.run_path({template_child.__file__!r})\n"
        "child['environment'](); child['confine'](64 << 20)\n"
        "for name, attempt in json.loads(sys.argv[1]).items():\n"
        "    try: eval(attempt); print(name, 'worked')\n"
        "    except (OSError, MemoryError, subprocess.SubprocessError): print(name, 'refused')\n"
    )
    run = [sys.executable, "-c", code, json.dumps(attempts)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=60)
    assert done.stdout.split("\n")[:-1] == [f"{name} refused" for name in attempts], done.stderr


def test_a_kept_child_renders_a_long_conversation_quickly() -> None:
    """Bounded loosely, for machines are busy: a process for each rendering would not pass."""
    messages = [{"role": "user", "content": "x" * 100}] * 200
    source = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    with ChatTemplate(source, "model.gguf") as template:
        template.render(messages=messages)
        child = template._child
        for _ in range(20):
            template.render(messages=messages)
        assert template._child is child
