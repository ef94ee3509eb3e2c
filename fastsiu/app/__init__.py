"""The page in the browser: one job at a time, in a process of its own, for whoever's turn it is."""
