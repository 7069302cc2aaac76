"""Random tokens as a duel's data: for models with random weights, which have no tokenizer. Knows nothing of models."""

from __future__ import annotations

import torch
from duel_data import PreparedData
from training import TokenDataset

RANDOM = "random"
NUM_EXAMPLES = 512


def random_data(vocab_size: int, seq_len: int, seed: int) -> PreparedData:
    """Examples of random tokens, the loss on all of them."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab_size, (NUM_EXAMPLES, seq_len), generator=generator)
    dataset = TokenDataset(tokens, torch.ones_like(tokens), tokens)
    return PreparedData(dataset=dataset, label="random tokens", num_examples=NUM_EXAMPLES, num_skipped=0)
