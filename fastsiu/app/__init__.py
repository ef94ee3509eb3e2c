"""The page in the browser. It does one job at a time, for one visitor, in a process of its own."""
