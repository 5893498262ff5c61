"""Pages of the KV-cache pool: who holds which, tables for attention, moving tokens."""
