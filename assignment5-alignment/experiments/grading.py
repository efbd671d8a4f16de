r"""Accuracy and speed of the grader, compared with math-verify: writes grading.json.

    python -m experiments.grading --math-dir DIR [--out results/grading]

DIR has MATH's train.jsonl and test.jsonl, with the fields problem, solution and answer. There are four parts:

- solutions: MATH's own solutions as responses, graded against their answers, by both reward functions;
- pairs: answers that rules have rewritten, or made slightly wrong (`answer_variants`), a sample of each kind. Precision
  is the fraction of accepted answers that are right, recall the fraction of right answers that are accepted;
- noise: texts that are not answers, graded one by one against the time limit;
- speed: of the fast path, with empty caches, and of sympy in a worker.
"""

import json
import random
import statistics
import time
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

import torch
import tyro
from math_verify import parse, verify

from cs336_alignment.grading import quick, structure
from cs336_alignment.grading.equality import TIMEOUT_S, answers_equal
from cs336_alignment.grading.extract import extract_boxed
from cs336_alignment.machine import available_cpus
from cs336_alignment.rollouts.grader import Grader
from cs336_alignment.rollouts.rewards import MATH_REWARDS
from experiments.answer_variants import Pair, pairs_from
from experiments.answer_variants.noise import noise
from experiments.results import RESULTS, write_result

TEMPLATES = {"r1_zero": "{solution} </think> <answer> \\boxed{{{box}}} </answer>", "question_only": "{solution}"}


def solution_rows(problems: list[dict]) -> list[dict]:
    rows = []
    for name in MATH_REWARDS:
        responses = [TEMPLATES[name].format(solution=p["solution"], box=extract_boxed(p["solution"])) for p in problems]
        started = time.perf_counter()
        with Grader(name) as grader:
            rewards = grader.grade(responses, [problem["answer"] for problem in problems])
        seconds = time.perf_counter() - started
        differ = [problem for problem, reward in zip(problems, rewards) if reward["reward"] != 1.0]
        row = {
            "part": "solutions",
            "reward function": name,
            "graded": len(problems),
            "right": len(problems) - len(differ),
        }
        row["wrong"] = [f"{p['unique_id']}: boxed {extract_boxed(p['solution'])}, answer {p['answer']}" for p in differ]
        rows.append({**row, "per_s": len(problems) / seconds})
    return rows


def all_pairs(answers: list[str]) -> list[Pair]:
    """Make variants of every answer, except the empty ones, of which MATH's training set has two."""
    return [pair for answer in sorted(set(answers)) if answer for pair in pairs_from(answer)]


def sampled(pairs: list[Pair], per_kind: int) -> list[Pair]:
    kinds = defaultdict(list)
    for pair in pairs:
        kinds[pair.kind].append(pair)
    source = random.Random(0)
    return [pair for of_kind in kinds.values() for pair in source.sample(of_kind, min(per_kind, len(of_kind)))]


def accepted_by_us(pairs: list[Pair], workers: int) -> list[bool]:
    with Grader("question_only", workers) as grader:
        rewards = grader.grade([rf"\boxed{{{pair.answer}}}" for pair in pairs], [pair.truth for pair in pairs])
    return [reward["reward"] == 1.0 for reward in rewards]


def summary(who: str, pairs: list[Pair], accepted: list[bool], seconds: float) -> dict:
    hits, equal = sum(pair.equal and yes for pair, yes in zip(pairs, accepted)), sum(pair.equal for pair in pairs)
    row = {"part": "pairs", "kind": "all", "who": who, "pairs": len(pairs), "equal": equal}
    return {**row, "precision": hits / sum(accepted), "recall": hits / equal, "per_s": len(pairs) / seconds}


def every_pair_row(answers: list[str]) -> dict:
    """Grade all variants of all answers, including those of the training set, and print those graded wrongly."""
    pairs = all_pairs(answers)
    started = time.perf_counter()
    accepted = accepted_by_us(pairs, workers=available_cpus())
    row = summary("ours, every variant of train and test", pairs, accepted, time.perf_counter() - started)
    for pair, yes in zip(pairs, accepted):
        if yes != pair.equal:
            print(f"{'accepted' if yes else 'refused'}: {pair}")
    return row


def forget() -> None:
    """Clear the caches of the fast path."""
    quick._canonical.cache_clear()
    structure.parse.cache_clear()


def math_verify_accepts(pair: Pair) -> bool:
    truth, answer = (parse(rf"\boxed{{{text}}}") for text in (pair.truth, pair.answer))
    return verify(truth, answer)


