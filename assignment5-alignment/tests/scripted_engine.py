"""An engine with scripted responses, which records its calls."""

from cs336_alignment.rollouts.engines.base import Completion


class ScriptedEngine:
    """An `InferenceEngine` whose completions are `respond(prompt, sample)`.

    A response that ends in "…" counts as cut short.
    """

    def __init__(self, tokenizer, respond):
        self.tokenizer = tokenizer
        self.respond = respond
        self.calls = []
        self.weights = []
        self.closed = False

    def generate(self, prompts, params):
        self.calls.append((list(prompts), params))
        return [[self._completion(self.respond(prompt, sample)) for sample in range(params.n)] for prompt in prompts]

    def _completion(self, text):
        token_ids = tuple(self.tokenizer(text)["input_ids"])
        return Completion(text, token_ids, (-1.0,) * len(token_ids), "length" if text.endswith("…") else "stop")

    def load_weights(self, state_dict):
        self.weights.append({name: weight.clone() for name, weight in state_dict.items()})

    def sleep(self):
        self.calls.append("sleep")

    def wake(self):
        self.calls.append("wake")

    def close(self):
        self.closed = True


def use(engine, monkeypatch):
    """Make all programs use this engine."""
    monkeypatch.setattr("cs336_alignment.rollouts.worker.make_engine", lambda *_, **__: engine)
    return engine
