"""What the written problems of Assignment 1 measure: a module a problem, and `sweep`, which runs models.

Each writes `results/<problem>.json`, from which `writeup/` takes its numbers and figures.
"""
