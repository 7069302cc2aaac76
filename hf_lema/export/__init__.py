"""Adapters merged into a standard checkpoint, and `.bin` weights converted to safetensors."""
