"""Surgery: channels are removed, every group proved against the masked model, and what is left repaired."""
