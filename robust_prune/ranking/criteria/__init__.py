"""Channel criteria, one file each: see `catalogue.CRITERIA` and `ranking.scoring`."""
