"""Hand-made and torch.hub models."""
