"""The vision benchmark: the field's methods, one table, any pair of networks."""
