"""Language models: a decoder, and the methods that distil it, in one table."""
