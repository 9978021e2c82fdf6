"""Sequential requests: serve ten or more forget requests one after the other, and measure what holds."""
