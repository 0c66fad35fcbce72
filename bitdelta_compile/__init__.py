"""One-bit deltas between fine-tunes and their base, as a property of torch.compile."""
