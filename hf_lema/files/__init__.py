"""Where every tensor lies on disk: safetensors headers, the shard index, packs, written whole or not at all."""
