"""A registry to bytes, scrape after scrape, in small slices."""
