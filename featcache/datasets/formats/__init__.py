"""File formats that several data sources read."""
