"""Which chat template to write with: the checkpoint's, a file, or a built-in one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refimpl.errors import CheckpointError, InputError
from refimpl.text.builtin import PLAIN, PLAIN_STOPS, STEP
from refimpl.text.template import MAX_TEMPLATE_CHARS
from refimpl.text.tokenizer import Tokenizer

BUILTIN = {"plain": PLAIN, "step": STEP}
_KEY = "tokenizer.chat_template"


@dataclass(frozen=True)
class Found:
    """A template.

    Attributes:
        source: its Jinja text.
        where: for messages.
        stops: texts that end an answer.
        note: what the user should know about the choice; "" if nothing.
    """

    source: str
    where: str
    stops: tuple[str, ...] = ()
    note: str = ""


def find_template(
    wanted: str | None, checkpoint: Path, tokenizer: Tokenizer, with_tools: bool = False
) -> Found:
    """The template to use.

    Args:
        wanted: 'plain' or 'step' (built in), a file, or the name of one of the checkpoint's
            templates; None for the checkpoint's own ('tool_use' where there are tools and it has
            one), or plain text if it has none.

    Raises:
        InputError: there is no such template.
        CheckpointError: the checkpoint's templates cannot be read.
    """
    if wanted in BUILTIN:
        return _builtin(wanted)
    if wanted is not None and Path(wanted).is_file():
        return Found(_text(Path(wanted)), wanted)
    own = None if checkpoint.is_dir() else tokenizer.chat_template
    if wanted is None and not with_tools and own is not None:
        return Found(own, str(checkpoint))  # a GGUF file need not be read again for it
    have = checkpoint_templates(checkpoint)
    if wanted is None:
        wanted = "tool_use" if with_tools and "tool_use" in have else "default"
        if wanted not in have:
            return _builtin(
                "plain",
                "the checkpoint has no chat template (it may be a base model): the conversation "
                "is plain text, as with --template plain; --template step or FILE changes that",
            )
    if wanted not in have:
        names = ", ".join(sorted([*BUILTIN, *have]))
        raise InputError(f"--template {wanted}: no such file or template; there are: {names}")
    return Found(
        have[wanted], f"{checkpoint} ({wanted})" if wanted != "default" else str(checkpoint)
    )


def _builtin(name: str, note: str = "") -> Found:
    return Found(BUILTIN[name], f"template {name}", PLAIN_STOPS if name == "plain" else (), note)


def checkpoint_templates(path: Path) -> dict[str, str]:
    """All templates of a checkpoint by name, 'default' among them.

    A GGUF file holds `tokenizer.chat_template` and, by name, `tokenizer.chat_template.NAME`; a
    Hugging Face folder chat_template.jinja, additional_chat_templates/NAME.jinja, and in
    tokenizer_config.json a text or a list of names and texts. As in transformers, a file goes
    before tokenizer_config.json.

    Raises:
        CheckpointError: a file is damaged or far too large.
    """
    if path.is_dir():
        found = _of_config(path / "tokenizer_config.json")
        for file in sorted(path.glob("additional_chat_templates/*.jinja")):
            found[file.stem] = _text(file)
        if (path / "chat_template.jinja").is_file():
            found["default"] = _text(path / "chat_template.jinja")
        return found
    from refimpl.checkpoint.gguf_read import read_gguf

    return _of_metadata(read_gguf(path).metadata)


def _of_metadata(metadata: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for key, value in metadata.items():
        if isinstance(value, str) and (key == _KEY or key.startswith(_KEY + ".")):
            found[key.removeprefix(_KEY).removeprefix(".") or "default"] = value
    return found


def _of_config(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(_text(path, 16 * MAX_TEMPLATE_CHARS))
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: not valid JSON ({str(error)[:100]})") from None
    given = config.get("chat_template") if isinstance(config, dict) else None
    if isinstance(given, str):
        return {"default": given}
    entries = given if isinstance(given, list) else []
    return {
        e["name"]: e["template"]
        for e in entries
        if isinstance(e, dict) and isinstance(e.get("name"), str)
        and isinstance(e.get("template"), str)
    }  # fmt: skip


def _text(path: Path, limit: int = 4 * MAX_TEMPLATE_CHARS) -> str:
    size = path.stat().st_size
    if size > limit:
        raise CheckpointError(f"{path}: {size} bytes, at most {limit} are read")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8"
        ) from None
