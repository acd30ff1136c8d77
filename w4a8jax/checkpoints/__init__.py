"""Hugging Face checkpoints in and out: safetensors, compressed-tensors, streamed tensor by tensor."""
