"""From a path and a few choices to a model that can run and, mostly, a tokenizer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
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
"""Backends of this build; `chosen_backend` says which one a model runs on by itself."""


@dataclass(frozen=True)
class EngineOptions:
    """What the engine can be asked for beside threads (see `refimpl.engine.model.EngineModel`).

    Attributes:
        exact: no int8 activations, float32 KV.
        kv_type: 'f16', 'f32' or 'q8_0'; None is f16, with `exact` f32.
        on_compile: called once if kernels have to be compiled, before they are.
        on_reading: called with (bytes done, bytes in all) while a large file that fits is read
            into memory; None leaves it to the page faults of the first tokens.
        memory_bytes: what the process may use; None is what is free. Of a model that is larger,
            experts are read from disk when they are chosen.
    """

    exact: bool = False
    kv_type: str | None = None
    on_compile: Callable[[], None] | None = None
    on_reading: Callable[[int, int], None] | None = None
    memory_bytes: int | None = None

    @property
    def asked(self) -> str | None:
        """The first option that only the engine knows, as typed, or None."""
        if self.exact or self.kv_type:
            return "--exact" if self.exact else "--kv-type"
        return None if self.memory_bytes is None else "--memory"


@dataclass(frozen=True)
class OpenModel:
    """A model ready to run.

    Attributes:
        path: where it lies.
        name: of the backend.
        backend: what runs it.
        tokenizer: None where the checkpoint has none.
        warnings: notes for the user, one sentence each.
    """

    path: Path
    name: str
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


def chosen_backend(model: str | Path, name: str | None = None, dtype: str | None = None) -> str:
    """The backend of a model: `name`, or where none is asked for the engine for GGUF files and
    the reference for folders and wherever an arithmetic of the reference is named.

    Raises:
        InputError: as `model_path`.
    """
    if name is not None:
        return name
    return "reference" if dtype is not None or model_path(model).is_dir() else "engine"


def open_backend(
    source: WeightSource,
    name: str = "reference",
    dtype: str | None = None,
    threads: int | None = None,
    options: EngineOptions = EngineOptions(),
) -> Backend:
    """A backend over an open checkpoint.

    Args:
        name: one of `BACKENDS`.
        dtype: one of `DTYPES`: the arithmetic of the reference, by default float32, which is all
            that the engine has.
        threads: threads of an engine; those of the reference are `limited_threads`.
        options: for an engine.

    Raises:
        InputError: this build has no such backend, or the engine cannot run the checkpoint.
    """
    if name not in BACKENDS:
        raise InputError(
            f"this build has no backend '{name}'; use --backend {' or '.join(BACKENDS)}"
        )
    if name == "engine":
        return _open_engine(source, dtype, threads, options)
    if options.asked is not None:
        raise InputError(
            f"{options.asked} belongs to the engine; the reference is always exact and decodes "
            "what it needs"
        )
    from refimpl.reference.model import ReferenceModel

    return ReferenceModel(source, dtype or "float32")


def _open_engine(
    source: WeightSource, dtype: str | None, threads: int | None, options: EngineOptions
) -> Backend:
    from refimpl.checkpoint.stored import StoredSource
    from refimpl.engine.jit import announced
    from refimpl.engine.model import EngineModel

    if dtype not in (None, "float32"):
        raise InputError(f"--dtype {dtype} belongs to the reference; the engine has float32 only")
    if not isinstance(source, StoredSource):
        raise InputError("the engine runs checkpoint files only; use --backend reference")
    with announced(options.on_compile):
        model = EngineModel(
            source, threads, options.exact, options.kv_type, memory_bytes=options.memory_bytes
        )
    if options.on_reading is not None:
        model.read_ahead(options.on_reading)
    return model


@contextlib.contextmanager
def open_model(
    model: str | Path,
    backend: str | None = None,
    dtype: str | None = None,
    threads: int | None = None,
    options: EngineOptions = EngineOptions(),
    mtp_model: str | Path | None = None,
) -> Iterator[OpenModel]:
    """Open a model by name or path, for as long as the context lasts.

    Args:
        backend: one of `BACKENDS`; None: see `chosen_backend`.
        dtype, threads, options: see `open_backend`.
        mtp_model: a second checkpoint that holds the MTP layers.

    Raises:
        InputError: no such backend, or no embedded model.
        CheckpointError, ConfigError: the checkpoint cannot be used.
    """
    path = model_path(model)
    name = chosen_backend(path, backend, dtype)
    opening = contextlib.closing(open_checkpoint(path, mtp_path=mtp_model))
    with limited_threads(threads), opening as source, quiet():
        opened = open_backend(source, name, dtype, threads, options)
        try:
            yield OpenModel(
                path=path,
                name=name,
                backend=opened,
                tokenizer=tokenizer_of(path, source.metadata or None),
                warnings=source.warnings,
            )
        finally:
            if hasattr(opened, "close"):
                opened.close()


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
