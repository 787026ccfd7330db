"""Language models: a decoder, its weights, and what it writes."""
