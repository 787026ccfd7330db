"""Handwritten digits: a teacher distilled into a student a thirtieth of its size."""
