"""Training losses, one in each file, called as ``loss(model, batch, settings)``; see `catalogue.LOSSES`."""
