"""Load a trained model and its tokenizer from a run folder."""

from collections.abc import Sequence
from pathlib import Path

from cs336_basics.checkpoint import latest_checkpoint, read_checkpoint, restore
from cs336_basics.corpus import END_OF_TEXT
from cs336_basics.model import BasicsTransformerLM
from cs336_basics.strategy import resolve_device
from cs336_basics.tokenizer import Tokenizer
from cs336_basics.train_config import read_model_config


def load_tokenizer(folder: Path, special_tokens: Sequence[str] = (END_OF_TEXT,)) -> Tokenizer:
    """Load the tokenizer whose `vocab.json` and `merges.txt` are in `folder`."""
    for name in ("vocab.json", "merges.txt"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}; name the folder that `cs336-basics train-bpe` wrote")
    return Tokenizer.from_files(folder / "vocab.json", folder / "merges.txt", special_tokens)


def load_model(run_dir: Path, device: str = "auto", checkpoint: Path | None = None) -> BasicsTransformerLM:
    """Load the model of a run from `checkpoint`. Default: the latest checkpoint of the run."""
    config = read_model_config(run_dir)
    path = checkpoint or latest_checkpoint(run_dir)
    if path is None:
        raise FileNotFoundError(f"{run_dir} has no checkpoint yet; train for longer")
    model = BasicsTransformerLM.from_config(config)
    restore(read_checkpoint(path), model, None, path)
    return model.to(resolve_device(device)).eval()


def check_vocabulary(model: BasicsTransformerLM, tokenizer: Tokenizer) -> None:
    """Raise a ValueError if the model and the tokenizer have different numbers of tokens."""
    tokens = len(tokenizer.vocab)
    if tokens != model.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokens} tokens, but the model {model.vocab_size}; "
            "give the tokenizer that the model was trained with"
        )
