"""Published data sets in their own layouts, with their usual class indices and names."""
