"""Data: questions, instructions and preferences from files; what is made of them and read back from responses."""

from cs336_alignment.datasets.examples import KINDS, load_examples
from cs336_alignment.datasets.overlap import check_no_overlap, find_overlap
from cs336_alignment.datasets.packing import PackedSftDataset, iterate_batches
from cs336_alignment.datasets.parsing import parse_gsm8k_response, parse_mmlu_response
from cs336_alignment.datasets.preferences import PreferencePair, load_preferences
from cs336_alignment.datasets.sft import SftExample, load_sft

__all__ = [
    "KINDS",
    "PackedSftDataset",
    "PreferencePair",
    "SftExample",
    "check_no_overlap",
    "find_overlap",
    "iterate_batches",
    "load_examples",
    "load_preferences",
    "load_sft",
    "parse_gsm8k_response",
    "parse_mmlu_response",
]
