"""Modules: parameters, codebooks, random draws."""
