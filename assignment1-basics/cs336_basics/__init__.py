"""A language model from scratch: tokenizer, Transformer, optimizer, training and sampling.

Read in this order: `pretokenization`, `bpe`, `tokenizer`; `nn_utils`, `model`, `accounting`; `optimizer`,
`data`, `checkpoint`, `strategy`, `run_log`, `training`; `generation`; `cli`.
"""
