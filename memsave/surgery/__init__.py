"""How ``memsave.apply`` changes a user's network: its dataflow, its pairs, what takes their place.

``dataflow*`` say who reads what; ``pairs`` finds norms with their activations; ``decisions`` and
``replacements`` say which of them a technique may take; ``stand_ins`` are what comes instead.
"""
