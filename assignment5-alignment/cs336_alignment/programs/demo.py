"""From a random model to one that calculates, in minutes on a laptop: every stage of the package in one program.

A model of 0.1 M parameters learns to answer small sums from examples, 30 % of which show their working. It imitates
that mixture: usually it answers straight away, and often wrongly. Then GRPO rewards correct answers only. Within a few
dozen updates the model shows its working nearly always, because that is what earns the reward.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cs336_alignment.datasets.arithmetic import make_problems, r1_response, save_problems
from cs336_alignment.datasets.examples import load_examples
from cs336_alignment.policy.config import OptimizerConfig
from cs336_alignment.policy.loading import load_tokenizer
from cs336_alignment.policy.tiny_model import make_tiny_model
from cs336_alignment.programs.configs.demo import DemoConfig
from cs336_alignment.programs.configs.grpo import GrpoConfig
from cs336_alignment.programs.configs.sft import SftConfig, SftUpdateConfig
from cs336_alignment.programs.grpo import train_grpo
from cs336_alignment.programs.sft import train_sft
from cs336_alignment.rollouts.config import EngineConfig, EvaluationConfig, RolloutConfig, SamplingParams
from cs336_alignment.rollouts.engines import make_engine
from cs336_alignment.run_folder import read_metrics, write_atomically
from cs336_alignment.runs.checkpoint import latest_checkpoint

PROMPT = "{question} <think>"
WORKED_SHARE = 0.3
PALE, DARK = "#9ecae1", "#08519c"


@dataclass(frozen=True)
class DemoResult:
    """Accuracy on the held-out problems at temperature 1, and the mean length of a response in tokens."""

    sft_accuracy: float
    grpo_accuracy: float
    sft_length: float
    grpo_length: float


def run_demo(config: DemoConfig) -> DemoResult:
    """Make problems and a model, fine-tune it, train it with rewards, and show what it has learned."""
    console = Console(highlight=False, soft_wrap=True)
    run_dir = config.run_dir
    console.rule("[bold]Small sums, and a model that knows nothing")
    prepare(config)
    held_out = run_dir / "data" / "held_out.jsonl"
    example = load_examples(held_out)[0]
    console.print(f"a question: {example.prompt}    its working: {example.solution}    its answer: {example.answer}")

    rollouts = RolloutConfig(
        prompt=str(run_dir / "data" / "demo.prompt"),
        stop=("</answer>",),
        max_tokens=32,
        grading_workers=1,
        engine=EngineConfig("transformers"),
    )
    common: dict[str, Any] = {"seed": config.seed, "device": "cpu", "precision": "float32", "rollouts": rollouts}

    console.rule(f"[bold]Imitation: {config.sft_examples:,} answers, of which {WORKED_SHARE:.0%} show their working")
    train_sft(
        SftConfig(
            run_dir=run_dir / "sft",
            model=str(run_dir / "model"),
            train_data=run_dir / "data" / "sft.jsonl",
            imitation=SftUpdateConfig(epochs=config.sft_epochs, batch_size=32, normalize_constant=32.0),
            optimizer=OptimizerConfig(lr=config.sft_lr, schedule="cosine", warmup_ratio=0.05, microbatch_tokens=8192),
            evaluation=EvaluationConfig(eval_data=held_out, eval_examples=None, eval_every=10_000),  # first and last
            checkpoint_every=200,
            **common,
        )
    )
    imitator = latest_checkpoint(run_dir / "sft")

    console.rule("[bold]Rewards: GRPO on new problems, with nothing to imitate")
    train_grpo(
        GrpoConfig(
            run_dir=run_dir / "grpo",
            model=str(imitator),
            train_data=run_dir / "data" / "train.jsonl",
            n_grpo_steps=config.grpo_steps,
            rollout_batch_size=config.rollout_batch_size,
            train_batch_size=config.rollout_batch_size,
            optimizer=OptimizerConfig(lr=config.grpo_lr, microbatch_tokens=8192),
            evaluation=EvaluationConfig(
                eval_data=held_out, eval_examples=None, eval_every=max(1, config.grpo_steps // 8)
            ),
            checkpoint_every=10,
            **common,
        )
    )
    plot_rewards(run_dir / "grpo", run_dir / "rewards.png")
    result = read_result(run_dir)
    show(config, result, console)
    return result


def prepare(config: DemoConfig) -> None:
    """Write the problems, the prompt and the random model, unless an earlier call has written them."""
    data = config.run_dir / "data"
    finished = data / "config.json"
    settings = {"seed": config.seed, "sft_examples": config.sft_examples, "held_out": config.held_out}
    if finished.exists():
        if json.loads(finished.read_text(encoding="utf-8")) != settings:
            raise ValueError(
                f"{config.run_dir} holds a demo with other settings; delete it, or choose another folder with --run"
            )
        return
    problems = make_problems(config.sft_examples + 4000, config.seed)
    imitated, rewarded = problems[: config.sft_examples], problems[config.sft_examples :]
    save_problems(rewarded, data / "train.jsonl")
    save_problems(make_problems(config.held_out, config.seed, split="held_out"), data / "held_out.jsonl")
    write_atomically(data / "demo.prompt", PROMPT)
    draws = random.Random(config.seed)
    rows = [
        {
            "prompt": PROMPT.replace("{question}", problem.prompt),
            "response": r1_response(problem, worked=draws.random() < WORKED_SHARE),
        }
        for problem in imitated
    ]
    write_atomically(data / "sft.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    make_tiny_model(config.run_dir / "model", config.seed, context_length=128, initializer_range=0.08)
    write_atomically(finished, json.dumps(settings) + "\n")


def read_result(run_dir: Path) -> DemoResult:
    """Read the accuracies and lengths before the first and after the last update of GRPO."""
    evaluations = [record for record in read_metrics(run_dir / "grpo" / "metrics.jsonl") if "eval/reward" in record]
    first, last = evaluations[0], evaluations[-1]
    return DemoResult(
        first["eval/reward"], last["eval/reward"], first["eval/response_length"], last["eval/response_length"]
    )


def show(config: DemoConfig, result: DemoResult, console: Console) -> None:
    """Print the result, some responses before and after GRPO, and where the files are."""
    run_dir = config.run_dir
    before, after = latest_checkpoint(run_dir / "sft"), latest_checkpoint(run_dir / "grpo")
    questions = load_examples(run_dir / "data" / "held_out.jsonl")[:4]
    answers = [_responses(str(folder), [each.prompt for each in questions], config.seed) for folder in (before, after)]
    console.rule("[bold]Before and after, on held-out problems")
    table = Table("question", "answer", "after imitation", "after GRPO")
    for question, *responses in zip(questions, *answers, strict=True):
        table.add_row(question.prompt, question.answer, *map(escape, responses))
    console.print(table)
    console.print(
        f"accuracy on {config.held_out} held-out problems, sampled at temperature 1: "
        f"[bold]{result.sft_accuracy:.1%}[/bold] after imitation, [bold]{result.grpo_accuracy:.1%}[/bold] after GRPO; "
        f"a response has {result.sft_length:.1f} and {result.grpo_length:.1f} tokens"
    )
    console.rule("[bold]Where everything is")
    for path, what in (
        ("rewards.png", "reward, accuracy and length against updates"),
        ("data/", "the problems, and what was imitated"),
        ("sft/, grpo/", "the runs: metrics.jsonl, generations/ to read, checkpoints/"),
    ):
        console.print(f"  {escape(f'{run_dir}/{path}'):<32} {what}")
    console.print(
        f"""
