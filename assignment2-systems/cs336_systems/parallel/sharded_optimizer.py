"""Optimizer-state sharding: every rank updates its share of the parameters and sends it to the others."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cs336_systems.parallel.collectives import Group, broadcast


class ShardedOptimizer(torch.optim.Optimizer):
    """Shard any optimizer that updates each parameter independently of the others, with the same results.

    A parameter belongs to one rank, which alone keeps its optimizer state; each rank owns about as many elements as the
    others. After a step all ranks have all new parameters. This is stage 1 of ZeRO (Rajbhandari et al. 2020), except
    that here every rank receives all averaged gradients, and not only those it uses.

    Options such as the learning rate are read from `param_groups` at each step, so that schedulers work.

    Args:
        params: parameters, or groups of them, in the same order on all ranks.
        optimizer_cls: the optimizer's class.
        group: the ranks that share the work; None for all.
        kwargs: options of the optimizer.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        optimizer_cls: type[torch.optim.Optimizer],
        group: Group = None,
        **kwargs: Any,
    ) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self._owner: dict[Tensor, int] = {}
        self._elements = [0] * dist.get_world_size(group)  # that each rank owns
        self._inner: torch.optim.Optimizer | None = None
        whole = optimizer_cls(params, **kwargs)  # never steps; it checks the arguments and knows the defaults
        super().__init__([dict(group) for group in whole.param_groups], whole.defaults)
        self._inner = optimizer_cls([self._mine(group) for group in self.param_groups], **kwargs)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Divide the parameters of another group among the ranks."""
        super().add_param_group(param_group)
        added = self.param_groups[-1]
        # Large parameters first, so that small ones even out the rest.
        for parameter in sorted(added["params"], key=torch.Tensor.numel, reverse=True):
            self._owner[parameter] = self._elements.index(min(self._elements))
            self._elements[self._owner[parameter]] += parameter.numel()
        if self._inner is not None:
            self._inner.add_param_group(self._mine(added))

    @property
    def inner(self) -> torch.optim.Optimizer:
        """The optimizer of this rank's share."""
        assert self._inner is not None
        return self._inner

    def _mine(self, group: dict[str, Any]) -> dict[str, Any]:
        """Return the group with only this rank's parameters, of which there may be none."""
        return {**group, "params": [p for p in group["params"] if self._owner[p] == self.rank]}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Update this rank's share, then exchange. `closure` runs once; `kwargs` go to the optimizer's own step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, inner_group in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner_group.update(_options(group))
        self.inner.step(**kwargs)
        trained = {parameter: owner for parameter, owner in self._owner.items() if parameter.requires_grad}
        broadcast(trained, trained.values(), self.group)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's share, in the format of the unsharded optimizer; "owned" lists its parameters.

        `merge_state_dicts` combines the shares of all ranks.
        """
        number = self._numbers()
        state = {number[parameter]: state for parameter, state in self.inner.state.items()}
        groups = [_options(group) | {"params": [number[p] for p in group["params"]]} for group in self.param_groups]
        owned = [number[parameter] for parameter, owner in self._owner.items() if owner == self.rank]
        return {"state": state, "param_groups": groups, "owned": owned}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load this rank's share from a state dict.

        Args:
            state_dict: of the unsharded optimizer, this rank's own, or the merged shares of any number of ranks.

        Raises:
            ValueError: it belongs to other parameters, or lacks some that this rank owns.
        """
        saved_groups, states = state_dict["param_groups"], state_dict["state"]
        saved, expected = ([len(group["params"]) for group in groups] for groups in (saved_groups, self.param_groups))
        if saved != expected:
            raise ValueError(f"the state has groups of {saved} parameters, but the optimizer groups of {expected}")
        number = self._numbers()
        mine = [number[parameter] for group in self.inner.param_groups for parameter in group["params"]]
        missing = sorted(set(mine) - set(state_dict.get("owned", mine)))
        if missing:
            raise ValueError(
                f"the state lacks {len(missing)} of {len(mine)} parameters of rank {self.rank}, number {missing[0]} "
                "first; it is the share of another rank, or of another number of ranks: merge all shares"
            )
        for group, saved_group in zip(self.param_groups, saved_groups, strict=True):
            group.update(_options(saved_group))
        inner_groups = self.inner.state_dict()["param_groups"]  # numbers its parameters in the order of `mine`
        merged_groups = [_options(group) | {"params": own["params"]} for group, own in zip(saved_groups, inner_groups)]
        inner_state = {place: states[which] for place, which in enumerate(mine) if which in states}
        self.inner.load_state_dict({"state": inner_state, "param_groups": merged_groups})

    def _numbers(self) -> dict[Tensor, int]:
        """Number the parameters, counting over all groups."""
        parameters = (parameter for group in self.param_groups for parameter in group["params"])
        return {parameter: number for number, parameter in enumerate(parameters)}


def merge_state_dicts(shares: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Combine the state dicts of all ranks into the unsharded optimizer's."""
    state = {number: state for share in shares for number, state in share["state"].items()}
    owned = sorted(number for share in shares for number in share["owned"])
    everything = sorted(number for group in shares[0]["param_groups"] for number in group["params"])
    if owned != everything:
        raise ValueError(f"the shares hold {len(owned)} of {len(everything)} parameters; give the shares of all ranks")
    return {"state": dict(sorted(state.items())), "param_groups": shares[0]["param_groups"]}


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}
