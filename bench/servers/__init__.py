"""Windlass's server beside llama.cpp's."""
