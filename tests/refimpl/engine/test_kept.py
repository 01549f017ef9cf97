"""A kept cache over the engine: rings and MTP rows come back to the mark with the same bits."""

import numpy as np
import pytest

from refimpl.decoding.generate import generate
from refimpl.decoding.generation import GenerateOptions
from refimpl.decoding.kept import KeptCache


@pytest.mark.parametrize("mtp", [0, 3])
def test_back_to_the_mark_and_on_from_the_end(engine, mtp: int) -> None:
    model = engine("tiny_a", "f32", micro_batch=16)
    prompt = np.random.default_rng(0).integers(5, 300, 330).tolist()
    options = GenerateOptions(max_new_tokens=20, mtp=mtp, context=512, stop_tokens=())
    kept = KeptCache(model, 512)
    first = generate(model, prompt, options, kept=kept, mark=300)
    on = [*prompt, *first.ids, 3, 4]
    branch = [*prompt[:301], *range(5, 180)]
    for after, reused in ((on, 330 + 19), (branch, 300), ([*branch[:301], 9], 300)):
        made = generate(model, after, options, kept=kept)
        fresh = generate(model, after, options)
        assert made.timings.reused_tokens == reused
        assert made.ids == fresh.ids
        assert made.mtp == fresh.mtp
