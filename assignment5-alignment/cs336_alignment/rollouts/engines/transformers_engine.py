"""Generation with the transformers model in training: no second copy of the weights, and nothing to install.

The `generate` method of transformers is not used, because it runs a prompt once per sample, keeps finished rows in the
batch, searches the text of every row for stop strings at every step, seeds a batch instead of a row, and returns
log-probabilities only together with the logits of the whole batch.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cs336_alignment.policy.loading import load_model
from cs336_alignment.rollouts.config import SamplingParams
from cs336_alignment.rollouts.engines.base import Completion
from cs336_alignment.rollouts.engines.completion_text import CompletionText, encode_prompts, end_of_sequence_ids
from cs336_alignment.rollouts.engines.decoding import GROUPED_ATTENTION, Decoder, step_logits
from cs336_alignment.rollouts.engines.sampling import draw_uniforms, sample_tokens
from cs336_alignment.rollouts.engines.weights import WeightCheck


class TransformersEngine:
    """An `InferenceEngine` on a causal language model (from transformers) whose layers all have full attention.

    Args:
        model_or_path: a model, which is used in place, such as the one in training, so that new weights take effect at
            once. Or a folder, from which the engine reads its own model.
        device, dtype: for a model that is read from a folder.
        compiled: on a GPU, run steps as CUDA graphs of code from torch.compile. This takes a minute or more once, and
            then some tenths of a second for each new batch size.
        max_batch_tokens: maximum of rows times tokens per row (prompt and completion) in a batch; more are distributed
            over several batches. Qwen 2.5 1.5B in bfloat16 needs 28 kB per token, 15 GB for the default.
        max_model_len: maximum number of tokens of a prompt and its completion. Default: the model's context.
        progress: show a progress bar.
    """

    def __init__(
        self,
        model_or_path: PreTrainedModel | str | Path,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device | str = "cpu",
        *,
        dtype: torch.dtype = torch.float32,
        compiled: bool = False,
        max_batch_tokens: int = 1 << 19,
        max_model_len: int | None = None,
        progress: bool = False,
    ) -> None:
        self._owns_model = not isinstance(model_or_path, PreTrainedModel)
        self._model: Any = model_or_path
        if not isinstance(model_or_path, PreTrainedModel):
            self._model = load_model(model_or_path, device, dtype)
        self._tokenizer = tokenizer
        self._device = self._model.device
        self._compiled = torch.compile(step_logits, dynamic=True) if compiled else None
        self._max_batch_tokens = max_batch_tokens
        config = self._model.config
        if {*(getattr(config, "layer_types", None) or ())} - {"full_attention"}:
            raise ValueError(
                f"the model has layers of {', '.join(sorted({*config.layer_types}))}, but the transformers engine "
                "supports full attention only; use the vllm engine"
            )
        self._context_length = min(config.max_position_embeddings, max_model_len or config.max_position_embeddings)
        self._ends = end_of_sequence_ids(tokenizer, self._model.generation_config)
        self._check_weights = WeightCheck(self._model)
        self._progress = progress
        self._decoder: Decoder | None = None
        self._decoder_weights: tuple[int, ...] = ()
        self._awake = True

    def generate(self, prompts: Sequence[str], params: SamplingParams) -> list[list[Completion]]:
        """See `InferenceEngine.generate`."""
        if not self._awake:
            raise RuntimeError("the engine is asleep; call wake() before generate()")
        encoded = encode_prompts(self._tokenizer, prompts, self._context_length)
        rows = [
            _Row(
                number=prompt * params.n + sample,
                prompt=prompt,
                prompt_ids=prompt_ids,
                limit=min(params.max_tokens, self._context_length - len(prompt_ids)),
                text=CompletionText(self._tokenizer, prompt_ids, params.stop, params.min_tokens),
            )
            for prompt, prompt_ids in enumerate(encoded)
            for sample in range(params.n)
        ]
        uniforms = draw_uniforms(len(rows), min(params.max_tokens, self._context_length), params.seed)
        with self._ready(), Progress(console=Console(stderr=True), disable=not self._progress) as progress:
            task = progress.add_task("generating", total=len(rows))
            for batch in self._batches(rows):
                for finished in self._complete(batch, uniforms, params):
                    progress.advance(task, finished)
        completions = [row.completion() for row in rows]
        return [completions[first : first + params.n] for first in range(0, len(rows), params.n)]

    def load_weights(self, state_dict: Mapping[str, Tensor]) -> None:
        """See `InferenceEngine.load_weights`. Weights shared with the trainer are up to date already."""
        new = self._check_weights(state_dict)
        with torch.no_grad():
            for name, weight in self._model.state_dict().items():
                if new[name].data_ptr() != weight.data_ptr():
                    weight.copy_(new[name])

    def sleep(self) -> None:
        """Release the KV cache and, if the engine has a model of its own, that model's GPU memory."""
        self._awake = False
        if self._owns_model:
            self._model.to("cpu")
        self._forget_decoder()

    def wake(self) -> None:
        """Move the engine's own model back to its device."""
        if self._owns_model:
            self._model.to(self._device)
        self._awake = True

    def close(self) -> None:
        """Release everything except a model that was passed in. The engine cannot be used afterwards."""
        self._model = None
        self._forget_decoder()

    def _forget_decoder(self) -> None:
        self._decoder = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @contextmanager
    def _ready(self) -> Iterator[None]:
        """Put the model into the state that generation needs, and restore it afterwards."""
        training = [module for module in self._model.modules() if module.training]
        attention = self._model.config._attn_implementation
        self._model.eval()
        self._model.set_attn_implementation(GROUPED_ATTENTION)
        on_device = torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()
        try:
            with torch.no_grad(), on_device:
                yield
        finally:
            self._model.set_attn_implementation(attention)
            for module in training:
                module.training = True

    def _batches(self, rows: Sequence["_Row"]) -> Iterator[list["_Row"]]:
        """Group rows of similar length, the longest first, so that running out of memory happens at once."""
        batch: list[_Row] = []
        for row in sorted(rows, key=lambda row: (-len(row.prompt_ids), row.number)):
            if batch and (len(batch) + 1) * _columns([*batch[:1], row]) > self._max_batch_tokens:
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    def _complete(
        self, batch: list["_Row"], uniforms: Float[Tensor, "rows steps"], params: SamplingParams
    ) -> Iterator[int]:
        """Generate a whole batch. Yields the number of rows that ended at each step."""
        prompts = {row.prompt: row.prompt_ids for row in batch}
        index = {prompt: position for position, prompt in enumerate(prompts)}
        decoder = self._decoder_for(len(batch), _columns(batch))
        logits = decoder.start(list(prompts.values()), [index[row.prompt] for row in batch])
        draws = uniforms[[row.number for row in batch]].to(self._device)
        for step in range(max(row.limit for row in batch)):
            tokens, log_probs = self._choose(logits, draws[:, step], params, may_end=step >= params.min_tokens)
            ended = 0
            for row, token, log_prob in zip(batch, tokens.tolist(), log_probs.tolist()):
                if row.finish_reason is None:
                    row.append(token, log_prob, self._ends)
                    ended += row.finish_reason is not None
            yield ended
            unfinished = [position for position, row in enumerate(batch) if row.finish_reason is None]
            if not unfinished:
                return
            if decoder.worth_dropping(len(unfinished)):
                decoder.keep(unfinished)
                batch = [batch[position] for position in unfinished]
                tokens, draws = tokens[unfinished], draws[unfinished]
            logits = decoder.step(tokens)

    def _choose(
        self,
        logits: Float[Tensor, "rows vocab"],
        uniforms: Float[Tensor, " rows"],
        params: SamplingParams,
        may_end: bool,
    ) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]:
        """Sample the next tokens. Returns them with their log-probabilities before temperature and top-p."""
        logits = logits.float()
        normalizer = logits.logsumexp(-1)
        allowed = logits
        if not may_end:
            allowed = logits.index_fill(-1, torch.tensor(sorted(self._ends), device=logits.device), -torch.inf)
        tokens = sample_tokens(allowed, uniforms, params.temperature, params.top_p)
        return tokens, logits.gather(-1, tokens[:, None]).squeeze(-1) - normalizer

    def _decoder_for(self, rows: int, columns: int) -> Decoder:
        """Return a decoder that is large enough. A compiled one is kept, because recording its graphs takes a while."""
        if self._compiled is None:
            return Decoder(self._model, rows, columns)
        weights = tuple(weight.data_ptr() for weight in self._model.parameters())  # graphs read weights by address
        if self._decoder and self._decoder_weights == weights and self._decoder.holds(rows, columns):
            return self._decoder
        self._decoder = None  # first, so that its buffers and those of the next do not exist at the same time
        self._decoder, self._decoder_weights = Decoder(self._model, rows, columns, self._compiled), weights
        return self._decoder


class _Row:
    """A completion in progress."""

    def __init__(self, number: int, prompt: int, prompt_ids: list[int], limit: int, text: CompletionText) -> None:
        self.number = number
        self.prompt = prompt
        self.prompt_ids = prompt_ids
        self.limit = limit
        self.finish_reason: Literal["stop", "length"] | None = None
        self._text = text
        self._token_ids: list[int] = []
        self._log_probs: list[float] = []

    def append(self, token: int, log_prob: float, ends: frozenset[int]) -> None:
        self._token_ids.append(token)
        self._log_probs.append(log_prob)
        if token in ends or self._text.append(token):
            self.finish_reason = "stop"
        elif len(self._token_ids) == self.limit:
            self.finish_reason = "length"

    def completion(self) -> Completion:
        assert self.finish_reason is not None
        return Completion(self._text.text, tuple(self._token_ids), tuple(self._log_probs), self.finish_reason)


def _columns(rows: Sequence[_Row]) -> int:
    """Return the width of a batch of these rows: the longest prompt plus the longest completion."""
    return max(len(row.prompt_ids) for row in rows) + max(row.limit for row in rows)
