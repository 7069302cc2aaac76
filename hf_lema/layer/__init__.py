"""One decoder layer as a proxy: lease, compute, recompute, and what a visit cuts, tiles or sends to RAM."""
