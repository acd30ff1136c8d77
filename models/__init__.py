"""What runs a language model: Flax NNX layers, decoder families, key-value cache, generation."""
