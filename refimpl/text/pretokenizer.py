"""Pre-tokenizers: how text is cut before BPE merges, by llama.cpp's name.

Step 3.5 Flash uses DeepSeek-V3's: three splits, each isolating its matches, then the byte
alphabet (the published `tokenizer.json`; `deepseek-v3` in llama.cpp's llama-vocab.cpp).
"""

from __future__ import annotations

from typing import Any

from refimpl.errors import CheckpointError

SPLITS: dict[str, tuple[str, ...]] = {
    "deepseek-v3": (
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
        r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*"
        r"|\s*[\r\n]+"
        r"|\s+(?!\S)"
        r"|\s+",
    ),
}


def pre_tokenizer_name(description: Any) -> str:
    """llama.cpp's name for the `pre_tokenizer` of a tokenizer.json; '' if it is not a known one."""
    if not isinstance(description, dict):
        return ""
    steps = description.get("pretokenizers")
    if not isinstance(steps, list) or not all(isinstance(s, dict) for s in steps):
        return ""
    patterns = tuple(_pattern(s) for s in steps if s.get("type") == "Split")
    others = [s for s in steps if s.get("type") != "Split"]
    isolated = all(
        s.get("behavior") == "Isolated" and not s.get("invert")
        for s in steps
        if s.get("type") == "Split"
    )
    byte_level = (
        len(others) == 1
        and others[0].get("type") == "ByteLevel"
        and not others[0].get("add_prefix_space")
        and not others[0].get("use_regex", True)
    )
    if not isolated or not byte_level or steps[-1] is not others[0]:
        return ""
    wanted = tuple(_plain(p) for p in patterns)
    for name, splits in SPLITS.items():
        if wanted == tuple(_plain(p) for p in splits):
            return name
    return ""


def _pattern(step: dict[str, Any]) -> str:
    pattern = step.get("pattern")
    found = pattern.get("Regex") if isinstance(pattern, dict) else None
    return found if isinstance(found, str) else ""


def _plain(pattern: str) -> str:
    """One spelling for escapes that mean the same."""
    return pattern.replace("\r", r"\r").replace("\n", r"\n").replace(r"\"", '"')


def build_pre_tokenizer(name: str, where: object) -> Any:
    """A `tokenizers` pre-tokenizer for llama.cpp's name of it.

    Raises:
        CheckpointError: the name is not known here.
    """
    from tokenizers import Regex, pre_tokenizers

    splits = SPLITS.get(name)
    if splits is None:
        raise CheckpointError(
            f"{where}: pre-tokenizer {name[:50]!r} is not known here, expected "
            f"{' or '.join(repr(n) for n in SPLITS)}; give token ids with --tokens instead of text"
        )
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in splits]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
