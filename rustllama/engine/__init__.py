"""The engine: pure scheduling (sampling, sequence, detokenizer, scheduler) and the live parts that run it."""
