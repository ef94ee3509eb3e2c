"""Reads outside input within bounds, tries outside programs under limits, and keeps control
characters off the terminal."""
