"""Records that Python fills in and compiled code reads: arrays of int64, by field number.

`field(record, NUMBER)` reads one. Addresses and sizes are int64; the few float32 parameters of a
layer or step are kept as their bits. Row strides and offsets are in bytes.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np

from refimpl.engine.jit import njit
from refimpl.engine.loads import load_f32, load_i64


class Matrix(IntEnum):
    """A weight matrix (rows, columns), or a stack of them."""

    ADDRESS = 0
    ROWS = 1
    COLUMNS = 2
    ROW_BYTES = 3
    FORM_OFFSET = 4  # where its form of activations lies in a blob
    CHUNK = 5  # rows of one unit of work
    EXPERT_BYTES = 6  # from one matrix of a stack to the next
    KERNEL_1 = 7
    KERNEL_2 = 8
    KERNEL_4 = 9
    UNPACK = 10  # addresses of the two functions of a tiles.Tiling
    MULTIPLY = 11
    TILE_BYTES = 12  # of 16 unpacked rows
    TILE_FORM_OFFSET = 13  # where the activations for tiles lie in a blob
    PLACES = 14  # addresses of the matrices of a stack that is not all in memory, else 0
    TILE_COLUMNS = 15  # most columns unpacked at a time
    TILE_UNIT = 16  # rows of one unit of work with many rows of activations
    TILE_TOKENS = 17  # most rows of activations of one call of MULTIPLY
    SIZE = 18


class Layer(IntEnum):
    """A decoder layer. The *_PLAN fields are what `activations.prepare` adds to the blobs."""

    HEADS = 0
    GROUPS = 1
    LANES = 2
    WINDOW = 3  # 0 = all positions
    ROTARY_HALF = 4
    ROPE = 5  # number of its tables of cos and sin
    IS_MOE = 6
    WIDTH = 7  # of the dense, or of a routed expert's, hidden vector
    SHARED_WIDTH = 8
    LIMIT = 9  # SwiGLU clamps, float32 bits
    LIMIT_SHARED = 10
    INPUT_NORM = 11
    POST_NORM = 12
    Q_NORM = 13
    K_NORM = 14
    ROUTER_BIAS = 15
    INPUT_PLAN = 16
    OUTPUT_PLAN = 17
    FFN_PLAN = 18
    HIDDEN_PLAN = 19
    SHARED_PLAN = 20
    Q = 21  # addresses of Matrix records from here on
    K = 22
    V = 23
    G = 24
    O = 25
    GATE = 26  # dense, or routed experts
    UP = 27
    DOWN = 28
    SHARED_GATE = 29
    SHARED_UP = 30
    SHARED_DOWN = 31
    ROUTER = 32
    USED = 33  # distinct experts used so far, summed over steps
    SIZE = 34


class Kv(IntEnum):
    """One layer's cache."""

    KEYS = 0
    VALUES = 1
    KEY_SCALES = 2
    VALUE_SCALES = 3
    SLOTS = 4
    FIRST = 5  # position before which nothing is looked at
    SIZE = 6


class Step(IntEnum):
    """One run of T rows through some layers."""

    ROWS = 0
    START = 1  # position of the first row
    LAYERS = 2
    LAYER_TABLE = 3  # addresses of Layer records
    KV_TABLE = 4  # addresses of Kv records
    HIDDEN_SIZE = 5
    EXPERTS = 6
    TOP_K = 7
    EPS = 8  # float32 bits
    ROUTER_SCALE = 9  # float32 bits
    THREADS = 10
    BARRIER = 11  # address of the counter
    BARRIER_BASE = 12  # its value before the step
    CLAIMS = 13  # address of the claim counters, zeroed
    PREPARE = 14  # address of activations.prepare
    COS = 15  # addresses of addresses: a table (T, R/2) float32 for each kind of rotation
    SIN = 16
    H = 17  # residual stream (T, H)
    BLOB = 18  # normed rows and their forms
    BLOB_BYTES = 19
    QUERIES = 20
    QUERY_BYTES = 21
    KEYS = 22
    VALUES = 23
    KV_BYTES = 24
    GATES = 25
    GATE_BYTES = 26
    HEADS_BLOB = 27  # attention output and its forms
    HEADS_BLOB_BYTES = 28
    LOGITS = 29  # router logits
    LOGITS_BYTES = 30
    CHOSEN = 31  # (T, k) int64
    WEIGHTS = 32  # (T, k) float32
    GROUPS = 33  # routed groups, see refimpl.engine.moe
    HIDDEN_BLOB = 34  # SwiGLU products: (T, ) dense, (T k, ) routed
    HIDDEN_BLOB_BYTES = 35
    SHARED_BLOB = 36
    SHARED_BLOB_BYTES = 37
    ROUTED = 38  # (T, H) sum over experts
    SCRATCH = 39  # of each thread
    SCRATCH_BYTES = 40
    EMBEDDED = 41  # (T, H) embeddings for an MTP layer, else 0
    ENORM = 42
    HNORM = 43
    EH = 44  # Matrix record
    EH_PLAN = 45
    FINAL_NORM = 46
    FINAL_PLAN = 47
    HEAD = 48  # Matrix record, or 0: no logits
    HEAD_FIRST = 49  # first row whose logits are wanted
    OUT_LOGITS = 50
    OUT_BYTES = 51
    STORE = 52  # addresses of kv.storing and attention.attending
    ATTEND = 53
    PARTS = 54  # ATTENTION_PART, FFN_PART or both
    BLOBS = 55  # offsets in a thread's scratch: addresses of a unit's blobs,
    FIRST_Y = 56  # products of a unit (two lots),
    SECOND_Y = 57
    TILES = 58  # unpacked weights,
    FREE = 59  # and what is left for other uses
    FETCH = 60  # called with a MoE layer's record once its experts are chosen, or 0,
    FETCHED = 61  # address of how often it has answered,
    ORDER = 62  # and of the order in which used experts are computed: the i-th one's number
    PARTIALS = 63  # states of attention, see refimpl.engine.heads,
    DONE = 64  # and for each KV head how many of them are there
    SIZE = 65


ATTENTION_PART, FFN_PART = 1, 2
"""Halves of the layers that a step runs; all but traced runs have both."""


@njit(forceinline=True)
def field(record: Any, number: Any) -> Any:
    """The int64 in a field of the record at an address."""
    return load_i64(record + 8 * np.int64(number))


@njit(forceinline=True)
def float_field(record: Any, number: Any) -> Any:
    """The float32 in a field."""
    return load_f32(record + 8 * np.int64(number))


def float_bits(value: float) -> int:
    """A float32 as it is put in a field."""
    return int(np.array([value], dtype=np.float32).view(np.uint32)[0])
