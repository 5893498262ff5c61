"""``kvcompress bench``: compressed against plain vLLM, in one run and taking turns.

``job`` says what is measured, ``measure`` runs one engine, ``cases`` lets two take turns and makes
the rows, ``child_process`` does so in a process for each setup, and ``report`` writes the rows.
"""
