"""From a path and a few choices to a model that can run and, mostly, a tokenizer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np

from refimpl.backend import Backend
from refimpl.checkpoint.open import open_checkpoint
from refimpl.checkpoint.source import WeightSource
from refimpl.errors import InputError
from refimpl.text.tokenizer import Tokenizer, tokenizer_of

EMBEDDED = "mini"
EMBEDDED_FILE = "step-mini-q4_0.gguf"
DTYPES = ("float32", "float64", "bf16")
BACKENDS = ("reference", "engine")
"""Backends of this build; the first is the default."""


@dataclass(frozen=True)
class OpenModel:
    """A model ready to run.

    Attributes:
        path: where it lies.
        backend: what runs it.
        tokenizer: None where the checkpoint has none.
        warnings: notes for the user, one sentence each.
    """

    path: Path
    backend: Backend
    tokenizer: Tokenizer | None
    warnings: tuple[str, ...]


def model_path(model: str | Path) -> Path:
    """The path of a model: 'mini' is the embedded one, anything else is a path already.

    Raises:
        InputError: this installation has no embedded model.
    """
    if str(model) != EMBEDDED:
        return Path(model)
    found = Path(str(resources.files("refimpl") / "mini" / EMBEDDED_FILE))
    if not found.is_file():
        raise InputError(
            f"this installation has no embedded model (mini/{EMBEDDED_FILE} is not in the "
            "package); name a checkpoint with --model PATH"
        )
    return found


def open_backend(
    source: WeightSource,
    name: str = "reference",
    dtype: str = "float32",
    threads: int | None = None,
) -> Backend:
    """A backend over an open checkpoint.

    Args:
        name: one of `BACKENDS`.
        dtype: one of `DTYPES`: the arithmetic of the reference; the engine knows float32 only.
        threads: threads of an engine; those of the reference are `limited_threads`.

    Raises:
        InputError: this build has no such backend, or the engine cannot run the checkpoint.
    """
    if name not in BACKENDS:
        raise InputError(
            f"this build has no backend '{name}'; use --backend {' or '.join(BACKENDS)}"
        )
    if name == "engine":
        return _open_engine(source, dtype, threads)
    from refimpl.reference.model import ReferenceModel

    return ReferenceModel(source, dtype)


def _open_engine(source: WeightSource, dtype: str, threads: int | None) -> Backend:
    from refimpl.checkpoint.stored import StoredSource
    from refimpl.engine.model import EngineModel

    if dtype != "float32":
        raise InputError(f"--dtype {dtype} belongs to the reference; the engine has float32 only")
    if not isinstance(source, StoredSource):
        raise InputError("the engine runs checkpoint files only; use --backend reference")
    return EngineModel(source, threads)


@contextlib.contextmanager
def open_model(
    model: str | Path,
    backend: str = "reference",
    dtype: str = "float32",
    threads: int | None = None,
) -> Iterator[OpenModel]:
    """Open a model by name or path, for as long as the context lasts.

    Raises:
        InputError: no such backend, or no embedded model.
        CheckpointError, ConfigError: the checkpoint cannot be used.
    """
    path = model_path(model)
    with limited_threads(threads), contextlib.closing(open_checkpoint(path)) as source, quiet():
        yield OpenModel(
            path=path,
            backend=open_backend(source, backend, dtype, threads),
            tokenizer=tokenizer_of(path, source.metadata or None),
            warnings=source.warnings,
        )


def quiet() -> contextlib.AbstractContextManager[object]:
    """No warnings of NumPy about overflow: where a damaged checkpoint leads to infinite values,
    sampling and golden files refuse them with a sentence."""
    return np.errstate(over="ignore", invalid="ignore", divide="ignore")


@contextlib.contextmanager
def limited_threads(threads: int | None) -> Iterator[None]:
    """Limits the threads of NumPy's matrix products, for as long as the context lasts.

    Raises:
        InputError: fewer than one.
    """
    if threads is None:
        yield
        return
    if threads < 1:
        raise InputError(f"threads is {threads}, expected 1 or more")
    from threadpoolctl import threadpool_limits

    with threadpool_limits(limits=threads):
        yield


def default_mtp(backend: str) -> str:
    """Drafts per step where none are asked for: the reference gains nothing by them, since it
    verifies row by row; an engine drafts as many as pay off."""
    return "0" if backend == "reference" else "auto"
