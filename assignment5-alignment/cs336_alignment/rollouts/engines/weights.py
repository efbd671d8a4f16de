"""Weights that an engine takes from a trainer are checked by name and shape before any of them is touched."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel


class WeightCheck:
    """What the weights of an architecture are called, and which shapes they have.

    Args:
        model: any model of the architecture; it is not kept.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._shapes = {name: weight.shape for name, weight in model.state_dict().items()}
        # Which weights are one and the same, such as an output layer that is the embedding's transpose.
        self._copies: dict[str, str] = dict(model.all_tied_weights_keys)

    @classmethod
    def of_architecture(cls, config: PretrainedConfig) -> "WeightCheck":
        """The same from a configuration alone; nothing is allocated."""
        with torch.device("meta"):
            return cls(AutoModelForCausalLM.from_config(config))

    def __call__(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Check `state_dict`. A tied weight may be there or not; if it is, it must equal what it is tied to.

        Returns:
            The weights, tied ones under all of their names.

        Raises:
            ValueError: a weight is missing, unknown, of another shape, or not tied where the architecture ties it.
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
