"""Files that an exported model carries for transformers; copied, never imported from here."""
