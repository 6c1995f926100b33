"""Training losses, one file each, called as ``loss(model, batch, settings)``: see `catalogue.LOSSES`."""
