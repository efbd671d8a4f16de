"""A trained model with its tokenizer, from the folder of its run."""

from collections.abc import Sequence
from pathlib import Path

from cs336_basics.checkpoint import read_checkpoint, restore
from cs336_basics.corpus import END_OF_TEXT
from cs336_basics.model import BasicsTransformerLM
from cs336_basics.strategy import resolve_device
from cs336_basics.tokenizer import Tokenizer
from cs336_basics.training import latest_checkpoint, read_model_config


def load_tokenizer(folder: Path, special_tokens: Sequence[str] = (END_OF_TEXT,)) -> Tokenizer:
    """The tokenizer whose `vocab.json` and `merges.txt` lie in `folder`."""
    for name in ("vocab.json", "merges.txt"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}; name the folder that `cs336-basics train-bpe` wrote")
    return Tokenizer.from_files(folder / "vocab.json", folder / "merges.txt", special_tokens)


def load_model(run: Path, device: str = "auto", checkpoint: Path | None = None) -> BasicsTransformerLM:
    """The model of a run, from `checkpoint` or its latest one."""
    config = read_model_config(run)
    path = checkpoint or latest_checkpoint(run)
    if path is None:
        raise FileNotFoundError(f"{run} has no checkpoint yet; train for longer")
    model = BasicsTransformerLM.from_config(config)
    restore(read_checkpoint(path), model, None, path)
    return model.to(resolve_device(device)).eval()


def check_vocabulary(model: BasicsTransformerLM, tokenizer: Tokenizer) -> None:
    """Raise a ValueError if the tokenizer has another number of tokens than the model."""
    tokens = len(tokenizer.vocab)
    if tokens != model.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokens} tokens, but the model {model.vocab_size}; "
            "give the tokenizer that the model was trained with"
        )
