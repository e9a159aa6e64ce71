"""Autograd functions that save what their backward needs and no more, each with a plain reference beside it."""
