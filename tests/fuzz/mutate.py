"""Structure-aware damage to files: fields of binary headers, nodes of JSON trees, members of
archives, words of templates. Nothing here knows what a reader accepts."""

from __future__ import annotations

import hashlib
import io
import json
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any

from damage import NUMBERS, Files, damaged_bytes, near, number, scrambled
from damage_gguf import damaged_gguf

JSON_VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0.5, -0.0, 1e308, 1e-320, float("inf"), float("nan"), "", "x", "3,4",
    "\x1b[31m\n\r", "\ud800", "a" * 5000, "1" * 5000, [], {}, [[]], [None], {"a": None}, [0] * 3000,
    *NUMBERS,
)  # fmt: skip
HOSTILE_TEXT = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ messages.__class__.__init__.__globals__ }}",
    "{% for i in range(10**9) %}x{% endfor %}",
    "{% for a in messages %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}",
    "{{ 'x' * 10**9 }}", "{{ [0] * 10**9 }}", "{{ 9**9**9 }}", "{{ '%0999999999d' % 1 }}",
    "{{ 'x'.center(10**9) }}", "{{ 'a'|center(10**9) }}", "{{ ('a' * 10**6)|wordwrap(1) }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ lipsum(10**6) }}",
    "{% set ns = namespace(a=1) %}", "{{ raise_exception('no\nway') }}", "{{ 1 / 0 }}",
    "{{ messages[99] }}", "{{ undefined.attribute }}", "{% include 'x' %}", "{% extends 'x' %}",
    "{% import 'os' as os %}", "{{ tools|tojson(indent=10**9) }}", "{{ messages|map('x')|list }}",
    "{{ '{}'.format.__globals__ }}", "{{ '{0.__class__}'.format(messages) }}", "{{ (", "%}", "}}",
    "{#", "{% raw %}", "{{ strftime_now('%Y' * 10**6) }}", "{% for x in messages recursive %}"
    "{{ loop(messages) }}{% endfor %}", "\x00", "{{ '\\ud800' }}",
    "{{ self._TemplateReference__context }}",
)  # fmt: skip


def mutate(files: Files, rng: random.Random, pool: list[Files]) -> Files:
    """A copy of `files` with one to four changes; `pool` gives files to swap in."""
    made = dict(files)
    for _ in range(rng.choice((1, 1, 1, 1, 2, 2, 3, 4))):
        name = rng.choice(sorted(made))
        if rng.random() < 0.02:
            donors = [f[name] for f in pool if name in f]
            made[name] = rng.choice(donors) if donors else b""
            continue
        if rng.random() < 0.01 and len(made) > 1:
            del made[name]
            continue
        change = _STRUCTURED.get(name.rpartition(".")[2], damaged_bytes)
        if rng.random() < 0.12:
            change = damaged_bytes
        try:
            made[name] = change(made[name], rng)
        except (ValueError, IndexError, KeyError, struct.error, RecursionError, TypeError,
                zipfile.BadZipFile, NotImplementedError, EOFError, AttributeError,
                OverflowError, OSError):  # fmt: skip
            made[name] = damaged_bytes(made[name], rng)  # its structure is already destroyed
    return made


# ---- JSON

_INSERTS = (
    "[" * 100_000, '{"a":' * 5000, "9" * 5000, "\ufeff", "\x00", "NaN", "1e999", '"\\ud800"', ",",
    '"', "-", "/*", "\u2028", '"a":1,"a":2,',
)  # fmt: skip


def _nodes(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    items = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree[:50] if isinstance(tree, list) else ())
    )
    for key, value in items:
        if len(found) > 2000:
            break
        found += _nodes(value, (*path, key))
    return found