def fast_path(pairs: list[tuple[str, str]], what: str) -> tuple[list[bool], dict]:
    """Find the pairs (answer, truth) that the fast path decides, and its rate: the median of five cold rounds."""
    seconds = []
    for _ in range(5):
        forget()
        started = time.perf_counter()
        decided = [quick.quick_equal(*pair) is not None for pair in pairs]
        seconds.append(time.perf_counter() - started)
    row = {
        "part": "speed",
        "what": f"fast path, {what}",
        "pairs": len(pairs),
        "share decided": sum(decided) / len(pairs),
    }
    return decided, {**row, "per_s": len(pairs) / statistics.median(seconds)}


def pair_rows(pairs: list[Pair]) -> list[dict]:
    decided, speed = fast_path([(pair.answer, pair.truth) for pair in pairs], "the pairs above")
    started = time.perf_counter()
    ours = accepted_by_us(pairs, workers=1)
    seconds = time.perf_counter() - started
    started = time.perf_counter()
    theirs = [math_verify_accepts(pair) for pair in pairs]
    their_seconds = time.perf_counter() - started

    rows: list[dict] = []
    for kind in sorted({pair.kind for pair in pairs}, key=lambda kind: [pair.kind for pair in pairs].index(kind)):
        of_kind = [i for i, pair in enumerate(pairs) if pair.kind == kind]
        equal = pairs[of_kind[0]].equal
        rows.append({"part": "pairs", "kind": kind, "equal": equal, "pairs": len(of_kind)})
        for who, accepted in (("ours", ours), ("math-verify", theirs)):
            rows[-1][f"{who} right"] = sum(accepted[i] == equal for i in of_kind)
        rows[-1]["fast path"] = sum(decided[i] for i in of_kind)
    rows.sort(key=lambda row: not row["equal"])
    rows += [summary("ours", pairs, ours, seconds), summary("math-verify", pairs, theirs, their_seconds)]
    rows.append(speed)
    open_pairs = [pair for pair, is_decided in zip(pairs, decided) if not is_decided]
    with Grader("question_only", workers=1) as grader:
        grader.grade([r"\boxed{1+x}"], ["x+1"])
        started = time.perf_counter()
        grader.grade([rf"\boxed{{{pair.answer}}}" for pair in open_pairs], [pair.truth for pair in open_pairs])
        seconds = time.perf_counter() - started
    rows.append(
        {"part": "speed", "what": "sympy, one worker", "pairs": len(open_pairs), "per_s": len(open_pairs) / seconds}
    )
    return rows


def wrong_answer_row(answers: list[str]) -> dict:
    """Compare every answer with the answer to another problem, like most answers of an untrained policy."""
    others = random.Random(0).sample(answers, len(answers))
    return fast_path(list(zip(others, answers)), "answers against another problem's")[1]


def noise_row(answers: list[str], count: int) -> dict:
    source = random.Random(0)
    answers_equal("1+x", "x+1")  # starts the worker
    seconds, accepted, raised = [], 0, 0
    for _ in range(count):
        text, truth = noise(source, answers), source.choice(answers)
        started = time.perf_counter()
        try:
            accepted += answers_equal(text, truth)
        except Exception as error:
            print(f"{text!r} raises {error!r}")
            raised += 1
        seconds.append(time.perf_counter() - started)
    seconds.sort()
    return {"part": "noise", "texts": count, "raised": raised, "accepted": accepted, "limit_s": TIMEOUT_S,
            "reached the limit": sum(taken >= TIMEOUT_S for taken in seconds), "median_s": seconds[count // 2],
            "p99_s": seconds[int(0.99 * count)], "max_s": seconds[-1]}  # fmt: skip


def main(math_dir: Path, pairs_per_kind: int = 120, noise: int = 10_000, out: Path = RESULTS / "grading") -> None:
    """Measure what the grader gets right, and how fast it is.

    Args:
        math_dir: Folder with MATH's train.jsonl and test.jsonl.
        pairs_per_kind: Number of rewritten answers of each kind that are compared with math-verify.
        noise: Number of texts that are not answers.
        out: Folder to write the result to.
    """
    train, test = (
        [json.loads(line) for line in (math_dir / name).read_text(encoding="utf-8").splitlines()]
        for name in ("train.jsonl", "test.jsonl")
    )
    answers = [problem["answer"] for problem in test]
    rows = solution_rows(test)
    rows += pair_rows(sampled(all_pairs(answers), pairs_per_kind))
    rows.append(every_pair_row(answers + [problem["answer"] for problem in train]))
    rows += [wrong_answer_row(answers), noise_row(answers, noise)]
    write_result(
        out / "grading.json",
        "grading: MATH's solutions, variants of its answers compared with math-verify, noise, speed",
        torch.device("cpu"),
        rows,
        command="python -m experiments.grading --math-dir DIR",
        **{name: version(name) for name in ("sympy", "latex2sympy2-extended")},
    )


if __name__ == "__main__":
    tyro.cli(main)
