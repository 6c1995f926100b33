"""Budget: the cost of a model at given widths, and the widths that meet a budget."""
