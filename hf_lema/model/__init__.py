"""A transformers model made ready: located, read, converted, packed and placed; its embedding, head and loss."""
