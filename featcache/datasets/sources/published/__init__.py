"""Published data sets in their own layouts, with the class indices and names that the field uses."""
