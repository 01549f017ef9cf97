"""The draft-and-verify loop of the benchmark: its texts share what was learned about drafts."""

import refimpl.decoding.generate as loop
from refimpl.benchmark.plan import BenchTest, Settings
from refimpl.benchmark.run import open_bench


def test_every_number_of_drafts_keeps_its_policy_from_the_warm_up_on(monkeypatch) -> None:
    given = []

    def generate(backend, prompt, options, *, policy):
        given.append((options.mtp, policy))
        return real(backend, prompt, options, policy=policy)

    real = loop.generate
    monkeypatch.setattr(loop, "generate", generate)
    tests = [BenchTest(n_gen=6, mtp="auto"), BenchTest(n_gen=6, mtp="1")]
    with open_bench("mini", Settings(repetitions=2, threads=1, backend="reference")) as bench:
        results = list(bench.run_all(tests))
    assert [len(r.samples_ns) for r in results] == [2, 2]
    assert [mtp for mtp, _ in given] == ["auto", 1, "auto", 1, 1, "auto"]
    assert len({id(policy) for _, policy in given}) == 2
    assert all(policy.mtp == mtp for mtp, policy in given)
    (auto,) = {id(policy): policy for mtp, policy in given if mtp == "auto"}.values()
    assert auto.costs.unit > 0
