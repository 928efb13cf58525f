"""Numbers -> table, page, card. Reads run folders; imports no torch."""
