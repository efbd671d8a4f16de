"""Fetching a model into a folder."""

from pathlib import Path

from cs336_alignment.policy import fetch
from cs336_alignment.policy.loading import load_tokenizer
from cs336_alignment.programs.configs.fetch_model import FetchModelConfig

NEXT_COMMANDS = """
What to run next; add --engine transformers if vLLM is not installed:
  cs336-alignment generate "What is 3 + 4?" --model {folder}
  cs336-alignment evaluate math --model {folder} --max-examples 64
  cs336-alignment grpo --model {folder}"""


def run_fetch_model(config: FetchModelConfig) -> None:
    """Fetch a model, check that its tokenizer can be read, and print what to run next.

    Raises:
        ValueError, FileNotFoundError, ConnectionError: the model cannot be fetched.
    """
    folder = fetch.fetch_model(config.model, config.output or Path("models") / Path(config.model).name)
    load_tokenizer(folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 1e6:,.0f} MB")
    print(NEXT_COMMANDS.format(folder=folder))
