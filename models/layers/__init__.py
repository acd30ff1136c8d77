"""The layers that decoders are made of."""
