"""Decoding a batch of prompts with a transformers model, one token per row and step, with a KV cache.

Rows are padded on the left, so that all of them write to the same column next:

    row 0   .  .  T  h  e | c  a  t        "." is padding, which no token attends to;
    row 1   1  +  1  =  ? | 2  .           "|" is where the prompts end

Keys and values are in buffers of full length from the start. On a CPU, a step attends to the columns used so far. On a
GPU most of the time would then go to Python and to launching kernels. There a step is compiled and recorded as a CUDA
graph for each shape it is run with, and rows and columns are rounded up so that there are few shapes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import AttentionInterface, Cache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

GROUPED_ATTENTION = "grouped_sdpa"
PREFILL_TOKENS = 16_384  # tokens of prompts that go through the model at once
COLUMN_BLOCK, ROW_BLOCK = 256, 8  # columns and rows are rounded up to multiples of these for CUDA graphs
SPARE_COLUMNS = 8  # never used: torch.compile treats a view of a whole buffer differently


def grouped_attention(
    module: torch.nn.Module,
    query: Float[Tensor, "batch heads query size"],
    key: Float[Tensor, "batch key_heads key size"],
    value: Float[Tensor, "batch key_heads key size"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention, with transformers' interface, without copying keys that several heads share.

    With a mask, transformers repeats keys and values for each head of a group. For a single query, the heads of a group
    are here treated as queries of one head instead: they attend to the same keys under the same mask.
    """
    rows, heads, queries, size = query.shape
    if queries > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    grouped = query.reshape(rows, key.shape[1], heads // key.shape[1], size)
    attended = F.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return attended.reshape(rows, 1, heads, size), None


AttentionInterface.register(GROUPED_ATTENTION, grouped_attention)


class PromptCache(Cache):
    """A KV cache of whole prompts, [prompts, heads, columns, size] for each layer."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store a layer's keys and values of new tokens, and return those that the tokens attend to."""
        self.keys.append(key_states)
        self.values.append(value_states)
        return key_states, value_states


class StepCache(Cache):
    """A KV cache that writes one column into buffers, [rows, heads, columns, size] for each layer."""

    def __init__(self, keys: list[Tensor], values: list[Tensor], column: Int[Tensor, "1"]) -> None:
        super().__init__(layers=[])
        self.keys, self.values, self.column = keys, values, column

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store a layer's keys and values of new tokens, and return those that the tokens attend to."""
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        keys.index_copy_(2, self.column, key_states)
        values.index_copy_(2, self.column, value_states)
        return keys, values


def step_logits(
    model: PreTrainedModel,
    tokens: Int[Tensor, "rows 1"],
    positions: Int[Tensor, "rows 1"],
    mask: Bool[Tensor, "rows 1 1 columns"],
    keys: list[Tensor],
    values: list[Tensor],
    column: Int[Tensor, "1"],
) -> Float[Tensor, "rows vocab"]:
    """Run one token of each row through the model, and write its keys and values to a column of the buffers."""
    cache = StepCache(keys, values, column)
    return model(
        input_ids=tokens, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True
    ).logits[:, -1]


class Decoder:
    """Decodes a batch of left-padded rows, one token per row and step.

    Args:
        rows: maximum number of rows in a batch.
        columns: maximum number of tokens of a prompt and its completion together.
        compiled: `step_logits` after torch.compile, which is recorded in CUDA graphs on a GPU. None: neither.
    """

    def __init__(
        self, model: PreTrainedModel, rows: int, columns: int, compiled: Callable[..., Tensor] | None = None
    ) -> None:
        self._model = model
        self._few_shapes = compiled is not None
        self._forward = compiled or step_logits
        self._device = model.device
        self._graphs = _GraphPool() if self._few_shapes and self._device.type == "cuda" else None
        self._max_rows = self._round_up(rows, ROW_BLOCK)
        self._max_columns = self._round_up(columns, COLUMN_BLOCK)
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._tokens = torch.zeros(self._max_rows, 1, dtype=torch.long, device=self._device)
        self._positions = torch.zeros(self._max_rows, 1, dtype=torch.long, device=self._device)
        self._buffer_columns = self._max_columns + SPARE_COLUMNS
        self._mask = torch.zeros(self._max_rows, 1, 1, self._buffer_columns, dtype=torch.bool, device=self._device)
        self._column = torch.zeros(1, dtype=torch.long, device=self._device)
        self._rows, self._width = 0, 0  # the used part of the buffers

    def holds(self, rows: int, columns: int) -> bool:
        """Whether the buffers are large enough for a batch of this size."""
        return rows <= self._max_rows and columns <= self._max_columns

    def start(self, prompts: Sequence[Sequence[int]], prompt_of_row: Sequence[int]) -> Float[Tensor, "rows vocab"]:
        """Start a batch. Each prompt goes through the model once, however many rows continue it.

        Args:
            prompts: token ids, at least one per prompt.
            prompt_of_row: for each row, an index into `prompts`.

        Returns:
            The logits of the rows' first tokens.
        """
        device = self._device
        self._width = width = max(map(len, prompts))
        source = self._padded(prompt_of_row)
        self._rows = len(source)
        tokens = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
        padding = torch.tensor([width - len(prompt) for prompt in prompts], device=device)
        for buffer in self._keys + self._values:
            buffer.zero_()  # otherwise a NaN from an earlier batch would survive: 0 times NaN is NaN

        logits = []
        prompts_at_once = max(1, PREFILL_TOKENS // width)
        for first in range(0, len(prompts), prompts_at_once):
            part = slice(first, first + prompts_at_once)
            cache = PromptCache()
            logits.append(self._prefill(tokens[part], padding[part], cache))
            rows = ((source >= part.start) & (source < part.stop)).nonzero().squeeze(1)
            self._store(cache, rows, source[rows] - first)
        self._positions[: self._rows, 0] = width - padding[source]
        self._mask.zero_()
        self._mask[: self._rows, 0, 0, :width] = torch.arange(width, device=device) >= padding[source][:, None]
        return torch.cat(logits)[source[: len(prompt_of_row)]]

    def step(self, tokens: Int[Tensor, " rows"]) -> Float[Tensor, "rows vocab"]:
        """Append a token to each row. Returns the logits of the next ones, which are valid until the next step."""
        self._tokens[: len(tokens), 0] = tokens
        self._column.fill_(self._width)
        self._mask[: self._rows, :, :, self._width] = True
        self._width += 1
        logits = self._run(self._rows, self._round_up(self._width, COLUMN_BLOCK))
        self._positions += 1
        return logits[: len(tokens)]

    def worth_dropping(self, rows: int) -> bool:
        """Whether continuing with only this many rows (see `keep`) saves more time than it takes."""
        return self._round_up(rows, ROW_BLOCK) <= self._rows * (0.5 if self._few_shapes else 0.75)

    def keep(self, rows: Sequence[int]) -> None:
        """Continue with only these rows, in this order."""
        kept = self._padded(rows)
        for buffer in self._keys + self._values:
            buffer[: len(kept), :, : self._width] = buffer[kept, :, : self._width]
        self._mask[: len(kept)] = self._mask[kept]
        self._positions[: len(kept)] = self._positions[kept]
        self._rows = len(kept)

    def _prefill(
        self, tokens: Int[Tensor, "prompts width"], padding: Int[Tensor, " prompts"], cache: PromptCache
    ) -> Float[Tensor, "prompts vocab"]:
        column = torch.arange(tokens.shape[1], device=tokens.device)
        real = column >= padding[:, None]
        # Padding attends to itself, because attention to nothing is 0/0. No other token attends to padding.
        mask = (column <= column[:, None]) & real[:, None, :] | torch.eye(
            len(column), dtype=torch.bool, device=column.device
        )
        positions = (column - padding[:, None]).clamp(min=0)
        return self._model(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=mask[:, None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]

    def _store(self, cache: PromptCache, rows: Int[Tensor, " rows"], source: Int[Tensor, " rows"]) -> None:
        """Copy the keys and values of prompts into the buffers, which are allocated when first needed."""
        for buffers, states in ((self._keys, cache.keys), (self._values, cache.values)):
            if not buffers:
                buffers += [
                    state.new_zeros(self._max_rows, state.shape[1], self._buffer_columns, state.shape[3])
                    for state in states
                ]
            for buffer, state in zip(buffers, states, strict=True):
                buffer[rows, :, : state.shape[2]] = state[source]

    def _run(self, rows: int, columns: int) -> Tensor:
        """Run a step of this many rows of the buffers, attending to this many columns."""
        if self._graphs is None:
            return self._forward(*self._inputs(rows, columns))
        return self._graphs.run((rows, columns), lambda: self._forward(*self._inputs(rows, columns)))

    def _inputs(self, rows: int, columns: int) -> tuple[Any, ...]:
        return (
            self._model,
            self._tokens[:rows],
            self._positions[:rows],
            self._mask[:rows, :, :, :columns],
            [keys[:rows, :, :columns] for keys in self._keys],
            [values[:rows, :, :columns] for values in self._values],
            self._column,
        )

    def _padded(self, rows: Sequence[int]) -> Int[Tensor, " padded"]:
        """Round up to a number of rows that graphs are recorded for, by repeating the last row."""
        padding = self._round_up(len(rows), ROW_BLOCK) - len(rows)
        return torch.tensor([*rows, *[rows[-1]] * padding], device=self._device)

    def _round_up(self, number: int, block: int) -> int:
        return -(-number // block) * block if self._few_shapes else number


class _GraphPool:
    """CUDA graphs by the shapes that they were recorded with. They share memory for their intermediate results."""

    def __init__(self) -> None:
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._memory = torch.cuda.graph_pool_handle()

    def run(self, shape: tuple[int, int], compute: Callable[[], Tensor]) -> Tensor:
        """Return the result of `compute`, which is recorded the first time. The result is the same tensor each time."""
        if shape not in self._graphs:
            self._graphs[shape] = self._record(compute)
        graph, result = self._graphs[shape]
        graph.replay()
        return result

    def _record(self, compute: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            compute()  # compiles, and lets libraries allocate workspaces; neither may happen while recording
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            result = compute()
        return graph, result
