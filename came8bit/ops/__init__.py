"""The ``came8bit`` operators: schemas, the step that calls them, and the compiled libraries."""
