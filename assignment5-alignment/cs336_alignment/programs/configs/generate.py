"""Options of `generate`."""

from dataclasses import dataclass

from tyro.conf import Positional

from cs336_alignment.policy.config import Precision
from cs336_alignment.prompts.templates import PromptTemplate, load_prompt
from cs336_alignment.rollouts.config import EngineConfig, SamplingParams

#: The question without any text around it.
BARE = PromptTemplate("bare", "{question}")


@dataclass(frozen=True)
class GenerateConfig:
    """What to ask, and how the model answers."""

    questions: Positional[tuple[str, ...]] = ()
    """Questions to ask. Default: read questions from the terminal until an empty line or Ctrl-D."""
    model: str = "Qwen/Qwen2.5-Math-1.5B"
    """The model: a Hugging Face folder, such as a checkpoint of a run, or a name on the hub."""
    prompt: str | None = "r1_zero"
    """Template that questions are inserted into: the name of a built-in one, or a path. None: no template."""
    precision: Precision = "bfloat16"
    """Number format that the engine computes in."""
    sampling: SamplingParams = SamplingParams()
    """How tokens are sampled. Without --stop, a response ends at the strings that belong to the prompt."""
    engine: EngineConfig = EngineConfig()
    """The engine that generates."""

    def __post_init__(self) -> None:
        _ = self.template  # a prompt that does not exist is an error now

    @property
    def template(self) -> PromptTemplate:
        return BARE if self.prompt is None else load_prompt(self.prompt)
