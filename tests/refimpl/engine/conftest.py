"""Small GGUF files, engines over them (compiled once per session), and stored rows of any type."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from refimpl.checkpoint.gguf_write import write_gguf
from refimpl.checkpoint.open import open_checkpoint
from refimpl.checkpoint.stored import StoredSource
from refimpl.checkpoint.synth import PRESETS, synthesize
from refimpl.engine.formats import FORMATS
from refimpl.engine.model import EngineModel
from refimpl.engine.simd import available
from refimpl.reference.model import ReferenceModel

SIMD = available()
BEST = SIMD[0]


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], StoredSource]:
    """An open tiny GGUF file by preset and file type."""
    root = tmp_path_factory.mktemp("gguf")
    opened: dict[tuple[str, str], StoredSource] = {}

    def source(preset: str, file_type: str) -> StoredSource:
        if (preset, file_type) not in opened:
            folder: Path = root / preset
            if not folder.exists():
                synthesize(PRESETS[preset](), 1, folder, "f32")
            path = root / f"{preset}-{file_type}.gguf"
            write_gguf(open_checkpoint(folder), path, file_type)
            opened[preset, file_type] = open_checkpoint(path)
        return opened[preset, file_type]

    return source


@pytest.fixture(scope="session")
def engine(tiny_gguf: Callable[[str, str], StoredSource]) -> Callable[..., EngineModel]:
    """An engine over a tiny file; the same one for the same arguments."""
    made: dict[tuple[object, ...], EngineModel] = {}

    def model(preset: str, file_type: str, **options: object) -> EngineModel:
        key = (preset, file_type, *sorted(options.items()))
        if key not in made:
            made[key] = EngineModel(tiny_gguf(preset, file_type), **options)  # type: ignore[arg-type]
        return made[key]

    return model


@pytest.fixture(scope="session")
def reference(tiny_gguf: Callable[[str, str], StoredSource]) -> Callable[..., ReferenceModel]:
    """The reference over a tiny file, float64."""
    return lambda preset, file_type: ReferenceModel(tiny_gguf(preset, file_type), "float64")


@pytest.fixture(scope="session")
def prompt() -> Callable[..., list[int]]:
    """Seeded token ids below the tiny presets' vocabularies."""

    def ids(length: int, seed: int = 0) -> list[int]:
        return [int(i) for i in np.random.default_rng(seed).integers(0, 320, length)]

    return ids


@pytest.fixture(scope="session")
def stored_rows() -> Callable[[str, int, int], tuple[np.ndarray, np.ndarray]]:
    """Random rows of a stored type: bytes (rows, row_bytes), and their values in float64."""
    from gguf import GGMLQuantizationType, quants

    # where the float16 scales of a block lie; all other bytes may have any value
    scales = {"Q6_K": (208,), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2)}

    def make(name: str, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng([rows, columns])
        kind = GGMLQuantizationType[name]
        if name in ("F32", "F16", "BF16"):
            values = rng.standard_normal((rows, columns), dtype=np.float32)
            data = np.ascontiguousarray(quants.quantize(values, kind)).view(np.uint8)
        else:
            fmt = FORMATS[name]
            blocks = rng.integers(
                0, 256, (rows, columns // fmt.block_values, fmt.block_bytes), dtype=np.uint8
            )
            for at in scales.get(name, (0,)):
                scale = rng.uniform(-0.01, 0.01, (*blocks.shape[:2], 1)).astype(np.float16)
                blocks[:, :, at : at + 2] = scale.view(np.uint8)
            data = blocks.reshape(rows, -1)
        data = np.ascontiguousarray(data.reshape(rows, -1))
        return data, quants.dequantize(data, kind).reshape(rows, columns).astype(np.float64)

    return make