def damaged_tree(tree: Any, rng: random.Random) -> Any:
    """A parsed JSON value with one node changed (in place where it can be)."""
    path = rng.choice(_nodes(tree))
    if not path:
        return rng.choice(JSON_VALUES) if rng.random() < 0.2 else tree
    parent = tree
    for key in path[:-1]:
        parent = parent[key]
    key, old = path[-1], parent[path[-1]]
    kind = rng.randrange(9)
    if kind <= 2:
        parent[key] = rng.choice(JSON_VALUES)
    elif kind == 3 and type(old) in (int, float):
        parent[key] = rng.choice((old + 1, old - 1, -old, old * 2, float(old), str(old), [old]))
    elif kind == 4 and isinstance(old, list):
        parent[key] = rng.choice((old[:-1], old + old, old[::-1], [*old, old], old * 100))
    elif kind == 5:
        del parent[key]
    elif kind == 6 and isinstance(parent, dict):
        parent[rng.choice(("", "\n", "__metadata__", key + "x", "\x1b", "meta"))] = parent.pop(key)
    elif kind == 7:
        others = _nodes(tree)[1:]
        other = tree
        for step in rng.choice(others) if others else ():
            other = other[step]
        parent[key] = json.loads(json.dumps(other))
    else:
        parent[key] = rng.choice((old, [old], {"a": old}, str(old)))
    return tree


def damaged_json(data: bytes, rng: random.Random) -> bytes:
    """A changed node, or text that only a strict parser survives."""
    if rng.random() < 0.12:
        text = data.decode()
        at = rng.randrange(len(text) + 1)
        insert = rng.choice(_INSERTS)
        return (text[:at] + insert + text[at + rng.randrange(3) :]).encode("utf-8", "surrogatepass")
    tree = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        tree = damaged_tree(tree, rng)
    return json.dumps(tree).encode()


def damaged_lines(data: bytes, rng: random.Random) -> bytes:
    """JSON lines or plain text, by line."""
    lines = data.decode().split("\n")
    at = rng.randrange(len(lines))
    kind = rng.randrange(5)
    if kind <= 2 and lines[at][:1] in ("{", "["):
        lines[at] = damaged_json(lines[at].encode(), rng).decode("utf-8", "replace")
    elif kind == 3:
        lines[at : at + 1] = rng.choice(
            ([], [lines[at]] * 2, [lines[at] * 50], ["..."], ["[" * 9999])
        )
    else:
        lines[at] = damaged_bytes(lines[at].encode(), rng).decode("utf-8", "replace")
    return "\n".join(lines).encode()


# ---- safetensors and state files


def damaged_safetensors(data: bytes, rng: random.Random) -> bytes:
    """A changed header (tree, or length), or other tensor bytes."""
    n = int.from_bytes(data[:8], "little")
    raw, body = data[8 : 8 + n], data[8 + n :]
    kind = rng.randrange(10)
    if kind == 0:
        return near(n, 8, rng) + data[8:]
    if kind <= 2:
        return data[: 8 + n] + scrambled(body, rng)
    if kind == 3:
        return data[: 8 + n] + damaged_bytes(body, rng)
    tree = json.loads(raw)
    names = [k for k in tree if k != "__metadata__"]
    if kind <= 6:
        tree = damaged_tree(tree, rng)
    elif kind == 7:  # another view of the same bytes
        entry = tree[rng.choice(names)]
        entry["dtype"] = rng.choice(
            ("F32", "F16", "BF16", "U8", "I8", "I64", "F64", "F8_E4M3", "U32", "F4")
        )
    elif kind == 8:
        entry = tree[rng.choice(names)]
        shape = list(entry["shape"])
        rng.shuffle(shape)
        shape = rng.choice((shape, [*shape, 1], [1, *shape], shape[1:], [2**24] * 9))
        entry["shape"] = shape
    else:
        a, b = rng.choice(names), rng.choice(names)
        tree[a], tree[b] = tree[b], tree[a]
    raw = json.dumps(tree).encode()
    return len(raw).to_bytes(8, "little") + raw + body


def damaged_state(data: bytes, rng: random.Random) -> bytes:
    """A state file whose contents are changed and, mostly, whose checksum is right again."""
    if rng.random() < 0.1:
        return damaged_bytes(data[:48], rng) + data[48:]
    body = damaged_safetensors(data[48:], rng)
    digest = hashlib.sha256(body).digest() if rng.random() < 0.9 else data[16:48]
    return data[:16] + digest + body


