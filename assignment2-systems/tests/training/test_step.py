"""The passes of a step against the same written out, and what a user can get wrong."""

import dataclasses

import pytest
import torch

from cs336_basics.model import BasicsTransformerLM, ModelConfig
from cs336_basics.nn_utils import cross_entropy
from cs336_basics.optimizer import AdamW
from cs336_systems.instruments.options.common import StepGrid
from cs336_systems.instruments.step import step_cases, step_of_case
from cs336_systems.kernels import triton_support
from cs336_systems.training.choices import model_config
from cs336_systems.training.step import PHASES, StepConfig, TrainingStep

CPU = torch.device("cpu")
SHAPE = ModelConfig(vocab_size=67, context_length=12, d_model=16, num_layers=2, num_heads=2, d_ff=24)
CONFIG = StepConfig(SHAPE, CPU, batch_size=3)


def test_a_full_step_is_the_plain_one():
    step = TrainingStep(CONFIG)
    model = BasicsTransformerLM.from_config(SHAPE)
    model.load_state_dict(step.model.state_dict())
    loss = cross_entropy(model(step.inputs), step.targets)
    assert step.forward().item() == loss.item()

    loss.backward()
    AdamW(model.parameters(), lr=1e-4).step()
    step.full()
    for ours, plain in zip(step.model.parameters(), model.parameters()):
        torch.testing.assert_close(ours, plain, rtol=0, atol=0)


def test_targets_are_the_next_tokens():
    step = TrainingStep(CONFIG)
    assert step.inputs.shape == (3, 12)
    assert torch.equal(step.inputs[:, 1:], step.targets[:, :-1])


def test_inference_records_nothing():
    logits = TrainingStep(CONFIG).inference()
    assert logits.shape == (3, 12, 67)
    assert not logits.requires_grad


def test_gradients_do_not_pile_up():
    step = TrainingStep(CONFIG)
    step.run("forward-backward")
    first = step.model.lm_head.weight.grad.clone()
    step.run("forward-backward")
    torch.testing.assert_close(step.model.lm_head.weight.grad, first)


def test_bf16_leaves_the_parameters_alone():
    step = TrainingStep(dataclasses.replace(CONFIG, precision="bfloat16"))
    assert step.inference().dtype == torch.bfloat16
    step.full()
    assert {parameter.dtype for parameter in step.model.parameters()} == {torch.float32}


def test_fused_parts_give_the_same_step():
    pytest.importorskip("triton")
    plain = TrainingStep(CONFIG)
    fused = TrainingStep(dataclasses.replace(CONFIG, optimizer="fused", loss="fused"))
    torch.testing.assert_close(fused.forward(), plain.forward())
    plain.full()
    fused.full()
    for ours, other in zip(fused.model.parameters(), plain.model.parameters()):
        torch.testing.assert_close(ours, other, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("mode", "loss", "functions"),
    [
        ("compiled-model", "plain", 2),  # model, loss
        ("compiled-model", "fused", 1),
        ("compiled-blocks", "plain", 3),  # two blocks, loss
        ("compiled-blocks", "fused", 2),
    ],
)
def test_a_compiled_step_is_the_same(monkeypatch, mode, loss, functions):
    """In one graph each. The code generator is left out: the test would take a minute."""
    if loss == "fused":
        pytest.importorskip("triton")
    ran = []

    def traced(function, **_):
        graph = compile_(function, backend="eager", fullgraph=True)

        def run(*arguments):
            ran.append(function)
            return graph(*arguments)

        return run

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", traced)
    config = dataclasses.replace(CONFIG, loss=loss)
    plain, ours = TrainingStep(config), TrainingStep(dataclasses.replace(config, mode=mode))
    plain.full()
    assert not ran
    ours.full()
    assert len(ran) == functions
    torch.testing.assert_close(ours.model.lm_head.weight, plain.model.lm_head.weight)
    torch.compiler.reset()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        {"attention": "flash"},
        {"loss": "fused"},
        {"optimizer": "fused"},
        {"mode": "compiled-model"},
        {"mode": "compiled-blocks"},
    ],
)
def test_options_on_the_gpu(options):
    config = StepConfig(model_config("tiny", 64), torch.device("cuda"), precision="bfloat16")
    plain, ours = TrainingStep(config), TrainingStep(dataclasses.replace(config, **options))
    torch.testing.assert_close(ours.forward(), plain.forward(), rtol=1e-2, atol=1e-2)
    for _ in range(2):
        plain.full()
        ours.full()
    torch.testing.assert_close(ours.forward(), plain.forward(), rtol=1e-2, atol=1e-2)


def test_phases_show_in_the_profiler():
    step = TrainingStep(CONFIG)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step.full()
    assert set(PHASES) <= {event.name for event in profiler.events()}


def test_a_grid_has_a_step_for_each_case():
    grid = StepGrid(sizes=("tiny", "small"), contexts=(8,), precisions=("float32", "bfloat16"), batch_size=3)
    cases = step_cases(grid, CPU, mode=("eager", "compiled-model"), optimizer=("basics",))
    assert [(case["size"], case["precision"], case["mode"]) for case in cases] == [
        (size, precision, mode)
        for size in ("tiny", "small") for precision in ("float32", "bfloat16") for mode in ("eager", "compiled-model")
    ]  # fmt: skip
    assert step_of_case(grid, cases[3], CPU) == StepConfig(
        model_config("tiny", 8), CPU, 3, "plain", "bfloat16", "compiled-model"
    )


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: dataclasses.replace(CONFIG, batch_size=0), "batch size is 0"),
        (lambda: dataclasses.replace(CONFIG, attention="sdpa-cudnn"), "sdpa-cudnn needs an NVIDIA GPU"),
        (lambda: dataclasses.replace(CONFIG, attention="sdpa-efficient"), "sdpa-efficient needs an NVIDIA GPU"),
        (lambda: dataclasses.replace(CONFIG, device=torch.device("cuda"), attention="sdpa-flash"), "choose bfloat16"),
        (lambda: step_cases(StepGrid(batch_size=0), CPU), "--batch-size is 0"),
        (lambda: step_cases(StepGrid(contexts=(8, 0)), CPU), "--contexts is 0"),
        (lambda: step_cases(StepGrid(attentions=("plain", "sdpa-cudnn")), CPU), "needs an NVIDIA GPU"),
        (lambda: model_config("small", 0), "context_length is 0"),
    ],
)
def test_errors_tell_what_to_do(make, says):
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize(("option", "name"), [("attention", "flash"), ("optimizer", "fused"), ("loss", "fused")])
def test_kernels_are_refused_where_they_cannot_run(monkeypatch, option, name):
    monkeypatch.setattr(triton_support, "INTERPRETED", False)
    with pytest.raises(ValueError, match=f"{option} {name} is made of Triton kernels and needs a GPU"):
        dataclasses.replace(CONFIG, **{option: name})
