"""Trainers: each an algorithm on one page."""
