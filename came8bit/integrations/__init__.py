"""What training tools ask for in their own terms: one module per tool, imported by that tool only.

``docs/trainers.md`` has the lines of each.
"""
