"""The policy: the language model in training, its optimizer, and the folders it is loaded from."""
