"""What the measurements on several ranks share."""

import statistics

import pytest
import torch

from cs336_systems.instruments.measure import OUT_OF_MEMORY, UNSUPPORTED
from cs336_systems.instruments.options.many_gpus import BenchDdp
from cs336_systems.instruments.ranks import Marks, StepTimes, largest, measure_on_all_ranks, summary
from cs336_systems.parallel.collectives import all_gather_objects


def unlucky(rank, kind):
    def measure():
        if kind == "memory":
            raise torch.OutOfMemoryError("no memory left")
        if kind == "alone" and rank.rank == 1:
            raise RuntimeError("it broke")
        return {"rank": rank.rank}

    return measure_on_all_ranks(measure), all_gather_objects(rank.rank)


@pytest.mark.parametrize(
    ("kind", "status", "rows"),
    [
        ("nothing", {"status": "ok"}, [{"status": "ok", "rank": 0}, {"status": "ok", "rank": 1}]),
        ("memory", {"status": OUT_OF_MEMORY}, []),
        ("alone", {"status": UNSUPPORTED, "reason": "RuntimeError: it broke"}, []),
    ],
)
def test_all_ranks_agree_on_a_failure(kind, status, rows, workers):
    assert workers.run(unlucky, 2, kind) == [((status, rows), [0, 1])] * 2


def test_the_slowest_rank_counts():
    fast = [StepTimes(1.0, 0.5, 0.25, 0.125)] * 3
    slow = [StepTimes(float(step), 1.0, 2.0, 3.0) for step in (4, 9, 5)]
    assert summary([fast, slow]) == {
        "step_ms": 5, "paced_ms": 5, "mean_ms": 6, "std_ms": statistics.stdev([4, 9, 5]),
        "forward_backward_ms": 1, "after_backward_ms": 2, "optimizer_ms": 3,
    }  # fmt: skip
    assert summary([fast[:1]])["std_ms"] == 0


def test_paced_steps_are_as_long_as_their_slowest_rank():
    one, other = ([StepTimes(step, 0.0, 0.0, 0.0) for step in steps] for steps in ((5.0, 1.0, 1.0), (1.0, 4.0, 3.0)))
    assert summary([one, other])["step_ms"] == 3
    assert summary([one, other])["paced_ms"] == 4


def test_largest():
    assert largest([{"a": 1.0}, {"a": 3.0}, {"a": 2.0}], "a") == {"a": 3.0}
    assert largest([{"a": None}, {}], "a") == {}


def test_marks_are_in_order():
    marks = Marks(torch.device("cpu"))
    for _ in range(4):
        marks.mark()
    assert len(marks.between_ms()) == 3
    assert min(marks.between_ms()) >= 0


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"processes": 0}, "--processes is 0"),
        ({"steps": 0}, "--steps is 0"),
        ({"warmup": -1}, "--warmup is -1"),
        ({"device": "cuda", "processes": 99}, "each needs a GPU, but torch sees"),
        ({"device": "mps"}, "choose auto, cuda or cpu"),
        ({"rounds": 0}, "--rounds is 0"),
        ({"bucket_mib": (1, 0)}, "a bucket of 0 MiB"),
        ({"variants": ()}, "nothing to measure"),
        ({"attention": "sdpa-cudnn"}, "needs an NVIDIA GPU"),
    ],
)
def test_mistakes_are_one_sentence(wrong, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        BenchDdp(**({"device": "cpu", "processes": 2, "size": "tiny", "out": tmp_path} | wrong)).execute()
    assert not list(tmp_path.iterdir())
