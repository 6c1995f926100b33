"""Channel criteria, one in each file; see `catalogue.CRITERIA` and `ranking.scoring`."""
