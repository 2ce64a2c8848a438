"""Optimizer state: what it consists of (:mod:`.layout`) and where it lives (:mod:`.store`)."""