[bold]What to run next[/bold], in assignment5-alignment/
  ask it:       .venv/bin/cs336-alignment generate 5+1-2+3-1+2 --engine transformers --stop "</answer>" \\
                    --prompt {escape(str(run_dir))}/data/demo.prompt --model {escape(str(after))}
  the real one: make data-math (in the folder above), then on a GPU
                .venv/bin/cs336-alignment fetch-model Qwen/Qwen2.5-Math-1.5B -o models/qwen
                .venv/bin/cs336-alignment grpo --model models/qwen --gpu-memory-utilization 0.7
Delete {escape(str(run_dir))} to start again."""
    )


def _responses(model: str, questions: list[str], seed: int) -> list[str]:
    """Let a model answer each question."""
    engine = make_engine("transformers", model, load_tokenizer(model), "cpu")
    params = SamplingParams(max_tokens=32, stop=("</answer>",), seed=seed)
    prompts = [PROMPT.replace("{question}", question) for question in questions]
    return [completion.text.strip() for (completion,) in engine.generate(prompts, params)]


def plot_rewards(run_dir: Path, destination: Path) -> None:
    """Draw reward, held-out accuracy and response length against the updates of a GRPO run, as a PNG file."""
    import matplotlib  # here, because importing it takes a second

    matplotlib.use("Agg")  # files only: no display is needed
    import matplotlib.pyplot as plt
    from matplotlib.ticker import PercentFormatter

    records = read_metrics(run_dir / "metrics.jsonl")
    figure, (above, below) = plt.subplots(2, sharex=True, figsize=(7, 5), layout="constrained", height_ratios=(3, 2))
    for axes, metric, pale, dark in (
        (above, "reward", "reward of a batch of rollouts", "accuracy on held-out problems"),
        (below, "response_length", "rollouts", "held-out problems"),
    ):
        for kind, label, style in (
            ("train", pale, {"color": PALE, "linewidth": 1.0}),
            ("eval", dark, {"color": DARK, "marker": "o", "markersize": 4}),
        ):
            points = [
                (each[f"{kind}_step"], each[f"{kind}/{metric}"]) for each in records if f"{kind}/{metric}" in each
            ]
            if points:
                axes.plot(*zip(*points), label=label, **style)
        axes.grid(alpha=0.3)
        axes.legend()
    above.yaxis.set_major_formatter(PercentFormatter(1.0))
    above.set(title=run_dir.name, ylim=(0, 1))
    below.set(xlabel="updates of the policy", ylabel="tokens of a response")
    figure.savefig(destination, dpi=150)
    plt.close(figure)
