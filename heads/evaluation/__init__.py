"""Evaluation: fitted heads and stores in; metrics, intervals, confusion counts and predictions out."""