# ---- NumPy archives

_DTYPES = (
    "'|O'", "'<f8'", "'<f4'", "'<i8'", "'|b1'", "'<U99999999'", "'>f4'", "'<f2'", "'|V8'", "'<U0'",
    "'<M8[ns]'", "'<c16'", "[('a', '<f4')]", "'|S4'", "7", "'x'",
)  # fmt: skip
_SHAPES = (
    "()", "(0,)", "(-1,)", "(2, -3)", f"({2**62},)", f"({2**40}, 0)", "(1, 1, 1)", "(3,)",
    f"({2**31}, {2**31}, 4)", "(True,)", "(1.5,)", "None", "(" + "1," * 40 + ")",
)  # fmt: skip


def damaged_npz(data: bytes, rng: random.Random) -> bytes:
    """A changed member, its header, its name, or the archive's own structure."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
    except Exception:  # damaged by an earlier change
        members = {}
    if not members or rng.random() < 0.15:
        out = bytearray(data)
        at = max(0, len(out) - rng.randrange(1, 600))
        out[at : at + 4] = number(rng, rng.choice((1, 2, 4)))
        return bytes(out)
    name = rng.choice(sorted(members))
    kind = rng.randrange(6)
    if kind <= 2:
        members[name] = damaged_npy(members[name], rng)
    elif kind == 3:
        members[rng.choice(("x.npy", "logits.npy", "meta.npy", "hidden.npy", "a/../b.npy", "README",
                            "prompt.npy", "moe_layers.npy"))] = members.pop(name)  # fmt: skip
    elif kind == 4:
        other = rng.choice(sorted(members))
        members[name], members[other] = members[other], members[name]
    else:
        del members[name]
    out_file = io.BytesIO()
    method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(out_file, "w", method) as archive:
        for key, content in members.items():
            archive.writestr(zipfile.ZipInfo(key), content, method)
    return out_file.getvalue()


def damaged_npy(data: bytes, rng: random.Random) -> bytes:
    """Another type, order or shape in the header of an .npy file, or other values."""
    n = int.from_bytes(data[8:10], "little")
    text, body = data[10 : 10 + n].decode("latin1"), data[10 + n :]
    kind = rng.randrange(5)
    if kind == 0:
        return data[: 10 + n] + scrambled(body, rng)
    if kind == 1:
        start, stop = text.index("'descr': ") + 9, text.index(", 'fortran_order'")
        new = rng.choice(_DTYPES)
    elif kind <= 3:
        start, stop = text.index("'shape': ") + 9, text.index(")") + 1
        new = rng.choice(_SHAPES)
    else:
        start, stop = text.index("'fortran_order': ") + 17, text.index(", 'shape'")
        new = rng.choice(("True", "1", "None", "'x'", "(" * 300))
    text = text[:start] + new + text[stop:]
    return data[:8] + len(text).to_bytes(2, "little") + text.encode("latin1") + body


# ---- templates


def damaged_template(data: bytes, rng: random.Random) -> bytes:
    """A hostile expression put in, or a tag cut out or doubled."""
    text = data.decode("utf-8", "replace")
    at = rng.randrange(len(text) + 1)
    kind = rng.randrange(4)
    if kind <= 1:
        return (text[:at] + rng.choice(HOSTILE_TEXT) + text[at:]).encode()
    if kind == 2:
        return (text[:at] + text[at + rng.randrange(1, 80) :]).encode()
    stop = at + rng.randrange(1, 200)
    return (text[:stop] + text[at:stop] * rng.choice((1, 2, 50)) + text[stop:]).encode()


_STRUCTURED: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "gguf": damaged_gguf,
    "json": damaged_json,
    "jsonl": damaged_lines,
    "txt": damaged_lines,
    "safetensors": damaged_safetensors,
    "state": damaged_state,
    "npz": damaged_npz,
    "npy": damaged_npy,
    "jinja": damaged_template,
}
