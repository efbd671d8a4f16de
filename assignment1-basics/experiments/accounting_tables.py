"""transformer_accounting, adamwAccounting: what GPT-2 costs, calculated with `cs336_basics.accounting`."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cs336_basics import accounting
from cs336_basics.model_config import ModelConfig
from cs336_basics.presets import MODELS
from experiments.results import RESULTS, write_result


@dataclass(frozen=True)
class AccountingTables:
    """Calculate parameters, FLOPs by component, and memory of training for GPT-2's sizes."""

    context: int = 16_384
    """Tokens per sequence in the question about a longer context."""
    memory_gb: float = 80.0
    """Memory of the GPU on which XL is to be trained, in GB (10^9 bytes)."""
    flops_per_second: float = 19.5e12
    """Peak rate of the GPU in FLOP/s. Default: that of an A100 in float32."""
    out: Path = RESULTS
    """Folder of the results."""

    def execute(self) -> None:
        """Calculate, and write accounting.json."""
        sizes = {name: model for name, model in MODELS.items() if name.startswith("gpt2")}
        xl = sizes["gpt2-xl"]
        one = accounting.training_memory(xl, 1)
        content = {
            "models": {name: _forward(model) for name, model in sizes.items()},
            "xl_long_context": _forward(replace(xl, context_length=self.context)),
            "xl_training": {
                "fixed_bytes": one.total - one.activations,
                "activation_bytes_per_sequence": one.activations,
                "largest_batch": accounting.max_batch_size(xl, self.memory_gb * 1e9),
                "adamw_flops": accounting.adamw_step_flops(xl),
                "days_of_400k_steps_of_1024": accounting.training_days(xl, 1024, 400_000, self.flops_per_second),
            },
        }
        write_result("accounting", "GPT-2's sizes on paper", content, self.out)


def _forward(config: ModelConfig) -> dict[str, Any]:
    total = accounting.forward_flops(config)
    parameters = sum(accounting.parameter_counts(config).values())
    return {
        "parameters": parameters,
        "bytes_in_float32": 4 * parameters,
        "forward_flops": total,
        "matmuls": {matmul.name: matmul.flops for matmul in accounting.matmuls(config)},
        "shares": {matmul.name: matmul.flops / total for matmul in accounting.matmuls(config)},
    }
