"""Surgery: removes channels, proves every cut against the masked model, and repairs the pruned model."""
