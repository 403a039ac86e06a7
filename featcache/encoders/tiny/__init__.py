"""Files of the embedded ``tiny`` model, an open_clip ``local-dir:`` folder; see CARD.md beside this file."""
