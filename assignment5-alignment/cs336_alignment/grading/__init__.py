r"""Are these two answers equal? What finds an answer in a response, and what compares two answers.

`extract` finds the answer, and `latex` rewrites it in one canonical spelling. `structure`, `comparison`, `quantity` and
`arithmetic` make up `quick`, which decides most comparisons in this process in microseconds. The others go to
`symbolic`, which uses sympy in worker processes with a time limit (`pool`, `fork_server`, `child`). `equality` joins
the two. The reward functions that use all this are in `cs336_alignment.rollouts.rewards`.
"""
