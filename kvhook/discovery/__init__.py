"""Rings of other processes, live or dead: finding them, following them, recovering and removing them."""
