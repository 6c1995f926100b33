"""Data: images from torchvision, folders, .npz files, arrays or the embedded sample, behind one interface."""
