"""Continual learning: where each task may write, what is forgotten, and which task a row belongs to. Arrays only."""
