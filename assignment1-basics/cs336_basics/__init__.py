"""A language model from scratch: tokenizer, Transformer, optimizer, training and sampling.

Read in this order: `bpe`, `pretokenization`, `tokenizer`; `model`, `nn_utils`, `accounting`; `optimizer`, `data`,
`training`, `train_config`, `strategy`, `checkpoint`; `generation`; `cli`.
"""
