"""The commands, one file a verb; nothing here imports torch before it must."""
