"""The process in which chat templates are rendered: `python -I template_child.py`.

Reads one JSON object per line from stdin and answers with one per line on stdout; imports nothing
of this package. The first line is {"path": sys.path, "memory_bytes": int}. Every other is
{"source": str, "variables": {..}, "cpu_s": float, "output_chars": int}; the answer is {"text": str}
or {"error": kind, "detail": str}, or the process is gone.

Before the first template the process gives up what a template has no use for: opening files or
sockets, starting programs, memory beyond the limit. The time limit is one of processor time, kept
by the kernel: it also ends a single long operation, which no check between operations could.
"""

import contextlib
import json
import signal
import sys
from datetime import datetime
from typing import Any

ROOM_FOR_THE_PROCESS = 64 << 20  # what Python needs beside the template's memory


def environment() -> Any:
    """The jinja2 environment in which transformers renders chat templates (its settings, filters
    and functions), without jinja2's own `lipsum`."""
    import jinja2
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """`{% generation %}` marks an assistant's text for training; here it changes nothing."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class Names(Namespace):
        """`namespace()` without names that Python itself uses."""

        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise SecurityError(f"namespace attribute {name!r} begins with an underscore")
            super().__setitem__(name, value)

    def raise_exception(message: Any) -> None:
        raise TemplateError(str(message))

    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    env.filters["tojson"] = _to_json
    env.filters["fromjson"] = json.loads
    del env.globals["lipsum"]
    env.globals.update(
        raise_exception=raise_exception,
        strftime_now=lambda form: datetime.now().strftime(form),
        namespace=Names,
    )
    # Whatever is imported late is imported now, while files can still be opened.
    with contextlib.suppress(jinja2.TemplateError):
        env.from_string(
            "{% for x in [1] %}{{ strftime_now('%Y') }}{{ x.y.z }}{% endfor %}"
        ).render()
    return env


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson` as transformers has it: no HTML escapes."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def confine(memory_bytes: int) -> None:
    """Give up files, programs and memory beyond `memory_bytes`, as far as the system can."""
    try:
        import resource
    except ImportError:  # Windows has no such limits; the parent's deadline remains
        return

    def limit(kind: int, value: int) -> None:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (value, value))

    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_FSIZE, 0)
    limit(resource.RLIMIT_NPROC, 0)
    limit(resource.RLIMIT_AS, used_bytes() + ROOM_FOR_THE_PROCESS + memory_bytes)
    limit(resource.RLIMIT_NOFILE, 0)  # what is open stays open


def used_bytes() -> int:
    """Address space in use; a guess where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            import resource

            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 256 << 20


def clock(seconds: float) -> None:
    """End this process after so much more processor time; 0 stops the clock."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def render(env: Any, request: dict[str, Any]) -> str:
    """The text of a template, at most `output_chars` long."""
    parts: list[str] = []
    left = request["output_chars"]
    for part in compiled(env, request["source"]).generate(**request["variables"]):
        left -= len(part)
        if left < 0:
            raise OverflowError
        parts.append(part)
    return "".join(parts)


def compiled(env: Any, source: str, held: dict[str, Any] = {}) -> Any:  # noqa: B006
    """The compiled template; the last one is kept."""
    if source not in held:
        held.clear()
        held[source] = env.from_string(source)
    return held[source]


def answer(env: Any, request: dict[str, Any]) -> dict[str, str]:
    """What to write for a request."""
    from jinja2 import TemplateSyntaxError
    from jinja2.exceptions import SecurityError

    clock(request["cpu_s"])
    try:
        return {"text": render(env, request)}
    except TemplateSyntaxError as error:
        return {"error": "syntax", "detail": f"line {error.lineno}: {error.message}"}
    except SecurityError as error:
        return {"error": "security", "detail": str(error)}
    except OverflowError as error:
        return {"error": "failed" if str(error) else "size", "detail": str(error)}
    except MemoryError:
        return {"error": "memory", "detail": ""}
    except RecursionError:
        return {"error": "recursion", "detail": ""}
    except Exception as error:  # a template can raise anything; its author is told what
        return {"error": "failed", "detail": f"{type(error).__name__}: {error}"[:500]}
    finally:
        clock(0)


def main() -> None:
    """Serve until stdin ends."""
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    first = json.loads(source.readline())
    sys.path[:] = first["path"]
    env = environment()
    confine(first["memory_bytes"])
    for line in source:
        made = json.dumps(answer(env, json.loads(line)))
        sink.write(made.encode() + b"\n")
        sink.flush()


if __name__ == "__main__":
    main()
