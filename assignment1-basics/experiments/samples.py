"""generate: what trained models write at several temperatures and values of top-p."""

from dataclasses import dataclass
from pathlib import Path

from cs336_basics.corpus import END_OF_TEXT
from cs336_basics.model_config import SamplingConfig
from experiments.results import RESULTS, write_result

#: Temperature and top-p; 0 is greedy.
SETTINGS = ((0.0, 1.0), (0.7, 1.0), (1.0, 1.0), (1.0, 0.9), (1.3, 1.0), (1.3, 0.9))


@dataclass(frozen=True)
class Samples:
    """Generate a text with every run at every setting."""

    runs: tuple[Path, ...]
    """Run folders."""
    prompts: tuple[str, ...] = ("Once upon a time", "The history of the city")
    """Beginnings of the texts, one per run in order; the last one is used for all further runs."""
    tokens: int = 256
    """The most tokens per text."""
    seed: int = 0
    """Seed of the random choices."""
    device: str = "auto"
    """cpu, cuda, or auto for a GPU if there is one."""
    out: Path = RESULTS
    """Folder of the results."""

    def execute(self) -> None:
        """Generate the texts, and write samples.json."""
        from cs336_basics.generation import generate
        from cs336_basics.load_run import load_model, load_tokenizer
        from cs336_basics.strategy import resolve_device

        rows = []
        for number, run in enumerate(self.runs):
            prompt = self.prompts[min(number, len(self.prompts) - 1)]
            tokenizer, model = load_tokenizer(run), load_model(run, self.device)
            stop = tokenizer.token_to_id[END_OF_TEXT.encode()]
            for temperature, top_p in SETTINGS:
                sampling = SamplingConfig(self.tokens, temperature, top_p=top_p, seed=self.seed)
                (ids,) = generate(model, [tokenizer.encode(prompt)], sampling, stop)
                row = {
                    "run": "/".join(run.parts[-2:]),
                    "prompt": prompt,
                    "temperature": temperature,
                    "top_p": top_p,
                    "tokens": len(ids),
                    "ended_itself": len(ids) < self.tokens,
                    "text": tokenizer.decode(ids),
                }
                rows.append(row)
        write_result("samples", "samples of trained models", {"rows": rows}, self.out, str(resolve_device(self.device)))
