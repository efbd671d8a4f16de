"""Checking the names and shapes of new weights before an engine loads any of them."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel


class WeightCheck:
    """The names and shapes of the weights of an architecture.

    Args:
        model: any model of the architecture. No reference to it is kept.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._shapes = {name: weight.shape for name, weight in model.state_dict().items()}
        # Names of weights that are tied to another, such as an output layer that shares the embedding.
        self._copies: dict[str, str] = dict(model.all_tied_weights_keys)

    @classmethod
    def of_architecture(cls, config: PretrainedConfig) -> "WeightCheck":
        """Make the check from a configuration alone, without allocating weights."""
        with torch.device("meta"):
            return cls(AutoModelForCausalLM.from_config(config))

    def __call__(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Check a `state_dict`. A tied weight may be missing; if it is there, it must equal the weight it is tied to.

        Returns:
            The weights, with tied ones under all of their names.

        Raises:
            ValueError: a weight is missing, unknown, has another shape, or is not tied as in the architecture.
        """
        remedy = "give the state_dict of a model of the same architecture"
        missing = [name for name in self._shapes if name not in state_dict and name not in self._copies]
        unknown = [name for name in state_dict if name not in self._shapes]
        for names, problem in ((missing, "is missing"), (unknown, "is unknown")):
            if names:
                raise ValueError(f"the weight {names[0]} {problem} ({len(names)} in all); {remedy}")
        for name, weight in state_dict.items():
            if weight.shape != self._shapes[name]:
                raise ValueError(
                    f"the weight {name} has shape {tuple(weight.shape)}, but the engine's has "
                    f"{tuple(self._shapes[name])}; {remedy}"
                )
        for copy, original in self._copies.items():
            if copy in state_dict and not _same(state_dict[copy], state_dict[original]):
                raise ValueError(
                    f"the weights {copy} and {original} differ, but the engine's model ties them; {remedy}"
                )
        return {**state_dict, **{copy: state_dict[original] for copy, original in self._copies.items()}}


def _same(first: Tensor, second: Tensor) -> bool:
    return first.data_ptr() == second.data_ptr() or torch.equal(first, second)
