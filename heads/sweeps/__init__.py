"""Sweeps: many fits from stores, one row each in results.jsonl, resumable; the best are chosen on a selection split."""
