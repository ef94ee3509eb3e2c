"""Processes that share an output: who does which unit of work, and what one worker does."""
