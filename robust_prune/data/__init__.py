"""Data: images behind one interface, from torchvision, folders, .npz files or the embedded sample."""
