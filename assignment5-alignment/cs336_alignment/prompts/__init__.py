"""Prompt templates: the text files, and how questions are inserted into them."""
