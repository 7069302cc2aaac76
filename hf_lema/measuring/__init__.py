"""What a run took: VRAM, RAM, time and bytes moved, recorded by a callback and a sampler thread."""
