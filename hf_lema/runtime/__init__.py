"""The moving of weights: host stores, device slots, the prefetch thread, and the streamer that composes them."""
