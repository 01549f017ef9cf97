"""Which model is this? A hash that tells checkpoints apart without reading all of them."""

from __future__ import annotations

import hashlib
import json

import numpy as np

from refimpl.checkpoint.source import WeightSource
from refimpl.checkpoint.stored import StoredSource
from refimpl.config_io import to_hf
from refimpl.errors import InputError
from refimpl.inventory import inventory

WHOLE_BYTES = 64 << 10
PIECES = 16
PIECE_BYTES = 4096


def fingerprint(source: WeightSource) -> str:
    """SHA-256 over the configuration, the tensor table and a sample of the weights.

    Covered: every field of the configuration; of every tensor of the model its name, stored type,
    shape and size; all bytes of tensors up to 64 KiB (norms, biases, most routers); of larger ones
    16 pieces of 4 KiB, evenly spread from the first byte to the last; where scales lie in tensors
    of their own, 16 decoded rows as well. A full file of 100 GB costs some 50 MB of reading. Two
    checkpoints that differ only between the pieces of large tensors are not told apart: it guards
    against mix-ups and retrained or converted weights, not against forgery.

    Raises:
        InputError: the weights do not come from checkpoint files.
    """
    if not isinstance(source, StoredSource):
        raise InputError("a fingerprint needs a checkpoint file; these weights are not from one")
    config = source.config
    told = hashlib.sha256(json.dumps(to_hf(config), sort_keys=True).encode())
    told.update(repr(config.rope_divisors).encode())
    for spec in inventory(config):
        tensor = source.stored(spec.key, spec.layer)
        data = tensor.rows.reshape(-1)
        if tensor.scales is not None:
            index = np.linspace(0, len(tensor.rows) - 1, PIECES).astype(np.int64)
            told.update(np.ascontiguousarray(tensor.picked(index)).data)
        about = [spec.hf_name, tensor.kind.name, list(spec.shape), int(data.size)]
        told.update(json.dumps(about).encode())
        if data.size <= WHOLE_BYTES:
            told.update(np.ascontiguousarray(data).data)
            continue
        for start in np.linspace(0, data.size - PIECE_BYTES, PIECES).astype(np.int64):
            told.update(np.ascontiguousarray(data[start : start + PIECE_BYTES]).data)
    return told.hexdigest()
