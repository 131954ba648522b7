"""Helpers that are used by several subpackages and do not depend on them."""
