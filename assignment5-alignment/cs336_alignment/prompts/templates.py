"""Prompt templates: text files with placeholders.

`{question}` or `{instruction}` is replaced by the question, and `{response}`, in templates of whole documents, by the
response. Nothing else in the file has a special meaning: `\\boxed{}` and `{x}` stay as they are.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

#: Strings that end a completion, by the name of the prompt.
STOPS: dict[str, tuple[str, ...]] = {"r1_zero": ("</answer>",), "zero_shot_system": ("# Query:",)}

_SUFFIX = ".prompt"
_ASKED = re.compile(r"\{(question|instruction)\}")
_PLACE = re.compile(r"\{(question|instruction|response)\}")


@dataclass(frozen=True)
class PromptTemplate:
    """A prompt with placeholders for the question and, in templates of whole documents, for the response.

    Raises:
        ValueError: there is no placeholder for the question.
    """

    name: str
    text: str

    def __post_init__(self) -> None:
        if not _ASKED.search(self.text):
            raise ValueError(f"prompt {self.name!r} has no placeholder for the question; write {{question}} in it")

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings that end a completion of this prompt, besides the end-of-sequence token."""
        return STOPS.get(self.name, ())

    def render(self, question: str | None = None, *, instruction: str | None = None, response: str = "") -> str:
        """Fill in the placeholders. Braces in the question and the response have no special meaning.

        Args:
            question: replaces `{question}` and `{instruction}`, which mean the same.
            instruction: another name for the question; give one of the two.
            response: replaces `{response}`. If it is empty, the text ends where a model begins to write.

        Raises:
            ValueError: neither or both of `question` and `instruction` were given.
        """
        if (question is None) == (instruction is None):
            raise ValueError(f"prompt {self.name!r} needs either a question or an instruction")
        asked = question if question is not None else instruction
        # One pass over the template: the text that is filled in is never searched for placeholders.
        return _PLACE.sub(lambda place: response if place[1] == "response" else str(asked), self.text)


def load_prompt(name_or_path: str) -> PromptTemplate:
    """The built-in prompt of this name, or else the one in the file at this path.

    The newline at the end of the file is not part of the prompt: after `<think>` a model continues on the same line.

    Raises:
        ValueError: it is neither, the file is not UTF-8, or it has no place for the question.
    """
    built_in = {file.name.removesuffix(_SUFFIX): file for file in _built_in_files()}
    file: Traversable = built_in.get(name_or_path, Path(name_or_path))
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt file {name_or_path} is not UTF-8: {error.reason} at byte {error.start}") from None
    except OSError:
        raise ValueError(
            f"there is no prompt {name_or_path!r}: it is neither a file nor one of {', '.join(sorted(built_in))}"
        ) from None
    return PromptTemplate(file.name.removesuffix(_SUFFIX), text.removesuffix("\n"))


def _built_in_files() -> Iterator[Traversable]:
    return (file for file in (files("cs336_alignment") / "prompts").iterdir() if file.name.endswith(_SUFFIX))
