"""Bytes on disk to tensors and back: safetensors and GGUF."""
