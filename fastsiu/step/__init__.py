"""One step of training: what it trains on, its shares for ranks and micro-batches, the look after
it, relearning rehearsed before it; and its loss in other trainers."""
